"""What the figures say about `regular`: a bar, equal calls, and the policy that wins."""

from __future__ import annotations

import pytest

from wan_local.quality.decision import between, candidates, section, winner
from wan_local.quality.summary import Summary


def summary(
    variant: str, calls: float, psnr: float, *, worst: float = 35, last: float = 0, sharp: float = 1
) -> Summary:
    means = {"calls": calls, "psnr_to_exact": psnr, "last_psnr_change": last, "sharpness_ratio": sharp}
    return Summary(variant, "30 steps, shift 5", 72, means, worst)


EXACT = summary("none", 30, 99)
EVEN = [summary("15 even steps", 15, 30), summary("19 even steps", 19, 38), summary("24 even steps", 24, 42)]


def test_even_steps_are_compared_at_as_many_calls() -> None:
    points = [(15.0, 30.0), (19.0, 38.0), (24.0, 43.0)]
    assert between(points, 17) == pytest.approx(34) and between(points, 19) == 38
    assert between(points, 14.9) is None and between(points, 25) is None


def test_the_nearest_to_the_exact_run_wins_whatever_policy_it_is() -> None:
    merge, reuse = summary("regular, tau 0.05", 19, 45), summary("reuse, 1 in a row", 19.5, 41)
    found = candidates([EXACT, merge, reuse, *EVEN])
    best = winner(found)
    assert best is not None and best.policy == "merge" and best.fewer == pytest.approx(30 / 19)
    better = summary("reuse, 1 in a row", 19.5, 47)
    best = winner(candidates([EXACT, merge, better, *EVEN]))
    assert best is not None and best.policy == "reuse"
    assert "By these figures `regular` is: reuse, 1 in a row." in section([EXACT, merge, better, *EVEN])


def test_equally_near_candidates_are_told_apart_by_their_calls() -> None:
    near, fewer = summary("regular, tau 0.03", 20, 45.02), summary("regular, tau 0.05", 18, 45)
    best = winner(candidates([EXACT, near, fewer, *EVEN]))
    assert best is not None and best.summary is fewer


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (summary("regular, tau 0.05", 21, 45), "1.43x fewer"),
        (summary("regular, tau 0.05", 19, 39.9), "mean below"),
        (summary("regular, tau 0.05", 19, 45, worst=29), "worst clip"),
        (summary("regular, tau 0.05", 19, 45, last=-0.4), "last frame"),
        (summary("regular, tau 0.05", 19, 45, sharp=0.97), "sharpness"),
    ],
)
def test_what_misses_the_bar_is_named_and_never_wins(spoilt: Summary, words: str) -> None:
    found = candidates([EXACT, spoilt, *EVEN])
    assert [words in failing for failing in found[0].failings()] == [True]
    assert winner(found) is None and "No candidate reaches the bar." in section([EXACT, spoilt, *EVEN])


def test_even_steps_and_a_policy_of_fewer_calls_that_are_nearer_count_against_a_candidate() -> None:
    merge, static = summary("regular, tau 0.05", 19, 41), summary("static plan", 18, 44)
    even = [summary("15 even steps", 15, 30), summary("19 even steps", 19, 43)]
    [first, second] = candidates([EXACT, merge, static, *even])
    assert first.failings() == ["no nearer than even steps", "static plan is nearer"]
    assert second.failings() == []
