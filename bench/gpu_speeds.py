"""How fast the kernels are beside torch's, by the card's own clock: what matters most first, until the time is spent.

Takes a device; gives rows. A row's numbers are checked against the reference at the very shape that is timed.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_kernels import attention_int8, checks, linear_int8, tuning
from wan_kernels.attention_int8 import attention_int8_reference
from wan_kernels.hardware import save_tuned, table_launch, tuned_key
from wan_kernels.language import KERNEL_ERRORS
from wan_kernels.linear_int8 import linear_int8_reference
from wan_local.doctor import run_seconds

TOKENS = {"full": (32_760, 75_600), "small": (300,)}  # 480p and 720p, 81 frames
_RUNS = 3
_COPY_BYTES = {"full": 2**30, "small": 2**20}
_CONSUMER = 86  # whose launches the consumer path takes
_LOOKED_AT = 128  # rows that are held to the reference, the last ones: their offsets are the largest
_LIMIT = 1e-2  # their relative rms: one rounding to bfloat16 is 2e-3, fp16 sums within a block a little more

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """One thing to time: `prepare` makes its inputs and returns the work; `rate` makes a row's numbers of seconds."""

    row: Row
    prepare: Callable[[], Callable[[], object]]
    rate: Callable[[float], Row]
    wrong: Callable[[object], float] | None = None  # distance of what the work gave from the truth


