"""Streaming as diffusers does it, at its best, beside ours: `bench/gpu.py`'s stage of that name.

10 of the 40 blocks and one branch at 480p, as in the stage `streaming`. diffusers: group offload with streams, by block
and by leaf, its weights in bfloat16 and cast layer by layer from float8; a configuration that does not run is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stage import SIZES, Bench, in_turn, random_state
from bench.gpu_streaming import example_block, loop_step, network_of, shallow
from bench.peer import peer_on_meta, with_weights
from wan_local.geometry import Geometry
from wan_local.offload import StreamedBlocks
from wan_local.settings import TransformerConfig
from wan_local.weight_format import WeightFormat

_SECONDS = 15.0  # that one configuration takes, with some to spare
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Way:
    """How diffusers keeps weights out of the way: in groups of blocks or leaves, and in which dtype they wait."""

    offload_type: str
    storage: torch.dtype | None = None

    def describe(self) -> str:
        stored = "" if self.storage is None else f", {str(self.storage).removeprefix('torch.')} storage"
        return f"diffusers, group offload by {self.offload_type} with streams{stored}"


_WAYS = (
    _Way("block_level"),
    _Way("block_level", torch.float8_e4m3fn),
    _Way("leaf_level"),
)


def offload(bench: Bench) -> None:
    """A step with streamed weights at 480p: ours in int8 and bf16, diffusers' group offload with streams."""
    geometry = Geometry(SIZES[bench.size][0], 81)
    formats: tuple[WeightFormat, ...] = ("int8", "bf16")
    for format_ in formats:
        if bench.has_time("offload", f"wan_local, {format_}", _SECONDS):
            _ours(bench, geometry, format_)
    for way in _WAYS:
        if bench.has_time("offload", way.describe(), _SECONDS):
            _theirs(bench, geometry, way)


def _ours(bench: Bench, geometry: Geometry, format_: WeightFormat) -> None:
    config = shallow(bench)
    step = loop_step(bench, config, geometry)
    network = network_of(bench, config, example_block(bench, config, format_), format_, streamed=True)
    try:
        _report(bench, geometry, f"wan_local, every block streamed, {format_}", lambda: step.velocity(network))
    finally:
        if isinstance(network.blocks, StreamedBlocks):
            network.blocks.close()


def _theirs(bench: Bench, geometry: Geometry, way: _Way) -> None:
    """Time one configuration of diffusers; what it cannot do here is a row, too."""
    try:
        peer = _peer(bench, shallow(bench).transformer, way)
        inputs = _inputs(bench, shallow(bench).transformer, geometry)
        _report(bench, geometry, way.describe(), lambda: peer(*inputs, return_dict=False)[0])
    except (RuntimeError, ValueError, TypeError, ImportError, NameError) as error:  # a NameError without accelerate
        bench.report("offload", who=way.describe(), failed=f"{type(error).__name__}: {error}"[:300])


def _peer(bench: Bench, config: TransformerConfig, way: _Way) -> Any:
    peer = peer_on_meta(config)
    with_weights(peer, random_state(peer, bench), bench.dtype, _CPU, config)
    on_card = bench.device.type == "cuda"
    if way.storage is not None:
        peer.enable_layerwise_casting(storage_dtype=way.storage, compute_dtype=bench.dtype)
    peer.enable_group_offload(
        onload_device=bench.device, offload_device=_CPU, offload_type=way.offload_type, non_blocking=on_card,
        num_blocks_per_group=1 if way.offload_type == "block_level" else None, use_stream=on_card,
    )  # fmt: skip
    return peer


def _inputs(bench: Bench, config: TransformerConfig, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, dtype, latent = bench.device, bench.dtype, geometry.latent_size
    grid = (geometry.latent_frames, latent.height, latent.width)
    return (
        torch.randn(1, config.in_channels, *grid, device=device).to(dtype),
        torch.tensor([700], device=device),
        torch.randn(1, config.text_tokens, config.text_dim, device=device).to(dtype),
        torch.randn(2, config.image_tokens // 2, config.image_dim, device=device).to(dtype),
    )


def _report(bench: Bench, geometry: Geometry, who: str, work: Callable[[], Any]) -> None:
    work()
    rows = in_turn({who: work}, bench)
    blocks = shallow(bench).transformer.num_layers
    bench.report("offload", who=who, size=str(geometry.size), tokens=geometry.tokens, blocks=blocks, **rows[who])
