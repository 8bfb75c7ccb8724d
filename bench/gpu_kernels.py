"""The kernel stages of `bench/gpu.py`: right at real shapes on both matrix paths, then how fast, then a whole step.

Hopper has two ways to multiply: its own, and with DISABLE_MMA_V3=1 the one that consumer cards have. Triton reads that
when it compiles, so each path runs in a process of its own with a cache of its own.

python -m bench.gpu_kernels checks|speeds DEVICE full|small FILE      what those processes run
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stage import SIZES, Bench, check, random_state
from bench.world import measure
from wan_kernels import attention_int8, checks, linear_int8
from wan_local.attention import PLAIN_KERNELS, KernelChoice, sdpa
from wan_local.denoise import Guided
from wan_local.geometry import Geometry, Size
from wan_local.layers import Linear
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context
from wan_local.planner import chunk_tokens
from wan_local.quantize import quantize_weight

PATHS = {"own": {}, "consumer": {"DISABLE_MMA_V3": "1"}}
TOKENS = {"full": (32_760, 75_600), "small": (300,)}  # 480p and 720p, 81 frames
_SECONDS = 230  # for each path: the two together stay below eight minutes
_WIDE_CHUNK = 4096  # rows of int32 that torch's int8 product writes at a time


def kernels(bench: Bench) -> None:
    """Every op against float64 at the 14B model's widths, on this card's own matrix path and on the consumer one."""
    for path, rows in _on_both_paths("checks", bench):
        for row in rows:
            check(f"{path} path, {row['op']}, in units of what is allowed", row["error"], 1.0)
        bench.report("kernels", path=path, errors={row["op"]: row["error"] for row in rows})


def kernel_speed(bench: Bench) -> None:
    """GB/s of fusions against a copy; int8 linears and attention against torch's at 480p and 720p, on both paths."""
    for path, rows in _on_both_paths("speeds", bench):
        for row in rows:
            bench.report("kernel_speed", path=path, **row)


def _on_both_paths(what: str, bench: Bench) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run `what` in a process a path; a device that is not Hopper has one path."""
    hopper = bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device)[0] == 9
    for path, environment in PATHS.items() if hopper else [("own", PATHS["own"])]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "bench.gpu_kernels", what, str(bench.device), bench.size, str(file)]
            environment = {**os.environ, **environment, "TRITON_CACHE_DIR": f"{folder}/cache"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)  # noqa: PLW1510
            print(done.stdout, end="", flush=True)
            check(f"{path} path, exit code {done.stderr[-300:]!r}", abs(done.returncode), 0)
            yield path, json.loads(file.read_text(encoding="utf-8"))


def _check_rows(device: torch.device, size: str) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in checks.cases(device, checks.REAL if size == "full" else checks.SMALL, dtype):
        yield {"op": case.name, "error": round(checks.judge(case).error, 6)}


def _speed_rows(device: torch.device, size: str) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target, source = (torch.empty(2**27, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * source.nbytes / _median(lambda: target.copy_(source), device)
    yield {"op": "copy", "gigabytes_a_second": round(copy / 1e9, 1)}
    at = checks.REAL if size == "full" else checks.SMALL
    for case in checks.cases(device, at, dtype):
        if case.products == 0 and checks.judge(case).right:
            rate = case.moved_bytes / _median(case.timed, device)
            yield {"op": case.name, "gigabytes_a_second": round(rate / 1e9, 1), "share_of_copy": round(rate / copy, 3)}
    for tokens in TOKENS[size]:
        yield from _linear_rows(device, tokens, at, dtype)
        yield from _attention_rows(device, tokens, at, dtype)


def _linear_rows(device: torch.device, tokens: int, at: checks.Size, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield the three shapes of a block's linears: ours, torch's int8 product, and the compute dtype's."""
    for outputs, inputs in ((at.dim, at.dim), (at.ffn_dim, at.dim), (at.dim, at.ffn_dim)):
        a = torch.randint(-127, 128, (1, tokens, inputs), dtype=torch.int8, device=device)
        w = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        a_scale, w_scale = torch.rand(1, tokens, device=device), torch.rand(outputs, device=device)
        bias = torch.zeros(outputs, device=device, dtype=dtype)
        x, plain = a[0].to(dtype), w.to(dtype)
        works: dict[str, Callable[[], Any]] = {
            "linear_int8": lambda a=a, s=a_scale, w=w, t=w_scale, b=bias: linear_int8(a, s, w, t, b, False, dtype),
            "torch._int_mm": lambda a=a, w=w: [torch._int_mm(rows, w.t()) for rows in a[0].split(_WIDE_CHUNK)],
            f"torch {dtype}": lambda x=x, w=plain: torch.nn.functional.linear(x, w),
        }
        if device.type == "cuda":
            half, half_plain = x.half(), plain.half()
            works["torch float16, fp16 sums"] = lambda x=half, w=half_plain: _half_sums(x, w)
        for name, work in works.items():
            rate = 2 * tokens * outputs * inputs / _median(work, device)
            yield {"op": name, "shape": [tokens, outputs, inputs], "tera_a_second": round(rate / 1e12, 2)}


