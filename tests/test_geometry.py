from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import golden
from wan_local.geometry import GRID, Geometry, Size, frames_to_drop, output_size
from wan_local.settings import load_model_config

REAL = load_model_config("flf2v_14b")
sides = st.integers(64, 8000)


@pytest.mark.parametrize(
    ("resolution", "ratio", "expected"),
    [
        ("480p", "16:9", Size(480, 832)), ("480p", "9:16", Size(832, 480)), ("480p", "1:1", Size(624, 624)),
        ("720p", "16:9", Size(720, 1280)), ("720p", "9:16", Size(1280, 720)), ("720p", "1:1", Size(960, 960)),
    ],
)  # fmt: skip
def test_named_ratios_give_the_documented_sizes_whatever_the_image(resolution: str, ratio: str, expected: Size) -> None:
    assert output_size(REAL.canvas(resolution), ratio, Size(height=333, width=1001)) == expected


@pytest.mark.parametrize(
    ("start", "at_480p", "at_720p"),
    [
        (Size(1080, 1920), Size(480, 832), Size(720, 1280)),
        (Size(1920, 1080), Size(832, 480), Size(1280, 720)),
        (Size(1024, 1024), Size(624, 624), Size(960, 960)),
        (Size(768, 1024), Size(544, 720), Size(816, 1104)),
        (Size(1024, 1536), Size(512, 768), Size(768, 1168)),
        (Size(480, 832), Size(480, 832), Size(720, 1248)),
    ],
    ids=str,
)
def test_auto_follows_the_start_image(start: Size, at_480p: Size, at_720p: Size) -> None:
    assert output_size(REAL.canvas("480p"), "auto", start) == at_480p
    assert output_size(REAL.canvas("720p"), "auto", start) == at_720p


def test_auto_agrees_with_the_official_rule_but_for_its_float_floor_and_our_snapping() -> None:
    checked = 0
    for row in golden()["geometry"]["table"]:
        width, height = row["first_size_wh"]
        resolution = {399360: "480p", 921600: "720p"}.get(row["max_area"])
        near_bucket = any(abs(math.log(width / height * b / a)) <= 0.015 for a, b in ((16, 9), (9, 16), (1, 1)))
        if resolution is None or near_bucket or not 0.4 <= width / height <= 2.5:
            continue
        if (width, height) in ((832, 480), (480, 832)):  # the official code takes 16 rows off its own trained size
            continue
        official = Size(height=row["height"], width=row["width"])
        assert output_size(REAL.canvas(resolution), "auto", Size(height, width)) == official
        checked += 1
    assert checked >= 5


@given(sides, sides, st.sampled_from(["480p", "720p"]))
def test_auto_keeps_area_grid_and_aspect(height: int, width: int, resolution: str) -> None:
    canvas = REAL.canvas(resolution)
    size = output_size(canvas, "auto", Size(height, width))
    assert size.height % GRID == 0 and size.width % GRID == 0
    assert size.height * size.width <= canvas.area
    aspect = min(max(width / height, 0.4), 2.5)
    assert abs(math.log(size.width / size.height / aspect)) < 0.06


@pytest.mark.parametrize(
    ("num_frames", "generated"),
    [(81, 81), (82, 85), (85, 85), (86, 89), (89, 89), (93, 93), (94, 97), (97, 97), (98, 101), (100, 101)],
)
def test_generated_frames_are_the_next_4k_plus_1(num_frames: int, generated: int) -> None:
    geometry = Geometry(Size(720, 1280), num_frames)
    assert geometry.generated_frames == generated
    assert geometry.latent_frames == (generated - 1) // 4 + 1


def test_token_counts_are_the_published_ones() -> None:
    assert Geometry(Size(720, 1280), 81).tokens == 75_600
    assert Geometry(Size(480, 832), 81).tokens == 32_760


@given(st.integers(81, 100), st.data())
def test_dropping_frames_keeps_count_order_and_both_ends(num_frames: int, data: st.DataObject) -> None:
    generated = Geometry(Size(64, 64), num_frames).generated_frames
    motion = data.draw(st.lists(st.floats(0, 255), min_size=generated, max_size=generated))
    dropped = frames_to_drop(motion, num_frames)
    assert len(dropped) == generated - num_frames == len(set(dropped))
    assert dropped == sorted(dropped)
    assert all(2 <= index <= generated - 3 for index in dropped)


def test_the_stillest_frames_are_dropped_far_from_each_other() -> None:
    motion = [9.0] * 101
    motion[40], motion[41], motion[70], motion[10] = 0.1, 0.2, 0.3, 0.4
    assert frames_to_drop(motion, 100) == [40]
    assert frames_to_drop(motion, 98) == [10, 40, 70]  # 41 is too close to 40


def test_equal_motion_drops_the_lowest_indices_allowed() -> None:
    assert frames_to_drop([1.0] * 85, 84) == [2]
    assert frames_to_drop([1.0] * 85, 83) == [2, 24]
