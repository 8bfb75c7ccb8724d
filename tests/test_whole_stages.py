"""A whole call of the loop, and whole stages of the VAE, hold what is planned: all of it is there and counted at once.

Nothing of the plan is on the other side: the ring, keys and values and what is around the networks are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.live_bytes import LiveBytes, live_bytes
from wan_local import conditioning, decode, quantize
from wan_local.denoise import Guided
from wan_local.flat_block import FlatBlock
from wan_local.geometry import Geometry, Size
from wan_local.layers import Linear
from wan_local.models import causal_layers
from wan_local.models.text_encoder import build_text_encoder
from wan_local.models.transformer import ContextEmbedder, ContextKV, Modulation, Transformer, stays_float32
from wan_local.models.vae import Vae
from wan_local.network_cost import contexts_bytes
from wan_local.offload import Residency, StreamedBlocks
from wan_local.parking import ParkedContext
from wan_local.planner import GIB, LIBRARY_BYTES, Machine, Plan, plan_within, shrink, spread
from wan_local.quantize import stays_as_stored
from wan_local.quantized_layers import hold_in_format
from wan_local.settings import load_model_config
from wan_local.stage import network_sizes
from wan_local.tiling import WHOLE
from wan_local.weight_format import WeightFormat, WeightFormats

REAL = load_model_config("flf2v_14b")
FOUR_BLOCKS = replace(REAL, transformer=replace(REAL.transformer, num_layers=4))
SMALL, HALF, SHORT = (Geometry(Size(480, 832), num_frames) for num_frames in (81, 41, 13))
META = torch.device("meta")


def assert_predicted(predicted: int, counted: int) -> None:
    assert counted <= predicted <= 1.08 * counted, f"{predicted / GIB:.3f} GiB predicted, {counted / GIB:.3f} counted"


def hold(network: nn.Module, part: Any, formats: WeightFormats) -> None:
    """Take the weights of a format, the others bfloat16, as on a card."""
    hold_in_format(network, part, formats)
    for name, parameter in network.named_parameters():
        wide = part == "transformer" and stays_float32(name)
        if not wide and not stays_as_stored(name, parameter.dtype):
            parameter.data = parameter.data.to(torch.bfloat16)


def contexts_of_prompts() -> list[list[ContextKV]]:
    """Return keys and values of two prompts; those of the images are the same tensors."""
    config = FOUR_BLOCKS.transformer

    def made(tokens: int) -> Tensor:
        shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    branches: list[list[ContextKV]] = [[], []]
    for _ in range(config.num_layers):
        k_image, v_image = made(config.image_tokens), made(config.image_tokens)
        for branch in branches:
            branch.append(ContextKV(made(config.text_tokens), made(config.text_tokens), k_image, v_image, None))
    return branches


@contextmanager
def streaming(transformer: Transformer, num_resident: int) -> Iterator[int]:
    """Stream the blocks that do not stay, through a ring that is made here; give the bytes of all that does."""
    blocks = list(transformer.blocks)  # type: ignore[call-overload]
    stay = spread(len(blocks), num_resident)
    dtypes = {name: parameter.dtype for name, parameter in blocks[0].named_parameters()}
    outside = sum(p.nbytes for name, p in transformer.named_parameters() if not name.startswith("blocks."))
    resident = sum(parameter.nbytes for index in stay for parameter in blocks[index].parameters())
    layouts = [FlatBlock(block, dtypes.__getitem__) for block in blocks]
    transformer.blocks = StreamedBlocks(blocks, layouts, lambda *_: None, Residency(stay, "file"), META)
    try:
        yield outside + resident
    finally:
        transformer.blocks.close()


def counted_call(plan: Plan, formats: WeightFormats) -> int:
    """Return the most bytes that a step with guidance held, weights and all."""
    geometry, loop, config = plan.geometry, plan.stage("denoise"), FOUR_BLOCKS.transformer
    shape = (geometry.latent_frames, geometry.latent_size.height, geometry.latent_size.width)
    with META:
        transformer = Transformer(config)
    hold(transformer, "transformer", formats)
    for part in transformer.modules():
        if isinstance(part, Linear):
            part.arithmetic = loop.int8_arithmetic or "weight-only"
    in_ram = contexts_of_prompts() if loop.parked else None
    assert loop.resident_blocks is not None
    with live_bytes() as counted, ExitStack() as stack:
        held = stack.enter_context(streaming(transformer, loop.resident_blocks))
        contexts: list[Any] = (
            [ParkedContext(context, META) for context in in_ram] if in_ram else list(contexts_of_prompts())
        )
        for context in contexts if in_ram else ():
            stack.callback(context.close)
        latents, condition = (
            torch.empty(1, channels, *shape, device=META)
            for channels in (config.out_channels, config.in_channels - config.out_channels)
        )
        modulation = Modulation(torch.empty(1, config.dim, device=META), torch.empty(1, 6, config.dim, device=META))
        one, other = contexts
        guided = Guided(
            transformer, condition, {1.0: modulation}, one, other, 5.0,
            together=loop.together, chunk_tokens=plan.chunk_tokens,
        )  # fmt: skip
        guided.predict(latents, 1.0)
    return counted.peak + held


# format, GiB free, and what they lead to: blocks that stay, keys and values in RAM, both branches block by block
STEPS: list[tuple[WeightFormat, float, int, bool, bool]] = [
    ("int8", 2.4, 1, False, True),
    ("int8", 2.0, 0, True, True),
    ("int8", 1.7, 0, True, False),
    ("bf16", 2.8, 0, False, True),
]


@pytest.mark.parametrize(("format_", "free_gib", "resident", "parked", "together"), STEPS)
def test_a_whole_step_with_streamed_blocks_and_guidance_holds_what_is_planned(
    format_: WeightFormat,
    free_gib: float,
    resident: int,
    parked: bool,
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model with four blocks of the real size."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: torch.empty_like(q))
    monkeypatch.setattr(quantize, "integer_product", lambda a, b: a.new_empty((len(a), len(b)), dtype=torch.int32))
    formats, machine = WeightFormats(format_), Machine("cuda:0", int(free_gib * GIB), 64 * GIB, 2, "w8a8")
    plan = plan_within(HALF, FOUR_BLOCKS, network_sizes(FOUR_BLOCKS, formats), machine)
    loop = plan.stage("denoise")
    assert (loop.resident_blocks, loop.parked, loop.together) == (resident, parked, together)
    assert_predicted(loop.peak_bytes - LIBRARY_BYTES, counted_call(plan, formats))


def decoded(vae: Vae, plan: Plan) -> None:
    geometry, tiling = plan.geometry, plan.stage("decode").tiling
    latents = torch.empty(1, REAL.vae.z_dim, geometry.latent_frames, *_grid(geometry), device=META)
    for part in decode.decode_frames(vae, latents, geometry, tiling=tiling):
        del part


def encoded(vae: Vae, plan: Plan) -> None:
    size, tiling = plan.geometry.size, plan.stage("condition").tiling
    images = torch.empty(3, size.height, size.width), torch.empty(3, size.height, size.width)
    conditioning.encode_condition(vae, images, plan.geometry.generated_frames, tiling=tiling)


def _grid(geometry: Geometry) -> tuple[int, int]:
    return geometry.latent_size.height, geometry.latent_size.width


def on_meta(chunk: Tensor) -> decode.Frames:
    """Do what is done with decoded frames on the device, which has no numbers here."""
    torch.isfinite(chunk)
    chunk[0].float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    return np.zeros((*chunk.shape[2:], 3), dtype=np.uint8)


@pytest.mark.parametrize("stage", ["decode", "condition"])
def test_the_vaes_stage_holds_what_is_planned_from_latents_or_images_on(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole frames and the first tiles; features that wait in RAM lie on meta as well, and are counted."""
    monkeypatch.setattr(decode, "_checked_frames", on_meta)
    for name in ("decode_tiles", "encode"):
        monkeypatch.setitem(getattr(Vae, name).__kwdefaults__, "keep_on", "meta")
    sizes, machine = network_sizes(REAL), Machine("cuda:0", 24 * GIB, 64 * GIB, 2)
    half, call = ("decoder", decoded) if stage == "decode" else ("encoder", encoded)
    plan: Plan | None = plan_within(SHORT, REAL, sizes, machine)
    for tiled in (False, True):
        assert plan is not None and (plan.stage(stage).tiling != WHOLE) is tiled
        with META:
            vae = Vae(REAL.vae, encodes=half == "encoder", decodes=half == "decoder")
        weights = sum(parameter.nbytes for parameter in vae.parameters())
        peaks = []
        for repeating in (0, 1, 2, 3) if half == "encoder" else (0,):  # layers of the encoder that have begun to repeat
            periodic = iter([True] * repeating)
            monkeypatch.setattr(causal_layers, "_unchanged", lambda *_, periodic=periodic: next(periodic, False))
            with live_bytes() as counted:
                call(vae, plan)
            peaks.append(counted.peak)
        planned = plan.stage(stage)
        features = 384 * SHORT.latent_frames * SHORT.latent_size.height * SHORT.latent_size.width * 4 if tiled else 0
        assert_predicted(planned.peak_bytes - LIBRARY_BYTES + features, max(peaks) + weights)
        plan = shrink(plan, stage, REAL, sizes, machine)


