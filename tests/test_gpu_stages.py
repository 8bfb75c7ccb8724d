"""The stages of `bench/gpu.py` that need a card, as far as they can be tried without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_offload, gpu_whole_run
from bench.gpu_stage import Bench

BENCH = Bench(torch.device("cpu"), "small", 1)


@pytest.mark.parametrize("kind", [NameError, ImportError, NotImplementedError])
def test_a_way_of_diffusers_that_lacks_a_package_is_a_row_and_keeps_no_other_from_being_tried(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without accelerate its group offload names a function that it did not import."""
    rows: list[dict[str, Any]] = []

    def peer(*_: object) -> None:
        raise kind("name 'send_to_device' is not defined")

    monkeypatch.setattr(Bench, "report", lambda self, stage, **row: rows.append(row))
    monkeypatch.setattr(gpu_offload, "_ours", lambda *_: None)
    monkeypatch.setattr(gpu_offload, "_peer", peer)
    gpu_offload.offload(BENCH)
    assert [row["who"] for row in rows] == [way.describe() for way in gpu_offload._WAYS]
    assert all("send_to_device" in row["failed"] for row in rows)


def test_ram_is_told_by_stage_also_where_an_earlier_one_held_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([7, 9, 2, 5, 3, 4, 8, 1])
    monkeypatch.setattr(gpu_whole_run, "anonymous_bytes", lambda: next(held))
    resident = gpu_whole_run.Resident()
    resident.sample()
    assert resident.worked("text") == 9
    resident.sample()
    assert resident.worked("denoise") == 5
    assert resident.worked("text") == 9  # asked again after less
    assert resident.worked("denoise") == 5
    resident.sample()
    assert resident.worked("decode") == 8
    assert resident.most == 9 and resident.by_stage == {"text": 9, "denoise": 5, "decode": 8}
