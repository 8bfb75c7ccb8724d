"""The modelled table in kernels/README.md is the one that its script makes, and is called a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import int8_quality, modelled
from bench.modelled import (
    BEGIN,
    CARDS,
    END,
    README,
    SIZES,
    CardRates,
    LineRefused,
    cards_of_doctors,
    seconds,
    table,
    work_of,
)
from wan_kernels import checks
from wan_local import doctor
from wan_local.attention import Card
from wan_local.doctor import KernelReport, line_to_paste

CPU = torch.device("cpu")
OF_4090 = CardRates(165.0, 661, 1008, 164.0, 322.0)


def test_the_table_in_the_readme_is_what_the_script_makes() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table()
    assert "(modelled)" in table() and "not a measurement" in text


def test_the_table_of_what_int8_costs_is_made_of_its_rows() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(int8_quality.BEGIN)[1].split(int8_quality.END)[0].strip() == int8_quality.table()


def test_the_work_is_that_of_the_14b_model() -> None:
    work = work_of(SIZES["720p"])
    assert 6.4e15 < work.linear + work.attention + work.cross < 6.7e15  # 6.56 PFLOP a forward
    assert work.attention / (work.linear + work.attention + work.cross) > 0.7


def test_each_lever_helps_on_each_card() -> None:
    for card in CARDS.values():
        times = seconds(card, work_of(SIZES["480p"]))
        assert list(times) == sorted(times, reverse=True)


@pytest.fixture(scope="module")
def timed() -> list[str]:
    """The names of the kernels that a card times, at the 14B model's widths."""
    with FakeTensorMode():
        return [case.name for case in checks.cases(CPU, checks.REAL)]


def doctors_line(timed: list[str], monkeypatch: pytest.MonkeyPatch, *, device: str, failed: str = "") -> str:
    """Return what the doctor of a card prints that is what the table says of the 4090, and slow at a video's tail."""
    rates = {
        "torch copy": f"{OF_4090.bandwidth:.0f} GB/s",
        "torch bfloat16 product": f"{OF_4090.bf16 * modelled.GEMM_SHARE:.1f} TOPS",
        "torch attention": f"{OF_4090.flash:.1f} TOPS",
        "attention_int8, fp16 values": f"{OF_4090.attention_int8:.1f} TOPS",
    }
    linear = OF_4090.int8 * modelled.INT8_SHARE
    reports = [KernelReport(name, 0.1, rate=rate) for name, rate in rates.items() if name not in timed]
    for name in timed:
        of_linear = f"{40 if 'tail' in name else linear:.1f} TOPS" if name.startswith("linear") else "500 GB/s"
        rate = rates.get(name, of_linear)
        reports.append(KernelReport(name, float("nan") if name == failed else 0.1, rate="" if name == failed else rate))
    monkeypatch.setattr(doctor, "card_of", lambda _: Card("cuda", (8, 9), device))
    return line_to_paste(CPU, reports) + "\n"


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 5060 Ti", "5060 Ti"),
        ("NVIDIA GeForce RTX 4060 Ti", "NVIDIA GeForce RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("NVIDIA H200", "NVIDIA H200"),
    ],
)
def test_a_pasted_line_takes_the_place_of_its_cards_row(
    device: str, key: str, timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "doctor.jsonl"
    file.write_text(doctors_line(timed, monkeypatch, device=device) * 2)
    [(name, (label, card))] = cards_of_doctors(file).items()
    assert name == key and label.startswith(f"{key}, by its measured rates (triton ")
    measured, stated = (seconds(rates, work_of(SIZES["480p"])) for rates in (card, OF_4090))
    assert measured == pytest.approx(stated, rel=1e-3)
    monkeypatch.setattr(modelled, "DOCTORS", file)
    rows = [row.split(" | ")[0].removeprefix("| ") for row in table().splitlines()[2:]]
    assert rows == [label if row == key else row for row in CARDS] + ([] if key in CARDS else [label])


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("linear_int8 5120x5120", 6 / 11.4),
        ("linear_int8 13824x5120", 2.7 / 11.4),
        ("linear_int8_residual_ 5120x13824", 2.7 / 11.4),
    ],
)
def test_linears_count_by_the_time_that_they_take(
    name: str, share: float, timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at half its rate makes all of them slower by its share of the operations."""
    file = tmp_path / "doctor.jsonl"
    line = json.loads(doctors_line(timed, monkeypatch, device="NVIDIA GeForce RTX 4090"))
    line["kernels"][name]["rate"] = f"{OF_4090.int8 * modelled.INT8_SHARE / 2:.2f} TOPS"
    file.write_text(json.dumps(line))
    [(_, card)] = cards_of_doctors(file).values()
    assert OF_4090.int8 / card.int8 == pytest.approx(1 + share, rel=1e-3)


def test_a_line_without_a_rate_is_refused_in_words(
    timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "doctor.jsonl"
    failed = "attention_int8, fp16 values"
    file.write_text(doctors_line(timed, monkeypatch, device="NVIDIA GeForce RTX 4090", failed=failed))
    with pytest.raises(LineRefused, match="4090 has no rate of attention_int8, fp16 values: its numbers are wrong"):
        cards_of_doctors(file)
    names = [name for name in timed if not name.startswith("linear_int8_residual_")]
    file.write_text(doctors_line(names, monkeypatch, device="NVIDIA GeForce RTX 4090"))
    with pytest.raises(LineRefused, match="linear_int8_residual_ 5120x13824: it is not in the line"):
        cards_of_doctors(file)


def test_without_lines_there_are_no_more_rows(tmp_path: Path) -> None:
    assert cards_of_doctors(tmp_path / "none.jsonl") == {}
