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

# What a multiprocessor holds at once, by CUDA's table of compute capabilities: warps, programs, KiB of shared memory
_HELD = {86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 120: (48, 24, 100)}
_REGISTERS, _REGISTERS_AT_ONCE = 65_536, 8  # of a multiprocessor; given to a thread
_EDGE = 512  # of the largest tile; the widths of heads are less, those of rows are more
_SHARED_OF_EACH = 1024  # bytes of shared memory that every program takes besides its own


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
    """What came out: bytes of shared memory, warps, registers of a thread, and the code as Triton's IR and SASS."""

    arch: int
    shared: int
    num_warps: int
    registers: int
    ttir: str
    sass: str

    @property
    def programs_at_once(self) -> int:
        """How many programs a multiprocessor holds at once."""
        warps, programs, kibibytes = _HELD[self.arch]
        given = -(-self.registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE * 32 * self.num_warps
        shared = 1024 * kibibytes // (self.shared + _SHARED_OF_EACH)
        return min(_REGISTERS // given, warps // self.num_warps, programs, shared)

    @property
    def issued(self) -> int:
        """Instructions of all warps of a program, where none is in a loop."""
        return self.num_warps * sum("NOP" not in text for _, text in self._code)

    @property
    def _code(self) -> list[tuple[int, str]]:
        return [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*;)", self.sass)]

    @property
    def hot_loop(self) -> str:
        """The loop with the most tensor-core instructions: from the target of a backward jump to the jump."""
        code = self._code
        jumps = [(at, int(m[1], 16)) for at, text in code if (m := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text))]
        loops = [[text for at, text in code if target <= at <= jump] for jump, target in jumps if target < jump]
        return "\n".join(max(loops, key=lambda loop: sum(map(_is_mma, loop)), default=[]))

    @property
    def narrow_products(self) -> list[str]:
        """Products of 32 bits, as in Triton's IR, of two sizes: no factor is a constant as small as a tile's edge."""
        small = {
            m[1] for m in re.finditer(r"(%\S+) = arith\.constant (?:dense<)?(\d+)\b", self.ttir) if int(m[2]) <= _EDGE
        }
        products = re.finditer(r"arith\.muli (%[\w#]+), (%[\w#]+) (?:overflow\S* )?: \S*i32\b.*", self.ttir)
        return [m[0] for m in products if m[1] not in small and m[2] not in small]

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
    registers = re.search(r"REG:(\d+)", _dumped(done.asm["cubin"], "-res-usage"))
    assert registers, "cuobjdump does not tell the registers"
    sass = _dumped(done.asm["cubin"], "-sass")
    return Compiled(arch, done.metadata.shared, done.metadata.num_warps, int(registers[1]), done.asm["ttir"], sass)


def _dumped(cubin: bytes, what: str) -> str:
    """Return the SASS, each instruction with its address, or what else the disassembler of Triton tells."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def _scalar_type(value: object) -> str:
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
