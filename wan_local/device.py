"""The card and the machine: which device, which dtype, how many bytes are free (cgroup limits included)."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wan_local.errors import NotAvailable

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")  # lines of id:controllers:path, relative to the root that this process sees
_CGROUP_FILES = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")  # version 2, 1
_MEMINFO, _OVERCOMMIT = Path("/proc/meminfo"), Path("/proc/sys/vm/overcommit_memory")
_NEVER_OVERCOMMIT = 2
_BESIDE_TORCH_BYTES = 2**28
_CLEAR_PEAK = Path("/proc/self/clear_refs")  # writing 5 sets the peak back to what is held now


def resolve_device(name: str) -> torch.device:
    """Return the torch device of a settings name; "auto" is the first CUDA card, else the CPU.

    Raises NotAvailable where a card was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise NotAvailable(f"device {name!r} is not a torch device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise NotAvailable(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise NotAvailable(f"device {name!r} was asked for, but torch sees {count} CUDA cards here; use device='cpu'")
    return torch.device("cuda", device.index or 0)


def card_model(device: torch.device) -> str | None:
    """Return what the maker calls the card; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def card_name(device: torch.device) -> str | None:
    """Return what names a card for every process of this machine, however each counts its cards; None for a CPU."""
    if device.type != "cuda":
        return None
    return f"cuda-{torch.cuda.get_device_properties(device).uuid}"


@functools.cache
def driver_version() -> str:
    """Return the NVIDIA driver's version, or "unknown" where its tool does not tell."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what the networks compute in: float32 on a CPU (bfloat16 is slower there), bfloat16 on a card."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def free_bytes(device: torch.device) -> int:
    """Return how many bytes can still be had on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_ram_bytes()


def free_ram_bytes() -> int:
    """Return the RAM this process may still take: what the machine has free, or the rest of a cgroup if less."""
    return int(min([_machine_free_bytes(), *(_cgroup_free_bytes(folder) for folder in _cgroup_folders())]))


def _machine_free_bytes() -> int:
    """Return the free RAM; where the kernel promises no more than it has, also what it may still promise."""
    if _MEMINFO.exists():
        rows = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        kibibytes = {name: int(row.split()[0]) for name, row in rows.items()}
        free = kibibytes["MemAvailable"]
        if _read_integer(_OVERCOMMIT) == _NEVER_OVERCOMMIT:
            free = min(free, max(kibibytes["CommitLimit"] - kibibytes["Committed_AS"], 0))
        return free * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _windows_free_bytes()


def _cgroup_folders() -> list[Path]:
    """Return the folders of this process's cgroups and of all above them: each can have a limit."""
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []
    folders = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            own = root / path.lstrip("/")
            folders += [root, *(folder for folder in (own, *own.parents) if root in folder.parents)]
    return folders or [_CGROUPS, _CGROUPS / "memory"]


def _cgroup_free_bytes(folder: Path) -> float:
    """Return what may still be taken in a cgroup, its page cache included: the kernel gives that back when needed."""
    for names in _CGROUP_FILES:
        limit, used = (_read_integer(folder / name) for name in names)
        if limit is not None and used is not None:
            return max(limit - used, 0) + _cgroup_cache_bytes(folder / "memory.stat")
    return float("inf")


def _windows_free_bytes() -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "commit_limit", "commit_free", "virtual", "virtual_free", "extended")
        ]

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(min(status.free, status.commit_free))


def _cgroup_cache_bytes(stat: Path) -> int:
    if not stat.exists():
        return 0
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return int(rows.get("inactive_file", 0))


def _read_integer(file: Path) -> int | None:
    """Return the number in a file of the kernel's; None where there is no such file or it says `max`."""
    if not file.exists():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdigit() else None


def trim_ram() -> None:
    """Let the C library give freed memory back to the system, where it is one that keeps it (glibc)."""
    if sys.platform == "linux":
        trim = getattr(_c_library(), "malloc_trim", None)
        if trim is not None:
            trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@contextmanager
def capped(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Let torch take no more than `limit_bytes` of a card in this block; no limit for None or off a card.

    What would go beyond is an error of torch that the run's ladder knows, also where a driver would use RAM instead.
    What the driver itself holds for a process, its context, is not counted.
    """
    if limit_bytes is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    before: float = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(before, limit_bytes / total), device)
    try:
        yield
    finally:
        # a card that has failed refuses this, too; what is raised already says how to go on with the run
        with suppress(RuntimeError):
            torch.cuda.set_per_process_memory_fraction(before, device)


def spill_bytes(device: torch.device) -> int | None:
    """Return how much torch may take of a card whose driver would then use RAM, silently and many times slower.

    It is what is free but for what cuBLAS, cuDNN and the kernels' code take beside torch: 256 MiB or a twentieth, the
    larger. None where a driver says instead that memory ran out: everywhere but on Windows, and on Linux inside it.
    """
    if device.type != "cuda" or not _on_windows_driver():
        return None
    free = free_bytes(device)
    return max(free - max(_BESIDE_TORCH_BYTES, free // 20), 0)


def _on_windows_driver() -> bool:
    """Tell whether cards belong to Windows' driver, as they also do in WSL, whose kernel has its maker's name."""
    return sys.platform == "win32" or "microsoft" in platform.uname().release.lower()


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement for `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_PEAK.exists() and os.access(_CLEAR_PEAK, os.W_OK):
        _CLEAR_PEAK.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes held since `reset_peak`: the allocator's on a card, the process's resident set on a CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM:")


def held_bytes(device: torch.device) -> int | None:
    """Return the bytes held now, counted as `peak_bytes` counts them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS:")


def own_ram_bytes() -> int:
    """Return the RAM that this process holds and cannot give back: all but mapped files. 0 where no system tells."""
    return _of_process("RssAnon:") or 0


def _of_process(row: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    rows = [line.split() for line in status.read_text().splitlines() if line.startswith(row)]
    return int(rows[0][1]) * 1024 if rows else None
