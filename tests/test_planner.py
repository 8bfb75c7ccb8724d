from __future__ import annotations

import pytest

from wan_local.errors import DoesNotFit
from wan_local.geometry import Geometry, Size
from wan_local.planner import GIB, Machine, make_plan
from wan_local.settings import load_model_config

REAL = load_model_config("flf2v_14b")
PARAMETERS = {
    "transformer": 16_400_000_000,
    "vae": 127_000_000,
    "text_encoder": 5_680_000_000,
    "image_encoder": 632_000_000,
}
LARGE, SMALL = Geometry(Size(720, 1280), 81), Geometry(Size(480, 832), 81)


def test_a_run_that_fits_is_planned_with_every_stages_peak() -> None:
    plan = make_plan(LARGE, REAL, PARAMETERS, Machine("cuda:0", 80 * GIB, 2))
    assert [stage.name for stage in plan.stages] == ["text", "image", "condition", "denoise", "decode"]
    assert plan.peak.name == "denoise"
    assert plan.peak.weight_bytes == 2 * PARAMETERS["transformer"]
    assert "1280x720" in plan.describe() and "75600 tokens" in plan.describe()


def test_too_little_memory_is_refused_with_need_free_and_the_nearest_that_fits() -> None:
    need = make_plan(LARGE, REAL, PARAMETERS, Machine("cuda:0", 200 * GIB, 2)).peak.peak_bytes
    less = make_plan(SMALL, REAL, PARAMETERS, Machine("cuda:0", 200 * GIB, 2)).peak.peak_bytes
    free = int((need + less) / 2 / 0.9)
    with pytest.raises(
        DoesNotFit, match=r"1280x720 x 81 frames needs .* GiB on cuda:0 .*832x480 x 81 frames would fit"
    ):
        make_plan(LARGE, REAL, PARAMETERS, Machine("cuda:0", free, 2), smaller=SMALL)


def test_a_card_of_8_gib_is_refused_without_a_false_promise() -> None:
    with pytest.raises(DoesNotFit, match="Use a machine with more memory"):
        make_plan(LARGE, REAL, PARAMETERS, Machine("cuda:0", 8 * GIB, 2), smaller=SMALL)
