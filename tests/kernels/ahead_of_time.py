"""Compile what a launcher would launch, for any card and without one: Triton's compiler and ptxas run on a CPU.

A launcher is called with tensors on `meta` at the 14B model's sizes while a recorder stands in for its kernel; what the
recorder saw is compiled for each architecture and disassembled. The interpreter must be off: run in a process of its
own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


@dataclass
class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    kernel: Any
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**31 for size in grid) and all(size < 2**16 for size in grid[1:]), grid
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


@contextmanager
def recorded(module: Any, kernel: str) -> Iterator[Recorder]:
    """Put a recorder in the place of `module.kernel`."""
    recorder = Recorder(getattr(module, kernel))
    setattr(module, kernel, recorder)
    try:
        yield recorder
    finally:
        setattr(module, kernel, recorder.kernel)


@dataclass(frozen=True)
class Compiled:
    """What came out: bytes of shared memory, and the code as PTX and SASS."""

    shared: int
    ptx: str
    sass: str

    @property
    def hot_loop(self) -> str:
        """The loop with the most tensor-core instructions: from the target of a backward jump to the jump."""
        code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*;)", self.sass)]
        jumps = [(at, int(m[1], 16)) for at, text in code if (m := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text))]
        loops = [[text for at, text in code if target <= at <= jump] for jump, target in jumps if target < jump]
        return "\n".join(max(loops, key=lambda loop: sum(map(_is_mma, loop)), default=[]))

    def count(self, pattern: str, where: str | None = None) -> int:
        return len(re.findall(rf"\b{pattern}", self.sass if where is None else where))


def _is_mma(line: str) -> bool:
    return re.search(r"\b(IMMA|HMMA|IGMMA|HGMMA|QMMA)\b", line) is not None


def compile_launch(recorder: Recorder, arch: int, launch: int = -1) -> Compiled:
    """Compile a recorded launch for sm_`arch` as the run-time would specialise it."""
    args, kwargs = recorder.launches[launch]
    kernel = recorder.kernel
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in _OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _TYPES[value.dtype] if isinstance(value, torch.Tensor) else _scalar_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(done.metadata.shared, done.asm["ptx"], _disassembled(done.asm["cubin"]))


def _disassembled(cubin: bytes) -> str:
    """Return the SASS, each instruction with its address, by the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _scalar_type(value: object) -> str:
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