def counted_text(formats: WeightFormats) -> LiveBytes:
    with META:
        encoder = build_text_encoder(replace(REAL.text_encoder, num_layers=2)).eval()
        embeds = torch.empty(1, REAL.transformer.text_tokens, REAL.text_encoder.d_model, dtype=torch.bfloat16)
    hold(encoder, "text_encoder", formats)
    with live_bytes() as counted:
        encoder(inputs_embeds=embeds).last_hidden_state.float()
    return counted


def counted_context(formats: WeightFormats) -> LiveBytes:
    """Of one block, so that all others' keys and values are to be added where they stay."""
    config = replace(REAL.transformer, num_layers=1)
    with META:
        embedder = ContextEmbedder(config)
        prompts = [torch.empty(1, config.text_tokens, config.text_dim) for _ in range(2)]
        images = torch.empty(1, config.image_tokens, config.image_dim)
    hold(embedder, "transformer", formats)
    with live_bytes() as counted, pytest.MonkeyPatch().context() as patch:
        patch.setattr("wan_local.models.transformer.fold_padding", lambda embeds: (embeds, None))
        embedder.contexts(prompts, images)
    return counted


@pytest.mark.parametrize("format_", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("stage", ["text", "context"])
def test_every_rung_of_what_runs_once_is_planned_within_8_percent_and_never_below(
    stage: str, format_: WeightFormat
) -> None:
    formats = WeightFormats.converted(format_) if format_ != "bf16" else WeightFormats()
    sizes = network_sizes(REAL, formats)
    count, network = (counted_text, "text_encoder") if stage == "text" else (counted_context, "context_embedder")
    counted, blocks = count(formats).peak, sizes[network].block_bytes(2)
    everything, table = sizes[network].weight_bytes(2), 2 * sizes[network].table
    machine = Machine("cuda:0", 24 * GIB, 64 * GIB, 2, "w8a8")
    plan: Plan | None = plan_within(SMALL, REAL, sizes, machine)
    peaks = []
    while plan is not None:
        planned, weights = plan.stage(stage), everything
        if planned.resident_blocks is not None:
            weights += -table - sum(blocks) + (planned.resident_blocks + 2) * blocks[0]
        others = contexts_bytes(REAL, 2) * 39 // 40 if stage == "context" and not planned.parked else 0
        assert_predicted(planned.peak_bytes - LIBRARY_BYTES, weights + counted + others)
        peaks.append(planned.peak_bytes)
        plan = shrink(plan, stage, REAL, sizes, machine)
    assert peaks == sorted(set(peaks), reverse=True) and len(peaks) >= 3, peaks
