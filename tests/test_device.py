from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wan_local import device
from wan_local.device import (
    capped,
    compute_dtype,
    free_bytes,
    free_ram_bytes,
    held_bytes,
    own_ram_bytes,
    peak_bytes,
    reset_peak,
    resolve_device,
    trim_ram,
)
from wan_local.errors import NotAvailable

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


def test_auto_is_the_first_card_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda:0")


def test_a_card_named_is_that_card_and_one_beyond_the_last_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(NotAvailable, match="torch sees 2 CUDA cards"):
        resolve_device("cuda:2")


def test_a_cpu_computes_in_float32_and_a_card_in_bfloat16() -> None:
    assert compute_dtype(CPU) == torch.float32
    assert compute_dtype(torch.device("cuda:0")) == torch.bfloat16


def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> Path:
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(device, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def limit(folder: Path, most: str, used: int, names: tuple[str, str] = ("memory.max", "memory.current")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")


def test_a_cgroup_limit_counts_as_the_machines_with_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cgroups(tmp_path, monkeypatch, "0::/")
    limit(folder, str(300 * 2**20), 100 * 2**20)
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {50 * 2**20}\n")
    assert free_ram_bytes() == free_bytes(CPU) == 250 * 2**20
    limit(folder, "max", 100 * 2**20)
    assert free_ram_bytes() > 250 * 2**20


def test_the_nearest_limit_of_all_cgroups_above_a_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `systemd-run -p MemoryMax=` sets it, far below the root."""
    folder = cgroups(tmp_path, monkeypatch, "0::/user.slice/job.scope")
    limit(folder / "user.slice" / "job.scope", "max", 2**20)
    limit(folder / "user.slice", str(200 * 2**20), 150 * 2**20)
    limit(folder, str(300 * 2**20), 160 * 2**20)
    assert free_ram_bytes() == 50 * 2**20


def test_a_limit_of_the_older_cgroups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cgroups(tmp_path, monkeypatch, "4:memory:/job")
    limit(folder / "memory" / "job", str(80 * 2**20), 2**20, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert free_ram_bytes() == 79 * 2**20


def test_where_the_kernel_promises_no_more_than_it_has_its_promises_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroups(tmp_path, monkeypatch, "0::/")
    rows = "MemTotal: 9000 kB\nMemAvailable: 8000 kB\nCommitLimit: 5000 kB\nCommitted_AS: 4000 kB\n"
    for name, text in (("_MEMINFO", rows), ("_OVERCOMMIT", "0\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(device, name, tmp_path / name)
    assert free_ram_bytes() == 8000 * 1024
    (tmp_path / "_OVERCOMMIT").write_text("2\n")
    assert free_ram_bytes() == 1000 * 1024


def test_peak_counts_what_was_held_and_given_back() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    if before is None:
        pytest.skip("this system does not tell a process's peak")
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    del block
    after = peak_bytes(CPU)
    assert after is not None and after - before > 150 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_in_small_pieces_goes_back_to_the_system() -> None:
    """Pieces below the size from which the C library maps memory anew; every other one is freed."""
    blocks = [torch.ones(2**16, dtype=torch.uint8) for _ in range(3000)]
    full = held_bytes(CPU)
    if full is None:
        pytest.skip("this system does not tell what a process holds")
    del blocks[::2]
    trim_ram()
    left = held_bytes(CPU)
    assert left is not None and full - left > 60 * 2**20


def test_a_cap_holds_torch_to_its_share_of_the_card_and_gives_back_what_was_set_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, fraction = torch.device("cuda:0"), [0.9]

    class Properties:
        total_memory = 8 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fraction.append(share))
    with capped(card, 2 * 2**30):
        assert fraction[-1] == 0.25
    with suppress(RuntimeError), capped(card, 2 * 2**30):
        raise RuntimeError
    assert fraction[-1] == 0.9
    with capped(card, 32 * 2**30):
        assert fraction[-1] == 0.9
    with capped(card, None), capped(CPU, 2**30):
        assert fraction == [0.9, *(0.25, 0.9) * 2, 0.9, 0.9]


def test_a_card_that_failed_does_not_replace_the_error_that_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later call on such a card fails, the one that gives the limit back among them."""
    fraction = [1.0]

    def set_fraction(share: float, _: torch.device) -> None:
        if len(fraction) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        fraction.append(share)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction[0])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    failed = RuntimeError("CUDA error: unspecified launch failure")
    failed.add_note("go on with `wan-local resume`")
    with pytest.raises(RuntimeError, match="unspecified launch failure") as caught, capped(CARD, 2**30):
        raise failed
    assert fraction == [1.0, 0.125] and caught.value.__notes__ == ["go on with `wan-local resume`"]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system is asked")
def test_what_this_process_holds_is_what_it_cannot_give_back() -> None:
    """Kernels count pages roughly."""
    before = own_ram_bytes()
    held = bytearray(b"x") * 2**28
    assert before > 2**25 and len(held) / 2 < own_ram_bytes() - before < 2 * len(held)
