"""The modelled table in kernels/README.md is the one that its script makes, and is called a model."""

from __future__ import annotations

from bench import int8_quality
from bench.modelled import BEGIN, CARDS, END, README, SIZES, seconds, table, work_of


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
