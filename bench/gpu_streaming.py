"""The streaming stage of `bench/gpu.py`: streamed blocks are resident ones bit for bit, and what streaming them costs.

The step is of 10 of the 40 blocks and one branch of guidance: what streaming costs is a ratio by block, so more of the
same would take longer and say nothing more. Every block has other weights, so that a mistaken order would be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stage import SIZES, Bench, check, in_turn, random_state, seconds_of
from wan_local.checkpoint import ModelFiles, find_model
from wan_local.flat_block import FlatBlock
from wan_local.geometry import Geometry
from wan_local.layers import Linear
from wan_local.models.transformer import ContextKV, Modulation, Transformer, stays_float32
from wan_local.network_cost import loop_bytes
from wan_local.offload import Residency, StreamedBlocks
from wan_local.planner import W8A8_TOKENS, StagePlan, chunk_tokens
from wan_local.quantized_layers import hold_in_format
from wan_local.settings import ModelConfig, load_settings
from wan_local.stage import stage
from wan_local.weight_format import WeightFormat, WeightFormats

BLOCKS = 10
_NAMES = ("resident", "streamed")
_COPIES = 12  # of a block, to time the bus alone
_FORMATS: tuple[WeightFormat, ...] = ("int8", "bf16")
_SECONDS = {480: 10.0, 720: 25.0}  # that a size takes in one format, with some to spare


def streaming(bench: Bench) -> None:
    """Streamed blocks against resident ones: bit-equal, step time by block, and how fast copies are, int8 and bf16."""
    files = find_model(load_settings(model="tiny"))
    expected = _tiny_velocities(bench, files, None)
    for resident in range(files.config.transformer.num_layers - 1):
        for source in ("ram", "file"):
            plan = StagePlan("denoise", 0, 0, resident_blocks=resident, source=source)
            got = _tiny_velocities(bench, files, plan)
            unequal = sum(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            check(f"unequal tensors, {resident} resident, from {source}", unequal, 0)
    bench.report("streaming", who="tiny model, every resident count, from RAM and from file", bit_equal=True)
    for format_ in _FORMATS:
        for size in SIZES[bench.size]:
            if bench.has_time("streaming", f"{format_} {size}", _SECONDS.get(size.height, 1.0)):
                _compare(bench, Geometry(size, 81), format_)


def _tiny_velocities(bench: Bench, files: ModelFiles, plan: StagePlan | None) -> list[Tensor]:
    config = files.config.transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, config.in_channels, 21, 10, 10, generator=generator).to(bench.device)
    text = torch.randn(2, 1, config.text_tokens, config.text_dim, generator=generator).to(bench.device)
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator).to(bench.device)
    with stage("context_embedder", files, bench.device, bench.dtype, plan=plan) as embedder:
        contexts = [embedder(prompt, images) for prompt in text]
        modulations = embedder.modulations(torch.tensor([500, 900]))
    with stage("transformer", files, bench.device, bench.dtype, plan=plan) as network:
        return [v for modulation in modulations.values() for v in network(latents, modulation, contexts)]


@dataclass(frozen=True)
class Step:
    """What a step is given, the same for streamed and for resident blocks."""

    latents: Tensor
    modulation: Modulation
    context: list[ContextKV]
    chunk_tokens: int

    def velocity(self, network: Transformer) -> Tensor:
        [velocity] = network(self.latents, self.modulation, [self.context], chunk_tokens=self.chunk_tokens)
        return velocity


def _compare(bench: Bench, geometry: Geometry, format_: WeightFormat) -> None:
    """Time a step with every block resident and with every block streamed from page-locked RAM, in turn."""
    config = shallow(bench)
    step, example = loop_step(bench, config, geometry), example_block(bench, config, format_)
    networks = {name: network_of(bench, config, example, format_, streamed=name == "streamed") for name in _NAMES}
    try:
        expected, got = (step.velocity(networks[name]) for name in _NAMES)
        check(f"velocities that are not finite, {format_}", int((~torch.isfinite(expected)).sum()), 0)
        check(f"unequal numbers, {format_} {geometry.size}, streamed", int((got != expected).sum()), 0)
        del expected, got
        works: dict[str, Callable[[], Any]] = {name: lambda n=networks[name]: step.velocity(n) for name in _NAMES}
        rows = in_turn(works, bench)
        ratio = rows["streamed"]["median_seconds"] / max(rows["resident"]["median_seconds"], 1e-9)
        layout = _layouts(networks["streamed"], bench)[0]
        copying = _copy_seconds(bench, layout.nbytes) * config.transformer.num_layers
        extra = rows["streamed"]["median_seconds"] - rows["resident"]["median_seconds"]
        bench.report(
            "streaming", who=f"{format_}, {config.transformer.num_layers} blocks, one branch", size=str(geometry.size),
            tokens=geometry.tokens, rows=rows, ratio=round(ratio, 4), block_bytes=layout.nbytes, bit_equal=True,
            page_locked=_page_locked(networks["streamed"]), copying_seconds=round(copying, 4),
            copied_bytes_a_second=round(config.transformer.num_layers * layout.nbytes / max(copying, 1e-9)),
            hidden_share_of_copying=round(1 - max(extra, 0.0) / max(copying, 1e-9), 3),
            predicted_bytes=_predicted(bench, config, geometry, step.chunk_tokens),
        )  # fmt: skip
    finally:
        for network in networks.values():
            if isinstance(network.blocks, StreamedBlocks):
                network.blocks.close()


def shallow(bench: Bench) -> ModelConfig:
    config = bench.config
    return replace(
        config, transformer=replace(config.transformer, num_layers=min(BLOCKS, config.transformer.num_layers))
    )


def loop_step(bench: Bench, config: ModelConfig, geometry: Geometry) -> Step:
    transformer, device, dtype = config.transformer, bench.device, bench.dtype
    latent, heads = geometry.latent_size, transformer.num_attention_heads
    grid = (geometry.latent_frames, latent.height, latent.width)

    def keys(tokens: int) -> Tensor:
        return torch.randn(1, tokens, heads, transformer.attention_head_dim, device=device).to(dtype)

    texts, images = transformer.text_tokens, transformer.image_tokens
    context = [ContextKV(keys(texts), keys(texts), keys(images), keys(images), None)] * transformer.num_layers
    projection = torch.randn(1, 6, transformer.dim, device=device) * 0.1
    return Step(
        torch.randn(1, transformer.in_channels, *grid, device=device),
        Modulation(torch.randn(1, transformer.dim, device=device) * 0.1, projection),
        context,
        chunk_tokens(transformer, geometry.tokens, dtype.itemsize),
    )


def _on_meta(bench: Bench, config: ModelConfig, format_: WeightFormat) -> Transformer:
    with torch.device("meta"):
        network = Transformer(config.transformer)
    hold_in_format(network, "transformer", WeightFormats(format_))
    for linear in (part for part in network.modules() if isinstance(part, Linear)):
        linear.arithmetic = "w8a8"  # what int8 weights are used by on a card
    return network


def example_block(bench: Bench, config: ModelConfig, format_: WeightFormat) -> Mapping[str, Tensor]:
    """Return one block's weights in RAM."""
    block = next(iter(_on_meta(bench, config, format_).blocks))  # type: ignore[call-overload]
    return {name: tensor.cpu() for name, tensor in random_state(block, bench).items()}


