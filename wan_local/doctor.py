"""What this machine can compute with, and how well: attention backends with reasons, every kernel's check and speed.

On a card each kernel is timed against a ceiling measured in the same minute: a copy for what memory bounds, torch's
int8 product for what tensor cores bound. On a CPU the kernels' references are checked and nothing is timed.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_kernels import HAS_TRITON, TRITON_LACKING, TRITON_VERSION, checks, tuning
from wan_kernels.hardware import save_tuned, tuned_problem
from wan_kernels.language import KERNEL_ERRORS
from wan_local import __version__
from wan_local.attention import BACKENDS, card_of, choose, numbers_of, sdpa
from wan_local.device import driver_version, free_bytes
from wan_local.errors import NotAvailable
from wan_local.probe import problem_of, sources_hash
from wan_local.settings import AttentionName, Settings

_HEAD_DIM = 128  # of the 14B model
_RUNS = 10
_RUN_SECONDS = 0.005  # of work that is shorter than a launch takes, several executions make a run
_MOST_IN_A_RUN = 50
_COPY_BYTES = 2**29
_BYTES_A_TOKEN = 160_000  # that the largest case holds while its inputs are made
_BLACKWELL, _TRITON_FOR_BLACKWELL = 12, (3, 7)
_PRODUCT = (8192, 5120, 5120)  # rows, outputs, inputs of the products that are the ceilings
_COPY, _INT8_PRODUCT = "torch copy", "torch int8 product"
_BF16_PRODUCT, _ATTENTION = "torch bfloat16 product", "torch attention"


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One row of the table: whether a backend runs here, and why or why not; `chosen`: it is what `auto` takes."""

    name: AttentionName
    runs: bool
    reason: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel: its error in units of what is allowed, and on a card its time and the share of its ceiling.

    `problem`: what it failed with, if it gave no numbers at all; its error is NaN then. `of_torch`: it is none of ours
    but what they are measured against, and `amount` is its bytes or operations a second.
    """

    name: str
    error: float
    milliseconds: float | None = None
    rate: str = ""
    share: float | None = None
    problem: str = ""
    of_torch: bool = False
    amount: float = math.nan


def backend_reports(device: torch.device, settings: Settings) -> list[BackendReport]:
    """Return the table of attention backends; a backend that was never tried on this card is tried now."""

    def broken(name: AttentionName) -> str:
        return problem_of(name, device)

    card = card_of(device)
    fused = "auto" if settings.kernels == "on" else settings.kernels  # the table says why where "on" is refused
    chosen = choose("auto", fused, card, _HEAD_DIM, broken=broken)
    reports = []
    for backend in BACKENDS.values():
        problem = backend.lacking(card, _HEAD_DIM) or broken(backend.name)
        reason = problem or backend.purpose
        reports.append(BackendReport(backend.name, not problem, reason, backend.name == chosen.attention))
    return reports


def kernel_reports(device: torch.device) -> Iterator[KernelReport]:
    """Yield each kernel's report: at the 14B model's widths on a card, at a small size on a CPU.

    One that fails to compile or to run is reported with its message, and the others are checked all the same.
    """
    if device.type != "cuda":
        for case in checks.cases(device, checks.SMALL, torch.float32):
            yield KernelReport(case.name, checks.judge(case).error)
        return
    ceilings = list(measure_ceilings(device))
    yield from ceilings
    rates = {report.name: report.amount for report in ceilings}
    of_checks, of_timing = checks.cases(device, checks.REAL), checks.cases(device, _timed_size(device))
    for case, timed in zip(of_checks, of_timing, strict=True):
        try:
            verdict = checks.judge(case)
            yield _timed(timed, verdict.error, rates, device) if verdict.right else KernelReport(*astuple(verdict))
        except KERNEL_ERRORS as error:
            yield KernelReport(case.name, math.nan, problem=f"{type(error).__name__}: {str(error).strip()[-300:]}")


def _timed_size(device: torch.device) -> checks.Size:
    """Return the size at which kernels are timed: a 480p video's, or what half of the free memory holds."""
    tokens = free_bytes(device) // 2 // _BYTES_A_TOKEN
    return replace(checks.TIMED, tokens=max(checks.REAL.tokens, min(checks.TIMED.tokens, tokens)))


def _timed(case: checks.Case, error: float, ceilings: Mapping[str, float], device: torch.device) -> KernelReport:
    seconds = median_seconds(case.timed, device)
    if case.products:
        amount, ceiling = 2 * case.products / seconds, ceilings[_INT8_PRODUCT]
        return KernelReport(case.name, error, seconds * 1e3, f"{amount / 1e12:.1f} TOPS", amount / ceiling)
    amount = case.moved_bytes / seconds
    return KernelReport(case.name, error, seconds * 1e3, f"{amount / 1e9:.0f} GB/s", amount / ceilings[_COPY])


