"""Which launch of the table's candidates is the fastest on this card, at the 14B model's sizes.

Takes a card and a clock, gives launches by the names under which `hardware` looks them up. At 32,760 tokens it holds
2 GiB: two outputs of the widest linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wan_kernels.attention_int8 import attention_int8_triton
from wan_kernels.hardware import CANDIDATES, TileLaunch, tuned_key
from wan_kernels.language import ceil_div, launchable, triton
from wan_kernels.linear_int8 import linear_int8_triton

TOKENS, HEADS, HEAD_DIM, FFN_DIM = 32_760, 40, 128, 13_824  # 480p, 81 frames
_BOTH = 1.02  # a candidate must be this much faster than the table's first to take its place
_COMPARED = 2**22  # numbers at a time: float32 copies of whole outputs would not fit a card of 8 GB

Clock = Callable[[Callable[[], Tensor]], float]
Run = Callable[[TileLaunch], Tensor]


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate: its seconds, or None where it does not fit the card or computes something else."""

    op: str
    shape_class: str
    launch: TileLaunch
    seconds: float | None


def tune(device: torch.device, clock: Clock, *, tokens: int = TOKENS) -> Iterator[Tried]:
    """Yield every candidate of every op as it is tried, one op after the other; `chosen` makes launches of them."""
    launchable("tuning")
    for op, shape_class, make in (
        ("attention_int8", "fp16", partial(_attention, device, tokens, torch.float16)),
        ("attention_int8", "int8", partial(_attention, device, tokens, torch.int8)),
        ("linear_int8", "large", partial(_linear, device, tokens)),
    ):
        with torch.cuda.device(device):
            yield from try_each(op, shape_class, make, clock)


def try_each(op: str, shape_class: str, make: Callable[[], Run], clock: Clock) -> Iterator[Tried]:
    """Yield each candidate of one op; what differs from the table's first, which tests hold to the truth, is out.

    make: makes the op's inputs, which go with the last candidate.
    """
    first, *_ = candidates = CANDIDATES[op, shape_class]
    expected: Tensor | None = None
    with suppress(triton.runtime.errors.OutOfResources, torch.OutOfMemoryError):
        run = make()
        expected = run(first)
    for launch in candidates:
        seconds: float | None = None
        # the card has less shared memory than the candidate needs, or less of its own: it is no candidate there
        with suppress(triton.runtime.errors.OutOfResources, torch.OutOfMemoryError):
            if expected is not None and _agree(run(launch), expected):
                seconds = clock(lambda launch=launch: run(launch))  # type: ignore[misc]
        yield Tried(op, shape_class, launch, seconds)


def _agree(got: Tensor, expected: Tensor) -> bool:
    limit = 0.02 * max(abs(float(end)) for end in expected.aminmax())
    pieces = zip(got.flatten().split(_COMPARED), expected.flatten().split(_COMPARED), strict=True)
    return all(float((piece.float() - true.float()).abs().max()) <= limit for piece, true in pieces)


def chosen(tried: Sequence[Tried], device: torch.device) -> dict[str, TileLaunch]:
    """Return the fastest candidate of each op by its name; the table's first unless another is clearly faster."""
    best: dict[str, TileLaunch] = {}
    for op, shape_class in dict.fromkeys((entry.op, entry.shape_class) for entry in tried):
        times = {
            entry.launch: entry.seconds
            for entry in tried
            if (entry.op, entry.shape_class) == (op, shape_class) and entry.seconds is not None
        }
        if not times:
            continue
        first, fastest = CANDIDATES[op, shape_class][0], min(times, key=lambda launch: times[launch])
        keep = first in times and times[first] <= _BOTH * times[fastest]
        best[tuned_key(op, shape_class, device)] = first if keep else fastest
    return best


def _attention(device: torch.device, tokens: int, values: torch.dtype) -> Run:
    q = torch.randint(-127, 128, (1, HEADS, tokens, HEAD_DIM), dtype=torch.int8, device=device)
    q_scale = torch.full((1, HEADS, tokens), 0.02, device=device)
    k_scale = torch.full((1, HEADS, ceil_div(tokens, 64)), 0.02, device=device)
    statistics = torch.ones((1, HEADS, HEAD_DIM), device=device)
    if values == torch.int8:
        shape = (1, HEADS, HEAD_DIM, ceil_div(tokens, 64) * 64)
        v, mean = torch.randint(-127, 128, shape, dtype=torch.int8, device=device), statistics
        return lambda launch: attention_int8_triton(q, q_scale, q, k_scale, v, statistics, mean, torch.bfloat16, launch)
    v = torch.randn((1, tokens, HEADS, HEAD_DIM), dtype=torch.float16, device=device)
    return lambda launch: attention_int8_triton(q, q_scale, q, k_scale, v, statistics, None, torch.bfloat16, launch)


def _linear(device: torch.device, tokens: int) -> Run:
    dim = HEADS * HEAD_DIM
    a = torch.randint(-127, 128, (1, tokens, dim), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (FFN_DIM, dim), dtype=torch.int8, device=device)
    a_scale, w_scale = torch.full((1, tokens), 0.01, device=device), torch.full((FFN_DIM,), 0.01, device=device)
    return lambda launch: linear_int8_triton(a, a_scale, w, w_scale, None, False, torch.bfloat16, launch)
