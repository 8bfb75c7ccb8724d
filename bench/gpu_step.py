"""One prediction of all 40 blocks with random weights: ours in bfloat16 and in int8, and diffusers' in the same run.

Weights are made once, on the card; diffusers' model holds the same tensors. One branch (a guide_scale of 1), whose
forward is timed twice after one that warms up; at 720p once, after a warm-up of a single block.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_stage import SIZES, Bench, CheckFailed, random_state
from bench.peer import peer_on_meta, with_weights
from bench.world import Measured, measure
from wan_kernels.language import KERNEL_ERRORS
from wan_local.attention import PLAIN_KERNELS, KernelChoice
from wan_local.denoise import Guided
from wan_local.geometry import Geometry, Size
from wan_local.layers import Linear
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context
from wan_local.planner import chunk_tokens
from wan_local.quantize import quantize_weight

_TIMESTEP = 700
_PLAIN, _FUSED, _EAGER, _COMPILED = "wan_local plain", "wan_local fused", "diffusers eager", "diffusers compiled"
_INT8 = {
    "wan_local int8 linears": KernelChoice(fused=True),
    "wan_local int8 linears and QK": KernelChoice("int8", fused=True),
    "wan_local int8 linears, QK and PV": KernelChoice("int8_pv", fused=True),
}
_ROW_SECONDS = {480: 12.0, 720: 25.0}  # that a row is expected to take, by the shorter side of the video
_COMPILE_SECONDS = 90.0
_FURTHEST = {_FUSED: 0.05, **dict.fromkeys(_INT8, 0.3)}  # relative rms to the first bfloat16 prediction


def int8_step(bench: Bench) -> None:
    """All 40 blocks once at 480p: ours plain, fused, with int8 linears, QK and PV, and diffusers' as it is."""
    _Steps(bench, SIZES[bench.size][0], runs=2).run([_PLAIN, _FUSED, _EAGER, *_INT8])


def int8_step_compiled(bench: Bench) -> None:
    """The same of diffusers with its blocks compiled, which takes a minute before the first prediction."""
    _Steps(bench, SIZES[bench.size][0], runs=2).run([_COMPILED])


def int8_step_720p(bench: Bench) -> None:
    """The same at 720p, one run each: ours fused, with int8 linears and QK, with PV, and diffusers' as it is."""
    _Steps(bench, SIZES[bench.size][-1], runs=1, warm_blocks=1).run([_FUSED, _EAGER, *list(_INT8)[1:]])


