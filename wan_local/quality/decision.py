"""Which way to leave out steps `regular` should be: every candidate against a bar, and against others at equal calls.

A candidate passes where it saves enough calls, stays near the exact run in the mean and in its worst clip, keeps the
last frame and the sharpness, and is nearer than even steps and than every other policy that makes as many calls. Of
those that pass, the one nearest to the exact run wins; within a decibel, the one of fewer calls. Even steps are
compared at a candidate's own number of calls, by a line between the numbers of steps that were measured. The rule is
one for what is shipped and for one's own weights; how many calls and decibels it asks for is not.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from wan_local.quality.subject import EXACT
from wan_local.quality.summary import Summary
from wan_local.settings import load_acceleration_config

AS_MANY = 0.75  # calls by which two ways may differ and still count as equal
EVEN = "even steps"
_PAGE_WIDTH = 120  # characters of a line of Markdown
_EQUAL = 0.05  # dB that count as no difference
_AS_NEAR = 1.0  # dB between means that don't decide: a clip's own differ by several


@dataclass(frozen=True, slots=True)
class Bar:
    """What a candidate must reach: how many times fewer calls, PSNR to the exact run in dB, and bounds of the rest.

    mean, worst: over all clips, and in the worst one. last: most dB by which the last frame may differ from the exact
    run's. sharpness: most that its ratio may differ from 1.
    """

    fewer: float
    mean: float
    worst: float
    last: float = 0.3
    sharpness: float = 0.02

    def describe(self) -> str:
        words = (
            f"The bar: {self.fewer:g}x fewer calls, {self.mean:g} dB to the exact run in the mean and {self.worst:g} "
            f"dB in the worst clip, last frame within {self.last:g} dB, sharpness within {self.sharpness:.0%}, nearer "
            "to the exact run than even steps at as many calls, and no farther than the best other policy at "
            f"as many calls. Of those that reach it the nearest wins; within {_AS_NEAR:g} dB, the one of fewer calls."
        )
        return textwrap.fill(words, _PAGE_WIDTH) + "\n"


SHIPPED = Bar(fewer=1.5, mean=40.0, worst=30.0)
"""For what `regular` is as shipped, on the embedded model at 30 steps."""
OWN = Bar(fewer=1.25, mean=22.0, worst=22.0)
"""For a person's own weights, also few steps and few clips. 22 dB: what published caches keep on the 14B model."""


def policy_of(label: str) -> str | None:
    """Return which policy a variant of the exact weights is, if any."""
    known = {"regular, tau": "merge", "static plan": "static", "reuse,": "reuse"}
    return next((policy for start, policy in known.items() if label.startswith(start)), None)


@dataclass(frozen=True)
class Candidate:
    """A way to leave out steps: its figures, and the nearest to the exact run that others are at as many calls.

    even: of even steps, None where none were measured on both sides. rival: the best other policy, with its label.
    """

    summary: Summary
    fewer: float
    even: float | None
    rival: tuple[str, float] | None
    bar: Bar

    @property
    def policy(self) -> str | None:
        return policy_of(self.summary.variant)

    def failings(self) -> list[str]:
        """Return in words what of the bar it does not reach."""
        means, psnr, bar = self.summary.means, self.summary.means["psnr_to_exact"], self.bar
        if self.fewer <= 1:
            return ["no fewer calls than the exact run"]
        tests = {
            f"only {self.fewer:.2f}x fewer calls": self.fewer >= bar.fewer,
            f"mean below {bar.mean:g} dB": psnr >= bar.mean,
            f"worst clip below {bar.worst:g} dB": self.summary.worst_psnr_to_exact >= bar.worst,
            f"last frame off by over {bar.last:g} dB": abs(means["last_psnr_change"]) <= bar.last,
            f"sharpness off by over {bar.sharpness:.0%}": abs(means["sharpness_ratio"] - 1) <= bar.sharpness,
            "no nearer than even steps": self.even is None or psnr > self.even,
            f"{self.rival[0] if self.rival else 'another'} is nearer": self.rival is None
            or psnr >= self.rival[1] - _EQUAL,
        }
        return [words for words, passed in tests.items() if not passed]


def candidates(summaries: Sequence[Summary], *, bar: Bar = SHIPPED) -> list[Candidate]:
    """Return the candidates of one cell, with the bar they are to reach."""
    exact = next(summary for summary in summaries if summary.variant == EXACT)
    even = sorted((s.means["calls"], s.means["psnr_to_exact"]) for s in summaries if s.variant.endswith(EVEN))
    policies = [summary for summary in summaries if policy_of(summary.variant)]
    made = []
    for summary in policies:
        calls = summary.means["calls"]
        others = [
            (other.variant, other.means["psnr_to_exact"])
            for other in policies
            if policy_of(other.variant) != policy_of(summary.variant) and other.means["calls"] <= calls + AS_MANY
        ]
        rival = max(others, key=lambda other: other[1], default=None)
        made.append(Candidate(summary, exact.means["calls"] / calls, between(even, calls), rival, bar))
    return made


def between(points: Sequence[tuple[float, float]], calls: float) -> float | None:
    """Return the value at `calls` on the line through sorted points, or None beyond them."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= calls <= right:
            return low + (high - low) * (calls - left) / (right - left)
    return None


def winner(found: Sequence[Candidate]) -> Candidate | None:
    """Return the one nearest to the exact run of those that reach the bar.

    Of those within a dB of it, it is the one of fewer calls, and of as many the one that is `regular` already.
    """
    passing = [candidate for candidate in found if not candidate.failings()]
    if not passing:
        return None
    nearest = max(candidate.summary.means["psnr_to_exact"] for candidate in passing)
    level = [one for one in passing if one.summary.means["psnr_to_exact"] >= nearest - _AS_NEAR]
    now = f"regular, tau {load_acceleration_config().merge.tau:g}"
    return min(level, key=lambda one: (round(one.summary.means["calls"], 1), one.summary.variant != now))


def section(summaries: Sequence[Summary], *, bar: Bar = SHIPPED) -> str:
    """Return the comparison of one cell in Markdown, with what it says."""
    found = candidates(summaries, bar=bar)
    heads = ("candidate", "fewer calls", "mean", "worst clip", "last frame", "sharpness", "even steps", "best other")
    lines = [bar.describe(), f"| {' | '.join(heads)} | bar |", "|" + "---|" * (len(heads) + 1)]
    for one in found:
        means = one.summary.means
        even = "" if one.even is None else f"{one.even:.1f} dB"
        rival = "" if one.rival is None else f"{one.rival[1]:.1f} dB ({one.rival[0]})"
        lines.append(
            f"| {one.summary.variant} | {one.fewer:.2f}x | {means['psnr_to_exact']:.1f} dB | "
            f"{one.summary.worst_psnr_to_exact:.1f} dB | {means['last_psnr_change']:+.2f} dB | "
            f"{means['sharpness_ratio']:.3f} | {even} | {rival} | {'; '.join(one.failings()) or 'reached'} |"
        )
    return "\n".join([*lines, "", f"**{conclusion(found)}**", ""])


def conclusion(found: Sequence[Candidate]) -> str:
    """Return in a sentence what a cell's candidates come to."""
    best = winner(found)
    if best is not None:
        return f"By these figures `regular` is: {best.summary.variant}."
    if found and all(one.fewer <= 1 for one in found):
        least = load_acceleration_config().merge.min_steps
        return f"No candidate left out a step; a schedule of fewer than {least} is always taken whole."
    return "No candidate reaches the bar."