def _half_sums(x: Tensor, w: Tensor) -> Tensor:
    """Multiply with fp16 accumulation where torch offers it; the flag is put back."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        return torch.nn.functional.linear(x, w)
    finally:
        matmul.allow_fp16_accumulation = before


def _attention_rows(device: torch.device, tokens: int, at: checks.Size, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield int8 attention with fp16 and with int8 values, and torch's fused one, at a video's length."""
    heads, head_dim = at.heads, at.head_dim
    q8 = torch.randint(-127, 128, (1, heads, tokens, head_dim), dtype=torch.int8, device=device)
    q_scale = torch.full((1, heads, tokens), 0.02, device=device)
    k_scale = torch.full((1, heads, -(-tokens // 64)), 0.02, device=device)
    statistics = torch.ones((1, heads, head_dim), device=device)
    v16 = torch.randn((1, tokens, heads, head_dim), device=device).half()
    v8 = torch.randint(-127, 128, (1, heads, head_dim, -(-tokens // 64) * 64), dtype=torch.int8, device=device)
    q = v16.to(dtype)
    works: dict[str, Callable[[], Any]] = {
        "attention_int8, fp16 values": lambda: attention_int8(q8, q_scale, q8, k_scale, v16, statistics, None, dtype),
        "attention_int8, int8 values": lambda: attention_int8(
            q8, q_scale, q8, k_scale, v8, statistics, statistics, dtype
        ),
        "torch sdpa": lambda: sdpa(q, q, q),
    }
    for name, work in works.items():
        rate = 4 * tokens**2 * heads * head_dim / _median(work, device, runs=3)
        yield {"op": name, "shape": [tokens, heads, head_dim], "tera_a_second": round(rate / 1e12, 2)}


def _median(work: Callable[[], Any], device: torch.device, runs: int = 5) -> float:
    return float(measure(work, device, runs=runs).row()["median_seconds"]) or 1e-9


def int8_step(bench: Bench) -> None:
    """A guided step at 480p, random weights: ours in int8 and bf16, plain and fused, diffusers eager and compiled."""
    _all_steps(bench, SIZES[bench.size][0], bench.runs, only=("",))


def int8_step_720p(bench: Bench) -> None:
    """The same at 720p, where a step is minutes on most cards: one run each of the fused ones and of diffusers."""
    _all_steps(bench, SIZES[bench.size][-1], 1, only=("fused", "and QK"))


def _all_steps(bench: Bench, size: Size, runs: int, only: tuple[str, ...]) -> None:
    config = bench.config.transformer
    with torch.device("meta"):
        once, ours = ContextEmbedder(config), Transformer(config)
    once.load_state_dict(random_state(once, bench), assign=True)
    ours.load_state_dict(random_state(ours, bench), assign=True)
    rows = [("wan_local plain", PLAIN_KERNELS), ("wan_local fused", KernelChoice(fused=True))]
    for name, choice in rows:
        if any(part in name for part in only):
            _steps(bench, (once.eval(), ours.eval()), (name, size, runs), choice)
    _peer_steps(bench, ours, once, size, runs)
    for linear in (part for part in ours.blocks.modules() if isinstance(part, Linear)):
        weight = quantize_weight(linear.weight.data, "int8", rotated=True)
        held = {"weight": weight.data, "weight_scale": weight.scale}
        linear.hold(held, rotated=True, arithmetic="w8a8")
    rows = [
        ("wan_local int8 linears, plain", PLAIN_KERNELS),
        ("wan_local int8 linears, fused", KernelChoice(fused=True)),
        ("wan_local int8 linears and QK", KernelChoice("int8", fused=True)),
        ("wan_local int8 linears, QK and PV", KernelChoice("int8_pv", fused=True)),
    ]
    for name, choice in rows:
        if any(part in name for part in only):
            _steps(bench, (once, ours), (name, size, runs), choice)


def _inputs(bench: Bench, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config, device = bench.config.transformer, bench.device
    grid = (geometry.latent_frames, geometry.latent_size.height, geometry.latent_size.width)
    latents = torch.randn(1, config.out_channels, *grid, device=device)
    condition = torch.randn(1, config.in_channels - config.out_channels, *grid, device=device)
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=bench.dtype)
    images = torch.randn(1, config.image_tokens, config.image_dim, device=device, dtype=bench.dtype)
    return latents, condition, text, images


def _steps(
    bench: Bench, halves: tuple[ContextEmbedder, Transformer], row: tuple[str, Size, int], choice: KernelChoice
) -> None:
    (once, ours), (who, size, runs) = halves, row
    geometry = Geometry(size, 81)
    latents, condition, text, images = _inputs(bench, geometry)
    context, modulations = once(text, images), once.modulations(torch.tensor([700]))
    chunk = chunk_tokens(ours.config, geometry.tokens, bench.dtype.itemsize)
    guided = Guided(ours, condition, modulations, context, context, 5.0, chunk_tokens=chunk, choice=choice)
    finite = []
    measured = measure(lambda: finite.append(bool(torch.isfinite(guided.predict(latents, 700)[0]).all())), bench.device,
                       runs=runs)  # fmt: skip
    check(f"{who}: predictions that are not finite", finite.count(False), 0)
    bench.report("int8_step", who=who, size=str(size), tokens=geometry.tokens, **measured.row())


def _peer_steps(bench: Bench, ours: Transformer, once: ContextEmbedder, size: Size, runs: int) -> None:
    from diffusers import WanTransformer3DModel

    config = bench.config.transformer
    with torch.device("meta"):
        peer = WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, image_dim=config.image_dim,
            added_kv_proj_dim=config.dim, pos_embed_seq_len=config.image_tokens,
        )  # fmt: skip
    state = {**ours.state_dict(), **{k: v for k, v in once.state_dict().items() if in_context(k)}}
    kept = peer._keep_in_fp32_modules
    cast = {k: v.float() if any(part in k for part in kept) else v.to(bench.dtype) for k, v in state.items()}
    peer.load_state_dict(cast, assign=True)
    peer.rope.to_empty(device=bench.device)
    peer.rope.__init__(config.attention_head_dim, config.patch_size, 1024)  # its tables are no parameters
    peer.rope.to(bench.device)
    geometry = Geometry(size, 81)
    latents, condition, text, images = _inputs(bench, geometry)
    inputs, two_rows = torch.cat((latents, condition), dim=1).to(bench.dtype), images.reshape(2, -1, config.image_dim)
    timestep = torch.tensor([700], device=bench.device)

    def both() -> None:
        for _ in range(2):
            peer(inputs, timestep, text, two_rows, return_dict=False)

    for who in ("diffusers eager", "diffusers compiled") if bench.device.type == "cuda" else ("diffusers eager",):
        if who == "diffusers compiled":
            peer.compile_repeated_blocks(fullgraph=True)
        measured = measure(both, bench.device, runs=runs)
        bench.report("int8_step", who=who, size=str(size), tokens=geometry.tokens, **measured.row())


def main(arguments: list[str]) -> None:
    what, device, size, file = arguments
    torch.set_grad_enabled(False)
    rows = {"checks": _check_rows, "speeds": _speed_rows}[what]
    Path(file).write_text(json.dumps(list(rows(torch.device(device), size))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