class _Steps:
    """A transformer with random weights and what it is given, for one size."""

    def __init__(self, bench: Bench, size: Size, *, runs: int, warm_blocks: int | None = None) -> None:
        self.bench, self.geometry, self.runs = bench, Geometry(size, 81), runs
        config, device = bench.config.transformer, bench.device
        self.warm_blocks = warm_blocks or config.num_layers
        with torch.device("meta"):
            self.once, self.ours = ContextEmbedder(config).eval(), Transformer(config).eval()
        torch.manual_seed(0)
        for half in (self.once, self.ours):
            half.load_state_dict(random_state(half, bench), assign=True)
        grid = (self.geometry.latent_frames, self.geometry.latent_size.height, self.geometry.latent_size.width)
        self.latents = torch.randn(1, config.out_channels, *grid, device=device)
        self.condition = torch.randn(1, config.in_channels - config.out_channels, *grid, device=device)
        self.text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=bench.dtype)
        self.images = torch.randn(1, config.image_tokens, config.image_dim, device=device, dtype=bench.dtype)
        self.expected: Tensor | None = None

    def run(self, names: list[str]) -> None:
        """Report a row for each of `names`, all of which are tried; int8 is last, since it takes the weights' place."""
        failed, size = [], self.geometry.size
        for name in names:
            seconds = _ROW_SECONDS.get(min(size.height, size.width), 0.0)
            seconds += _COMPILE_SECONDS if name == _COMPILED and seconds else 0.0
            if not self.bench.has_time("int8_step", f"{name}, {size}", seconds):
                continue
            try:
                self._row(name)
            except (*KERNEL_ERRORS, ImportError):  # also where memory runs out, or there is no diffusers
                told = traceback.format_exc()
                self.bench.report("int8_step", who=name, size=str(self.geometry.size), failed=told[-1500:])
                failed.append(f"{name}: {told.strip().splitlines()[-1]}")
        if failed:
            raise CheckFailed("; ".join(failed))

    def _row(self, name: str) -> None:
        if name in (_EAGER, _COMPILED):
            self._measure(name, *self._peer(compiled=name == _COMPILED))
            return
        if name in _INT8:
            _quantize(self.ours)
        choice = {_PLAIN: PLAIN_KERNELS, _FUSED: KernelChoice(fused=True), **_INT8}[name]
        config, tokens = self.ours.config, self.geometry.tokens
        context = self.once(self.text, self.images)
        guided = Guided(
            self.ours, self.condition, self.once.modulations(torch.tensor([_TIMESTEP])), context, None, 1.0,
            chunk_tokens=chunk_tokens(config, tokens, self.bench.dtype.itemsize), choice=choice,
        )  # fmt: skip

        def warm() -> None:
            with _first_blocks(self.ours, self.warm_blocks):
                short = Guided(self.ours, self.condition, guided.modulations, context[: self.warm_blocks], None, 1.0,
                               chunk_tokens=guided.chunk_tokens, choice=choice)  # fmt: skip
                short.predict(self.latents, _TIMESTEP)

        self._measure(name, lambda: guided.predict(self.latents, _TIMESTEP)[0], warm)

    def _peer(self, *, compiled: bool) -> tuple[Callable[[], Tensor], Callable[[], object]]:
        config, bench = self.bench.config.transformer, self.bench
        state = {**self.ours.state_dict(), **{k: v for k, v in self.once.state_dict().items() if in_context(k)}}
        peer = with_weights(peer_on_meta(config), state, bench.dtype, bench.device, config)
        if compiled:
            peer.compile_repeated_blocks(fullgraph=True)
        inputs = torch.cat((self.latents, self.condition), dim=1).to(bench.dtype)
        timestep = torch.tensor([_TIMESTEP], device=bench.device)
        two_rows = self.images.reshape(2, -1, config.image_dim)

        def predict() -> Tensor:
            out: Tensor = peer(inputs, timestep, self.text, two_rows, return_dict=False)[0]
            return out

        def warm() -> None:
            with _first_blocks(peer, self.warm_blocks):
                predict()

        return predict, warm

    def _measure(self, name: str, predict: Callable[[], Tensor], warm: Callable[[], object]) -> None:
        """Warm up, time, and hold the last prediction to the first bfloat16 one."""
        device = self.bench.device
        warm()
        kept: list[Tensor] = []

        def once() -> None:
            kept[:] = [predict()]

        weight_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        measured: Measured = measure(once, device, runs=self.runs, warm=False)
        [got] = (x.float() for x in kept)
        row: dict[str, Any] = {"who": name, "size": str(self.geometry.size), "tokens": self.geometry.tokens}
        row |= {"guide_scale": 1, **measured.row(), "bytes_before": weight_bytes}
        if not bool(torch.isfinite(got).all()):
            raise RuntimeError(f"{name}: its prediction is not finite")
        if self.expected is None:
            self.expected = got
        rms = float((got - self.expected).square().mean().sqrt() / self.expected.square().mean().sqrt())
        if rms > _FURTHEST.get(name, 0.05):
            raise RuntimeError(f"{name}: relative rms {rms:.3g} to the first prediction of these weights")
        self.bench.report("int8_step", **row, rms=round(rms, 5))


@contextmanager
def _first_blocks(network: nn.Module, count: int) -> Iterator[None]:
    blocks = network.blocks
    assert isinstance(blocks, nn.ModuleList), f"blocks are {type(blocks)}"
    network.blocks = blocks[:count]
    try:
        yield
    finally:
        network.blocks = blocks


def _quantize(network: Transformer) -> None:
    """Let the linears of all blocks hold int8 weights that meet int8 rows, unless they do."""
    for linear in (part for part in network.blocks.modules() if isinstance(part, Linear)):
        if linear.weight_scale is None:
            weight = quantize_weight(linear.weight.data, "int8", rotated=True)
            linear.hold({"weight": weight.data, "weight_scale": weight.scale}, rotated=True, arithmetic="w8a8")