def _layouts(network: Transformer, bench: Bench) -> list[FlatBlock]:
    blocks = network.blocks
    listed = blocks._blocks if isinstance(blocks, StreamedBlocks) else list(blocks)  # type: ignore[call-overload]
    return [FlatBlock(block, lambda name: torch.float32 if stays_float32(name) else bench.dtype) for block in listed]


def network_of(
    bench: Bench, config: ModelConfig, example: Mapping[str, Tensor], format_: WeightFormat, *, streamed: bool
) -> Transformer:
    """Return a transformer whose blocks differ in their modulation, all on the device or all streamed to it."""
    network = _on_meta(bench, config, format_)

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.copy_(example[name])
            if name == "scale_shift_table":
                view.add_(0.01 * index)

    blocks, layouts = list(network.blocks), _layouts(network, bench)  # type: ignore[call-overload]
    keep = frozenset() if streamed else frozenset(range(len(blocks)))
    for index in keep:
        flat = torch.empty(layouts[index].nbytes, dtype=torch.uint8, device=bench.device)
        layouts[index].onto(blocks[index], flat)
        fill(index, layouts[index].views(flat))
    network.blocks = StreamedBlocks(blocks, layouts, fill, Residency(keep, "ram"), bench.device)
    torch.manual_seed(5)  # both networks' other weights are the same
    network.load_state_dict(random_state(network, bench), strict=False, assign=True)
    return network.eval()


def _copy_seconds(bench: Bench, nbytes: int) -> float:
    """Return the seconds of one copy of a block from page-locked RAM, alone on the bus."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)

    def copies() -> None:
        for _ in range(_COPIES):
            target.copy_(source, non_blocking=True)

    copies()
    return seconds_of(copies, bench.device) / _COPIES


def _page_locked(network: Transformer) -> bool | None:
    host = network.blocks._host if isinstance(network.blocks, StreamedBlocks) else None
    return None if host is None else host.page_locked


def _predicted(bench: Bench, config: ModelConfig, geometry: Geometry, chunk: int) -> int:
    """Return the planner's figure for what a step holds beside weights, keys and values."""
    in_linear = W8A8_TOKENS * config.transformer.ffn_dim * (4 + 4 + 1)
    return loop_bytes(geometry, config, chunk, bench.dtype.itemsize, together=False, in_linear=in_linear)
