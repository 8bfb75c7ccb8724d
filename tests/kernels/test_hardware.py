"""Launches: a static table, what tuning found on one card stays on that card, and the first choice wins ties."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.live_bytes import live_bytes
from wan_kernels import hardware, tuning
from wan_kernels.hardware import (
    CANDIDATES,
    TUNED,
    TileLaunch,
    row_launch,
    save_tuned,
    split_launch,
    table_launch,
    tile_launch,
    tuned_problem,
)
from wan_kernels.language import HAS_TRITON
from wan_kernels.tuning import Tried, chosen, try_each
from wan_local.cli import main
from wan_local.doctor import launches_tried
from wan_local.errors import NotAvailable

CARD = torch.device("cuda:0")
OTHER = CANDIDATES["linear_int8", "large"][1]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A 4090 that is not there, and an empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4090", multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    hardware._tuned.cache_clear()
    return tmp_path


def test_rows_get_a_power_of_two_and_warps_by_width() -> None:
    assert [row_launch(width).block for width in (1, 128, 5120, 13_824)] == [64, 128, 8192, 16_384]
    assert [row_launch(width).num_warps for width in (128, 5120, 13_824)] == [1, 8, 16]


def test_rows_in_two_pieces_leave_few_lanes_out() -> None:
    def launch(width: int) -> tuple[int, int, int]:
        split = split_launch(width)
        return split.front, split.back, split.num_warps

    assert [launch(width) for width in (1, 64, 65, 128)] == [(64, 0, 1), (64, 0, 1), (128, 0, 1), (128, 0, 1)]
    assert [launch(width) for width in (1280, 1536, 5120)] == [(1024, 256, 1), (1024, 512, 2), (4096, 1024, 4)]
    assert [launch(width) for width in (4096, 13_824)] == [(4096, 0, 4), (16_384, 0, 16)]
    for width in range(1, 6000):
        front, back, _ = launch(width)
        assert front + back >= width and (back == 0 or back < front <= width)
        assert width < 128 or front + back < 1.5 * width


def test_a_card_without_a_line_of_its_own_takes_the_first_candidate() -> None:
    assert table_launch("linear_int8", "large", 89) == CANDIDATES["linear_int8", "large"][0]
    assert table_launch("linear_int8", "large", 90) != CANDIDATES["linear_int8", "large"][0]


@pytest.mark.skipif(not HAS_TRITON, reason="a launch is kept by Triton's version")
def test_what_was_tuned_is_used_on_that_card_alone(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_launch("linear_int8", "large", CARD) == CANDIDATES["linear_int8", "large"][0]
    file = save_tuned({hardware.tuned_key("linear_int8", "large", CARD): OTHER})
    assert file == card / TUNED and len(json.loads(file.read_text())) == 1
    assert tile_launch("linear_int8", "large", CARD) == OTHER
    assert tile_launch("attention_int8", "fp16", CARD) == CANDIDATES["attention_int8", "fp16"][0]
    smaller = SimpleNamespace(name="NVIDIA GeForce RTX 4060", multi_processor_count=24)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: smaller)
    assert tile_launch("linear_int8", "large", CARD) == CANDIDATES["linear_int8", "large"][0]


@pytest.mark.usefixtures("card")
def test_what_was_tuned_for_another_kernel_or_is_no_candidate_any_more_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, key = CANDIDATES["linear_int8", "large"][0], hardware.tuned_key("linear_int8", "large", CARD)
    save_tuned({key: OTHER, hardware.tuned_key("linear_int8", "small", CARD): TileLaunch(256, 256, 64, 4, 2)})
    assert tile_launch("linear_int8", "large", CARD) == OTHER
    assert tile_launch("linear_int8", "small", CARD) == CANDIDATES["linear_int8", "small"][0]
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"# another kernel")
    hardware._source_hash.cache_clear()
    assert tile_launch("linear_int8", "large", CARD) == first
    hardware._source_hash.cache_clear()


DAMAGED = ["", "{", "[1]", '{"a card": 3}', '{"a card": [128, 128]}', '{"a card": [1, 2, 3, 4, null]}', "\x00"]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_file_is_told_once_and_the_table_is_used(
    damaged: str, card: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = card / TUNED
    file.parent.mkdir()
    file.write_text(damaged)
    for _ in range(2):
        assert tile_launch("linear_int8", "large", CARD) == CANDIDATES["linear_int8", "large"][0]
    assert caplog.text.count(str(file)) == 1 and str(file) in tuned_problem()
    assert main(["doctor", "--device", "cpu"]) == 0
    assert f"tuned launches: {file} cannot be read" in capsys.readouterr().out
    save_tuned({hardware.tuned_key("linear_int8", "large", CARD): OTHER})
    assert tile_launch("linear_int8", "large", CARD) == OTHER and tuned_problem() == ""


def test_what_another_process_tuned_meanwhile_is_kept(card: Path) -> None:
    save_tuned({"card A": OTHER})
    (card / TUNED).write_text(json.dumps({"card B": [128, 128, 64, 8, 3]}))
    save_tuned({"card C": OTHER})
    assert set(json.loads((card / TUNED).read_text())) == {"card B", "card C"}
    assert [path.name for path in (card / TUNED).parent.iterdir()] == [TUNED.name]


@pytest.mark.skipif(not HAS_TRITON, reason="a launch is kept by Triton's version")
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("seconds", "place"), [([1.0, 0.99, 2.0], 0), ([1.0, 0.9, 2.0], 1), ([None, 3.0, 2.0], 2)])
def test_the_fastest_launch_is_chosen_and_the_first_wins_near_ties(seconds: list[float | None], place: int) -> None:
    candidates = CANDIDATES["linear_int8", "large"]
    tried = [Tried("linear_int8", "large", launch, time) for launch, time in zip(candidates, seconds, strict=False)]
    assert list(chosen(tried, CARD).values()) == [candidates[place]]


@pytest.mark.skipif(not HAS_TRITON, reason="the error is Triton's")
def test_a_launch_that_does_not_fit_or_is_wrong_is_out() -> None:
    from triton.runtime.errors import OutOfResources

    candidates = CANDIDATES["linear_int8", "large"]

    def run(launch: TileLaunch) -> torch.Tensor:
        if launch == candidates[1]:
            raise OutOfResources(200_000, 101_376, "shared memory")
        if launch == candidates[3]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(3) * (2 if launch == candidates[2] else 1)

    tried = list(try_each("linear_int8", "large", lambda: run, lambda work: float(work().sum())))
    assert [entry.seconds for entry in tried] == [3.0, None, None, None]


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton nothing is tried")
def test_an_op_whose_inputs_do_not_fit_is_out_and_the_table_stays() -> None:
    def make() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried = list(try_each("linear_int8", "large", make, lambda work: 1.0))
    assert [entry.launch for entry in tried] == list(CANDIDATES["linear_int8", "large"])
    assert chosen(tried, CARD) == {}


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton nothing is tried")
def test_trying_a_launch_holds_two_outputs_and_no_copies_of_them() -> None:
    shape = (2**10, 2**14)

    def run(_: TileLaunch) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    def clock(work: Callable[[], torch.Tensor]) -> float:
        return float(work()[0, 0])

    with live_bytes() as live:
        tried = list(try_each("linear_int8", "large", lambda: run, clock))
    assert [entry.seconds for entry in tried] == [1.0] * 4
    assert live.peak < 2 * 2 * math.prod(shape) + 4 * 4 * tuning._COMPARED


@pytest.mark.skipif(not HAS_TRITON, reason="a launch is kept by Triton's version")
def test_an_op_that_is_done_is_remembered_though_the_next_one_fails(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(device: torch.device) -> Iterator[Tried]:
        for number, launch in enumerate(CANDIDATES["attention_int8", "fp16"]):
            yield Tried("attention_int8", "fp16", launch, 3.0 - number / 2)
        yield Tried("linear_int8", "large", OTHER, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_local.doctor.launches_tried", tried)
    monkeypatch.setattr("wan_local.device.resolve_device", lambda _: CARD)
    with suppress(KeyboardInterrupt):
        main(["tune"])
    kept = json.loads((card / TUNED).read_text())
    assert [key.split("|")[-2].split()[0] for key in kept] == ["attention_int8"]


def test_tuning_takes_as_many_tokens_as_the_memory_that_is_free_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("wan_local.doctor.HAS_TRITON", True)
    monkeypatch.setattr("wan_local.doctor.free_bytes", lambda _: 2 * 2**30)
    monkeypatch.setattr(tuning, "tune", lambda *_, tokens: asked.append(tokens))
    launches_tried(CARD)
    assert asked == [2**30 // 160_000]


def test_tuning_needs_a_card() -> None:
    with pytest.raises(NotAvailable, match="needs a card"):
        launches_tried(torch.device("cpu"))
    assert tuning.TOKENS == 32_760