def measure_ceilings(device: torch.device) -> Iterator[KernelReport]:
    """Yield what torch reaches on a card: a copy, products of int8 and of bfloat16, and exact attention."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows, outputs, inputs = _PRODUCT
    a, b = (torch.ones((n, inputs), dtype=torch.int8, device=device) for n in (rows, outputs))
    x, w = (torch.ones((n, inputs), dtype=torch.bfloat16, device=device) for n in (rows, outputs))
    tokens, heads = rows, inputs // _HEAD_DIM
    q = torch.randn((1, tokens, heads, _HEAD_DIM), dtype=torch.bfloat16, device=device)
    product = 2 * rows * outputs * inputs
    for name, amount, unit, work in (
        (_COPY, 2 * _COPY_BYTES, "GB/s", lambda: target.copy_(source)),
        (_INT8_PRODUCT, product, "TOPS", lambda: torch._int_mm(a, b.t())),
        (_BF16_PRODUCT, product, "TOPS", lambda: torch.nn.functional.linear(x, w)),
        (_ATTENTION, 4 * tokens**2 * inputs, "TOPS", lambda: sdpa(q, q, q)),
    ):
        try:
            seconds = median_seconds(work, device)
        except RuntimeError as error:  # a library that has no such product for this card
            yield KernelReport(name, math.nan, problem=str(error).strip()[-300:], of_torch=True)
            continue
        shown = f"{amount / seconds / 1e9:.0f} GB/s" if unit == "GB/s" else f"{amount / seconds / 1e12:.1f} TOPS"
        yield KernelReport(name, 0.0, seconds * 1e3, shown, of_torch=True, amount=amount / seconds)


def median_seconds(work: Callable[[], object], device: torch.device, runs: int = _RUNS) -> float:
    """Return the median seconds of `work` over `runs` runs; see `run_seconds`."""
    median: float = statistics.median(run_seconds(work, device, runs))
    return median


def run_seconds(work: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Return the seconds of one execution of `work` in each of `runs` runs, on a card by its own clock.

    Two executions come first, to warm up. Short work is done several times in a run, so that the card does not wait for
    the next launch while it is timed.
    """
    _clocked(work, device, 1)
    first = _clocked(work, device, 1)
    times = max(1, min(_MOST_IN_A_RUN, int(_RUN_SECONDS / max(first, 1e-9))))
    return [_clocked(work, device, times) for _ in range(runs)]


def _clocked(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the mean seconds of `times` executions in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def launches_tried(device: torch.device) -> Iterator[tuning.Tried]:
    """Yield each launch of each kernel as it is tried on a card. Raises NotAvailable where there is none."""
    if device.type != "cuda":
        raise NotAvailable("tuning needs a card: on a CPU the kernels' references run, and they have nothing to tune")
    if not HAS_TRITON:
        raise NotAvailable(f"tuning needs Triton, and there is none: {TRITON_LACKING}")
    return tuning.tune(device, lambda work: median_seconds(work, device), tokens=_timed_size(device).tokens)


def remember_launches(tried: Sequence[tuning.Tried], device: torch.device) -> Path:
    """Keep the fastest launches for this card and Triton, and return the file."""
    return save_tuned(tuning.chosen(tried, device))


def launches_problem() -> str:
    """Return why the launches that were tuned here are not used, or nothing."""
    return tuned_problem()


def triton_problem(device: torch.device) -> str:
    """Return what this Triton compiles worse for this card than a later one does, or nothing."""
    late_enough = TRITON_VERSION is None or numbers_of(TRITON_VERSION) >= _TRITON_FOR_BLACKWELL
    if late_enough or card_of(device).capability[0] != _BLACKWELL:
        return ""
    return f"{TRITON_VERSION} makes int8 linears of half as many instructions again for this card as 3.7 does"


def world(device: torch.device) -> dict[str, Any]:
    """Return what a measurement holds for: package, device, driver, versions and a hash of the kernels."""
    card = card_of(device)
    return {
        "wan_local": __version__,
        "device": card.name,
        "capability": f"sm_{card.capability[0]}{card.capability[1]}" if device.type == "cuda" else None,
        "driver": driver_version() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": TRITON_VERSION,
        "kernels": sources_hash(),
    }


def line_to_paste(device: torch.device, reports: list[KernelReport]) -> str:
    """Return all of it in one line of JSON, for an issue or `bench/results/doctor.jsonl`."""
    kernels = {
        report.name: {"error": None if math.isnan(report.error) else round(report.error, 4), "rate": report.rate,
                      "ms": _rounded(report.milliseconds, 4), "share": _rounded(report.share, 3),
                      **({"problem": report.problem} if report.problem else {})}
        for report in reports
    }  # fmt: skip
    return json.dumps({"world": world(device), "kernels": kernels})


def _rounded(number: float | None, digits: int) -> float | None:
    """Return what JSON can say: None for what was not measured."""
    return None if number is None or math.isnan(number) else round(number, digits)
