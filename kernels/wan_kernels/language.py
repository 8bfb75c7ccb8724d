"""Triton where it can be imported. Where it cannot, a stand-in: every op can be imported, and its reference runs."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "KERNEL_ERRORS",
    "TRITON_LACKING",
    "TRITON_VERSION",
    "KernelUnavailable",
    "ceil_div",
    "check_float32",
    "in_spans",
    "jit",
    "launchable",
    "on_device_of",
    "power_of_two",
    "tl",
    "triton",
]

_CACHED_NUMBERS = 2**17  # half a megabyte of float32

TRITON_LACKING = ""  # why there is no Triton and what to do about it, or nothing
if importlib.util.find_spec("triton") is None:
    TRITON_LACKING = (
        "Triton is not installed (`pip install 'wan_local[kernels]'`, on Windows `pip install triton-windows`)"
    )
else:
    try:
        import triton
        import triton.errors
        import triton.language as tl
    except (ImportError, OSError) as error:  # half an install, or one for another Python, C library or driver
        TRITON_LACKING = (
            f"Triton is installed but cannot be imported ({type(error).__name__}: {error}); mend or uninstall it"
        )

HAS_TRITON = not TRITON_LACKING
if not HAS_TRITON:
    triton = tl = None


class KernelUnavailable(RuntimeError):
    """A kernel was called that cannot run here; the message says what is missing."""


# by the module: its distribution is called triton, pytorch-triton or triton-windows
TRITON_VERSION: str | None = triton.__version__ if HAS_TRITON else None

# What compiling or launching a kernel may raise where a card, its driver or Triton is not as we know them: RuntimeError
# of torch and of a missing C compiler, Triton's own, and that of the compiler it starts.
KERNEL_ERRORS: tuple[type[Exception], ...] = (RuntimeError, subprocess.SubprocessError)
if HAS_TRITON:
    KERNEL_ERRORS += (triton.errors.TritonError,)


def jit(function: Callable[..., Any]) -> Any:
    """Return `function` as a Triton kernel, or as it is where there is no Triton to run it."""
    return triton.jit(function) if HAS_TRITON else function


def launchable(op: str) -> None:
    """Raise KernelUnavailable where there is no Triton to launch `op` with."""
    if not HAS_TRITON:
        raise KernelUnavailable(
            f"{op} needs Triton on a card, and there is none: {TRITON_LACKING}. Or choose attention='sdpa' and "
            "kernels='off'."
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return the context in which Triton launches on the tensor's card: it takes the current one otherwise."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_float32(**tensors: Tensor | None) -> None:
    """Assert that scales and vectors, where given, are float32: a kernel would compute with fewer digits unseen."""
    for name, tensor in tensors.items():
        assert tensor is None or tensor.dtype == torch.float32, f"{name} is {tensor.dtype}, not float32"


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def in_spans(rows: int, columns: int) -> Iterator[slice]:
    """Yield spans of rows whose float32 numbers stay in a CPU's cache from one operation of a reference to the next."""
    step = max(1, _CACHED_NUMBERS // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is not less than `value`."""
    return 1 << (value - 1).bit_length()
