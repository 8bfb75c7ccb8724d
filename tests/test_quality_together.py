"""Runs of a study that go together: one batch of calls, and the frames that each gives alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan_local.attention import sdpa
from wan_local.likeness import psnr
from wan_local.models.transformer import ContextKV, Modulation, fold_padding
from wan_local.quality.making import Maker
from wan_local.quality.shelf import Shelf
from wan_local.quality.subject import Cell, Clip, Unit, Variant
from wan_local.quality.together import Together, unfolded
from wan_local.settings import load_settings

ARGUMENTS = {"resolution": "480p", "aspect_ratio": "16:9", "guide_scale": 5}
MERGING = Variant("regular", {"acceleration": "regular"})


def unit(number: int, steps: int) -> Unit:
    random = np.random.default_rng(number)
    start, end = (Image.fromarray(random.integers(0, 256, (4, 7, 3), np.uint8)).resize((112, 64)) for _ in range(2))
    return Unit(Cell(steps, 5.0), Clip(str(number), start, end, "red waves " * number), number)


def test_runs_together_are_the_runs_alone_also_where_they_merge_steps_of_their_own(tmp_path: Path) -> None:
    settings = load_settings(model="tiny", device="cpu", cache_dir=tmp_path / "cache")
    maker = Maker(settings, ARGUMENTS, tmp_path, shelf=Shelf())
    units = [unit(1, 12), unit(7, 13)]
    encoded = [maker.encode(one.clip) for one in units]
    together = maker.make(units, encoded, MERGING)
    [alone] = maker.make(units[1:], encoded[1:], MERGING)
    assert together[1].calls == alone.calls < 13 and together[0].calls < 12
    assert psnr(together[1].frames, alone.frames) > 55
    assert psnr(together[0].frames, together[1].frames) < 30


def test_a_batch_is_of_all_that_still_run_and_an_error_ends_every_run() -> None:
    sizes: list[int] = []

    class Network(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, *_: object, **__: object) -> list[torch.Tensor]:
            sizes.append(len(inputs))
            if bool((inputs < 0).any()):
                raise RuntimeError("no memory left")
            return [inputs * 2]

    together, network = Together(), Network()
    call = together.batching(network)  # type: ignore[arg-type]
    modulation = Modulation(torch.zeros(1, 2), torch.zeros(1, 6, 2))

    def work(number: int, calls: int) -> float:
        value = torch.full((1, 1), float(number))
        for _ in range(calls):
            [value] = call(value, modulation, [[]])
        return float(value)

    assert together.run([lambda: work(1, 3), lambda: work(3, 1), lambda: work(5, 2)]) == [8, 6, 20]
    assert sizes == [3, 2, 1]
    with pytest.raises(RuntimeError, match="no memory"):
        together.run([lambda: work(-1, 1), lambda: work(3, 2)])
    assert threading.active_count() < 20


def test_unfolded_padding_gives_the_same_attention() -> None:
    torch.manual_seed(1)
    prompt = torch.zeros(1, 16, 8)
    prompt[:, :5] = torch.randn(1, 5, 8)
    short, bias = fold_padding(prompt)
    matrix = torch.randn(8, 8)
    k, v = ((short @ matrix + 0.5).view(1, -1, 2, 4), (short @ matrix.T - 0.5).view(1, -1, 2, 4))
    whole = unfolded(ContextKV(k, v, k, v, bias))
    assert whole.text_bias is None and whole.k.shape[1] == 16
    q = torch.randn(1, 3, 2, 4)
    torch.testing.assert_close(sdpa(q, whole.k, whole.v), sdpa(q, k, v, bias_M=bias))
