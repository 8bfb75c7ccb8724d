from __future__ import annotations

import pytest

from wan_local.fitting import make_plan
from wan_local.geometry import Geometry, Size
from wan_local.planner import GIB, Machine, Plan
from wan_local.settings import load_card_rates, load_model_config
from wan_local.stage import network_sizes
from wan_local.timing import loop_flops, timed
from wan_local.weight_format import WeightFormats

REAL = load_model_config("flf2v_14b")
LARGE, SMALL = Geometry(Size(720, 1280), 81), Geometry(Size(480, 832), 81)
INT8 = network_sizes(REAL, WeightFormats("int8"))


def plan_of(geometry: Geometry, card: str | None, *, gigabytes: int = 12, steps: int = 30) -> Plan:
    plan = make_plan(geometry, REAL, INT8, Machine("cuda:0", gigabytes * GIB, 64 * GIB, 2, "w8a8"))
    return timed(plan, REAL, INT8, load_card_rates(card), steps=steps, branches=2)


@pytest.mark.parametrize(("geometry", "teraflops"), [(SMALL, 1694), (LARGE, 6558)], ids=["480p", "720p"])
def test_one_call_of_the_transformer_takes_the_known_operations(geometry: Geometry, teraflops: float) -> None:
    assert sum(loop_flops(geometry, REAL.transformer)) / 1e12 == pytest.approx(teraflops, rel=0.02)


def test_every_stage_has_seconds_on_a_known_card_and_none_on_an_unknown_one() -> None:
    known, unknown = plan_of(LARGE, "NVIDIA GeForce RTX 4090"), plan_of(LARGE, "Riva 128")
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in known.stages)
    assert all(stage.seconds is None for stage in unknown.stages)
    assert plan_of(LARGE, None).stages == unknown.stages


def test_seconds_follow_steps_card_and_size() -> None:
    def loop(plan: Plan) -> float:
        return plan.stage("denoise").seconds or 0.0

    slow, fast = plan_of(LARGE, "RTX 3060"), plan_of(LARGE, "RTX 5090")
    assert loop(slow) > 5 * loop(fast) > 5 * loop(plan_of(SMALL, "RTX 5090"))
    assert loop(plan_of(LARGE, "RTX 3060", steps=15)) == pytest.approx(loop(slow) / 2)


def test_streaming_costs_no_time_where_computing_takes_longer() -> None:
    streamed, resident = (plan_of(LARGE, "RTX 4090", gigabytes=size).stage("denoise") for size in (6, 80))
    assert streamed.streamed_bytes > 0 == resident.streamed_bytes
    assert streamed.seconds == resident.seconds