def speed_rows(device: torch.device, size: str, path: str, budget: float) -> Iterator[Row]:
    """Yield rows until `budget` seconds are spent; what is left is named, and so is what failed."""
    started = time.perf_counter()
    if path == "consumer":
        _launch_as_consumer_cards_do(device)
    copy = _copy_rate(device, size)
    yield {"op": "copy", "gigabytes_a_second": round(copy / 1e9, 1)}
    for timing in _timings(device, size, path, copy):
        if time.perf_counter() - started > budget:
            yield {**timing.row, "skipped": f"{budget:.0f} s were spent before it"}
            continue
        try:
            yield _timed(timing, device)
        except KERNEL_ERRORS:
            yield {**timing.row, "failed": traceback.format_exc()[-1500:]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cuda":
        yield from _launches(device, started, budget)


def _launches(device: torch.device, started: float, budget: float) -> Iterator[Row]:
    """Yield the milliseconds of every launch that tuning may choose, as long as there is time."""
    tried = tuning.tune(device, lambda work: statistics.median(run_seconds(work, device, _RUNS)))
    while time.perf_counter() - started < budget:
        entry = next(tried, None)
        if entry is None:
            return
        took = None if entry.seconds is None else round(entry.seconds * 1e3, 4)
        op = f"tune {entry.op} {entry.shape_class}"
        yield {"op": op, "launch": list(astuple(entry.launch)), "milliseconds": took}
    yield {"op": "tune", "skipped": f"{budget:.0f} s were spent before its end"}


def _launch_as_consumer_cards_do(device: torch.device) -> None:
    """Put the launches of consumer cards where tuned ones are kept; the home folder is the bench's own."""
    shapes = (("linear_int8", "large"), ("attention_int8", "fp16"), ("attention_int8", "int8"))
    save_tuned({tuned_key(op, of, device): table_launch(op, of, _CONSUMER) for op, of in shapes})


def _timings(device: torch.device, size: str, path: str, copy: float) -> Iterator[Timing]:
    at, dtype = checks.REAL if size == "full" else checks.SMALL, _dtype(device)
    for place, tokens in enumerate(TOKENS[size]):
        yield from _attentions(device, tokens, at, ours_alone=path == "consumer")
        yield from _linears(device, tokens, at, ours_alone=path == "consumer")
        if place == 0 and path == "own":  # what multiplies nothing is the same code on both
            timed = checks.TIMED if size == "full" else checks.SMALL
            for group in checks.GROUPS:
                of_group = checks.cases(device, timed, dtype, group=group)
                yield from (_fusion(case, timed.tokens, copy) for case in of_group if case.products == 0)


def _timed(timing: Timing, device: torch.device) -> Row:
    work = timing.prepare()
    got = work()
    if timing.wrong is not None:
        error = timing.wrong(got)
        if not error <= 1:
            return {**timing.row, "failed": f"not timed: {error:.3g} of what is allowed"}
        timing.row["error"] = round(error, 4)
    del got
    seconds = run_seconds(work, device, _RUNS)
    spread = [round(min(seconds) * 1e3, 4), round(max(seconds) * 1e3, 4)]
    median = statistics.median(seconds)
    return {**timing.row, "milliseconds": round(median * 1e3, 4), "spread": spread, "n": len(seconds),
            **timing.rate(median)}  # fmt: skip


def _copy_rate(device: torch.device, size: str) -> float:
    target, source = (torch.empty(_COPY_BYTES[size], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / statistics.median(run_seconds(lambda: target.copy_(source), device, _RUNS))


def _fusion(case: checks.Case, tokens: int, copy: float) -> Timing:
    def rate(seconds: float) -> Row:
        moved = case.moved_bytes / seconds
        return {"gigabytes_a_second": round(moved / 1e9, 1), "share_of_copy": round(moved / copy, 3)}

    return Timing({"op": case.name, "tokens": tokens}, lambda: case.timed, rate, lambda _: checks.judge(case).error)


def _attentions(device: torch.device, tokens: int, at: checks.Size, *, ours_alone: bool) -> Iterator[Timing]:
    """Yield int8 attention with fp16 and with int8 values, and torch's fused ones, at a video's length."""
    heads, head_dim, dtype = at.heads, at.head_dim, _dtype(device)
    blocks = -(-tokens // 64)

    def floats() -> tuple[Tensor, ...]:
        """Return operands of [B, H, L, K] that lie as [B, L, H, K], as they come out of linears."""
        return tuple(torch.randn((1, tokens, heads, head_dim), device=device, dtype=dtype).transpose(1, 2)
                     for _ in range(3))  # fmt: skip

    def operands(values: str) -> tuple[Any, ...]:
        q, k = (torch.randint(-127, 128, (1, heads, tokens, head_dim), dtype=torch.int8, device=device)
                for _ in range(2))  # fmt: skip
        # logits of deviation 1.2: each query sees many keys
        q_scale = torch.full((1, heads, tokens), 0.016, device=device)
        k_scale = torch.full((1, heads, blocks), 0.0142, device=device)
        channels = torch.ones((1, heads, head_dim), device=device)
        if values == "fp16":
            v = torch.randn((1, tokens, heads, head_dim), device=device, dtype=torch.float16) + 1
            return q, q_scale, k, k_scale, v, channels, None
        v = torch.randint(-127, 128, (1, heads, head_dim, blocks * 64), dtype=torch.int8, device=device)
        v[..., tokens:] = 0
        return q, q_scale, k, k_scale, v, channels / 64, channels

    def rate(seconds: float) -> Row:
        return {"tera_a_second": round(4 * tokens**2 * heads * head_dim / seconds / 1e12, 1)}

    def ours(values: str) -> Timing:
        held: list[Any] = []

        def prepare() -> Callable[[], object]:
            held.extend(operands(values))
            return lambda: attention_int8(*held, dtype)

        def wrong(got: object) -> float:
            assert isinstance(got, Tensor)
            q, q_scale, *rest = held
            last = (q[:, :, -_LOOKED_AT:].contiguous(), q_scale[:, :, -_LOOKED_AT:].contiguous())
            return _distance(got[:, -_LOOKED_AT:], attention_int8_reference(*last, *rest, torch.float64))

        row = {"op": f"attention_int8, {values} values", "shape": [tokens, heads, head_dim]}
        return Timing(row, prepare, rate, wrong)

    yield from (ours(values) for values in ("fp16", "int8"))
    if ours_alone or device.type != "cuda":
        return
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"torch sdpa, {backend.name.split('_')[0].lower()}"
        yield Timing({"op": name, "shape": [tokens, heads, head_dim]}, lambda b=backend: _sdpa(floats(), b), rate)


def _sdpa(operands: tuple[Tensor, ...], backend: SDPBackend) -> Callable[[], object]:
    def work() -> object:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*operands)

    return work


def _linears(device: torch.device, tokens: int, at: checks.Size, *, ours_alone: bool) -> Iterator[Timing]:
    """Yield the three shapes of a block's linears: ours, torch's int8 product, and the compute dtype's."""
    dtype = _dtype(device)
    for outputs, inputs in ((at.dim, at.dim), (at.ffn_dim, at.dim), (at.dim, at.ffn_dim)):
        shape = {"shape": [tokens, outputs, inputs]}

        def integers(rows: int, columns: int = inputs) -> Tensor:
            return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)

        def rate(seconds: float, work: int = 2 * tokens * outputs * inputs) -> Row:
            return {"tera_a_second": round(work / seconds / 1e12, 1)}

        yield _our_linear(device, (tokens, outputs, inputs), rate)
        if ours_alone:
            continue

        def product(rows: int = tokens, columns: int = outputs, make: Callable[[int], Tensor] = integers) -> Any:
            a, w = make(rows), make(columns)
            return lambda: torch._int_mm(a, w.t())

        def plain(rows: int = tokens, columns: int = outputs, make: Callable[[int], Tensor] = integers) -> Any:
            x, w = make(rows).to(dtype), make(columns).to(dtype)
            return lambda: torch.nn.functional.linear(x, w)

        yield Timing({"op": "torch._int_mm", **shape}, product, rate)
        yield Timing({"op": f"torch {str(dtype).removeprefix('torch.')}", **shape}, plain, rate)


def _our_linear(device: torch.device, shape: tuple[int, int, int], rate: Callable[[float], Row]) -> Timing:
    (tokens, outputs, inputs), dtype = shape, _dtype(device)
    held: list[Tensor] = []

    def prepare() -> Callable[[], object]:
        held.append(torch.randint(-127, 128, (1, tokens, inputs), dtype=torch.int8, device=device))
        held.append(torch.rand(1, tokens, device=device))
        held.append(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device))
        held.append(torch.rand(outputs, device=device))
        held.append(torch.randn(outputs, device=device, dtype=dtype))
        return lambda: linear_int8(*held, False, dtype)

    def wrong(got: object) -> float:
        assert isinstance(got, Tensor)
        a, a_scale, *rest = held
        last = (a[:, -_LOOKED_AT:].contiguous(), a_scale[:, -_LOOKED_AT:].contiguous())
        return _distance(got[:, -_LOOKED_AT:], linear_int8_reference(*last, *rest, False, torch.float64))

    return Timing({"op": "linear_int8", "shape": list(shape)}, prepare, rate, wrong)


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm()) / _LIMIT


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
