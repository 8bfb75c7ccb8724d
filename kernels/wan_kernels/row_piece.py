"""A row in registers as two pieces of powers of two: 5,120 columns are a front of 4,096 and a back of 1,024.

One block of 8,192 would spend 38 % of its instructions and registers on columns that are not there, and fewer rows
would fit a multiprocessor at once. Launches come from `hardware.split_launch`. Where one piece holds the row, BACK is 0
and the back None. The width is a constant of the compiled kernel: a piece that the row fills needs no mask.
"""

from __future__ import annotations

from wan_kernels.language import jit, tl


@jit
def columns_of(START: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the columns of a piece that begins at START; a thread reads or writes at most 8 neighbours at once.

    Left alone, int8 is written 16 at once, and what was read 8 at once goes through shared memory to get there.
    """
    return START + tl.max_contiguous(tl.arange(0, LANES), 8)


@jit
def there_of(columns, START: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which of a piece's columns a row of D has; where that is all of them, the compiler drops the mask."""
    if START + LANES <= D:
        there = tl.full((LANES,), 1, tl.int1)
    else:
        there = columns < D
    return there


@jit
def piece_of(ptr, row, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a piece of a row of ptr [M, D] as float32, 0 beyond the row; None of no pointer.

    Rows go out of the L1 cache first, so that it keeps the vectors they meet: as large as a row, and always the same.
    """
    piece = None
    if ptr is not None:
        columns = columns_of(START, LANES)
        there = there_of(columns, START, LANES, D)
        piece = tl.load(ptr + row * D + columns, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return piece


@jit
def sum_of(front, back, FRONT: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sum of a row; back may be None where BACK is 0.

    Pieces are folded onto each other first, within a thread: every sum over all threads waits at two barriers.
    """
    if BACK:
        front = tl.sum(tl.reshape(front, (FRONT // BACK, BACK)), axis=0) + back
    return tl.sum(front)


@jit
def largest_of(front, back, FRONT: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest integer of a row, folded as in `sum_of`."""
    if BACK:
        front = tl.maximum(tl.max(tl.reshape(front, (FRONT // BACK, BACK)), axis=0), back)
    return tl.max(front)
