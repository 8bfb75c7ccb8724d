"""The yardstick itself: figures against known values, a study that goes on where it stopped, a page, a verdict."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from bench.quality import extent
from wan_local import cli
from wan_local.cli import terminal
from wan_local.errors import InvalidRequest
from wan_local.likeness import psnr
from wan_local.models.vae import TilePixels, Vae
from wan_local.preparation import Job
from wan_local.quality import decision, metrics, own_model, protocol
from wan_local.quality.making import Encoded, Made, Maker
from wan_local.quality.page import write_page
from wan_local.quality.premises import Premises
from wan_local.quality.protocol import Study
from wan_local.quality.subject import EXACT, Cell, Clip, Unit, Variant, units
from wan_local.quality.summary import Summary
from wan_local.settings import load_acceleration_config, load_settings
from wan_local.tiling import WHOLE, Tiling

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def pan() -> metrics.Frames:
    """A photograph that moves two pixels a frame."""
    picture = data.astronaut()[::2, ::2]
    return np.stack([picture[40:104, 2 * index : 2 * index + 112] for index in range(12)])


def noisy(frames: metrics.Frames, sigma: float) -> metrics.Frames:
    changed = frames + np.random.default_rng(7).normal(0, sigma, frames.shape)
    return changed.round().clip(0, 255).astype(np.uint8)


def test_psnr_of_a_known_error() -> None:
    grey = np.full((2, 8, 8, 3), 100, np.uint8)
    assert psnr(grey, grey) == 99.0
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(255 / 10), abs=1e-5)
    other = grey.copy()
    other[1] += 20
    assert metrics.worst_frame_psnr(grey, other) == pytest.approx(20 * np.log10(255 / 20), abs=1e-5)


def test_ssim_agrees_with_scikit_image(pan: metrics.Frames) -> None:
    other = noisy(pan, 8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    known = [
        structural_similarity(metrics.luma(a), metrics.luma(b), **options) for a, b in zip(pan, other, strict=True)
    ]
    assert metrics.ssim(pan, pan) == pytest.approx(1.0, abs=1e-5)
    assert metrics.ssim(pan, other) == pytest.approx(np.mean(known), abs=2e-3)


def test_motion_is_the_pan_and_noise_raises_the_warp_error(pan: metrics.Frames) -> None:
    motion, error = metrics.motion_and_warp_error(pan)
    assert motion == pytest.approx(2.0, rel=0.1)
    assert metrics.motion_and_warp_error(noisy(pan, 10))[1] > 5 * error
    still = np.repeat(pan[:1], 5, axis=0)
    assert metrics.motion_and_warp_error(still)[0] < 0.05


def test_a_jump_at_the_end_a_flicker_and_a_blur_are_seen(pan: metrics.Frames) -> None:
    jumped = pan.copy()
    jumped[-1] = 255 - pan[-1]
    assert metrics.end_pop(pan) == pytest.approx(1.0, abs=0.2) and metrics.end_pop(jumped) > 3
    wave = np.clip(pan.astype(int) + np.array([6, -6] * 6)[:, None, None, None], 0, 255).astype(np.uint8)
    assert metrics.flicker(wave) > 10 * metrics.flicker(pan)
    blurred = np.stack([np.asarray(Image.fromarray(f).resize((28, 16)).resize((112, 64))) for f in pan])
    assert metrics.sharpness(blurred) < 0.3 * metrics.sharpness(pan)


class FakeMaker(Maker):
    """Counts its runs; a variant changes the picture by as many levels as its label says."""

    def encode(self, clip: Clip) -> Encoded:
        ends = (np.asarray(clip.start), np.asarray(clip.end))
        return Encoded(None, None, ends, (40.0, 40.0))  # type: ignore[arg-type]

    def make(self, units: Sequence[Unit], encoded: Sequence[Encoded], variant: Variant) -> list[Made]:
        level = 0 if variant.label == EXACT else int(variant.label.split()[-1])
        truths = [unit.clip.truth for unit in units if unit.clip.truth is not None]
        assert len(truths) == len(encoded) == len(units)
        return [Made(noisy(truth, 4) + np.uint8(level), 30 - level, 1.0) for truth in truths]


def fake_study(folder: Path, *, at_once: int = 1) -> Study:
    return Study(FakeMaker(load_settings(model="tiny"), {}, folder), folder, at_once=at_once)


def make_clip(frames: metrics.Frames, name: str = "a") -> Clip:
    dark = frames // 2
    return Clip(name, Image.fromarray(dark[0]), Image.fromarray(dark[-1]), "p", dark)


def test_a_study_goes_on_where_it_stopped(pan: metrics.Frames, tmp_path: Path) -> None:
    study = fake_study(tmp_path)
    clips, variants = [make_clip(pan), make_clip(pan, "b")], [Variant(EXACT), Variant("add 1"), Variant("add 3")]
    running = study.run(units(clips, [Cell()], [1, 2]), variants)
    first = [next(running) for _ in range(4)]
    running.close()
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"variant": "cut o')  # a stop in the middle of a line
    rest = list(fake_study(tmp_path).run(units(clips, [Cell()], [1, 2]), variants))
    keys = [protocol.key_of(row) for row in first + rest]
    assert len(keys) == len(set(keys)) == 12
    assert {protocol.key_of(row) for row in study.rows()} == set(keys)
    exact = [row for row in first + rest if row["variant"] == EXACT]
    assert all(row["psnr_to_exact"] == 99.0 and row["last_psnr_change"] == 0 for row in exact)
    [three] = {row["psnr_to_exact"] for row in rest if row["variant"] == "add 3"}
    assert three == pytest.approx(20 * np.log10(255 / 3), abs=1e-4)


def test_the_page_has_a_table_pictures_and_readable_csv(pan: metrics.Frames, tmp_path: Path) -> None:
    study = fake_study(tmp_path / "work")
    variants = [Variant(EXACT), Variant("add 1"), Variant("add 3")]
    assert len(list(study.run(units([make_clip(pan)], [Cell(), Cell(20, 3.0)], [1]), variants))) == 6
    write_page(study, tmp_path / "page", "A title", "Words.")
    text = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# A title") and "## 30 steps, shift 5" in text and "## 20 steps, shift 3" in text
    assert "| add 3 | 1 | 27.0 |" in text
    pictures = [line[line.index("(") + 1 : -1] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 3
    for name in pictures:
        with Image.open(tmp_path / "page" / name) as picture:
            assert min(picture.size) > 50 and len(set(picture.convert("L").tobytes())) > 10
    with (tmp_path / "page" / "rows.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 and float(rows[0]["psnr_to_exact"]) == 99.0


def test_the_page_of_the_embedded_model_tells_of_the_rows_that_there_are() -> None:
    rows = [{"cell": "30 steps, shift 5", "clip": clip, "seed": seed} for clip in "ab" for seed in (1, 2)]
    assert extent(rows).startswith("There are 2 clips with up to 2 seeds at 30 steps, shift 5. ")
    rows.append({"cell": "20 steps, shift 3", "clip": "a", "seed": 1})
    assert "at 30 steps, shift 5; 1 clip with 1 seed at 20 steps, shift 3. " in extent(rows)


def summary(variant: str, calls: float, psnr: float, *, sharp: float = 1.0) -> Summary:
    means = {"calls": calls, "psnr_to_exact": psnr, "last_psnr_change": 0.0, "sharpness_ratio": sharp}
    return Summary(variant, "c", 1, means, psnr)


def test_what_is_recommended_goes_by_the_rule_that_the_shipped_thresholds_go_by() -> None:
    exact, even = summary(EXACT, 30, 99), [summary("15 even steps", 15, 26), summary("24 even steps", 24, 32)]
    merge, blurred = summary("regular, tau 0.05", 19, 33), summary("reuse, threshold 0.1", 16, 32, sharp=0.9)
    chosen = own_model.recommended([exact, merge, blurred, *even])
    assert chosen is not None and chosen.label == "regular, tau 0.05"
    assert own_model.recommended([exact, summary("regular, tau 0.05", 19, 28), *even]) is None, "even steps are nearer"
    assert own_model.recommended([exact, summary("regular, tau 0.05", 19, 21)]) is None


def test_nothing_is_recommended_where_every_candidate_is_the_exact_run() -> None:
    same = [summary(EXACT, 8, 99), *(summary(one.label, 8, 99) for one in own_model.candidates())]
    assert own_model.recommended(same) is None
    words = decision.conclusion(decision.candidates(same, bar=decision.OWN))
    assert words == "No candidate left out a step; a schedule of fewer than 12 is always taken whole."


def test_the_exact_run_is_plain_pytorch_and_what_the_settings_compute_with_is_a_variant(
    pan: metrics.Frames, tmp_path: Path
) -> None:
    settings = load_settings(model="tiny", device="cpu", attention="int8", kernels="on")
    maker = Maker(own_model.exactly(settings), {"resolution": "480p", "aspect_ratio": "16:9"}, tmp_path)
    [unit] = units([make_clip(pan)], [Cell()], [1])

    def plan(variant: Variant) -> Job:
        return maker.job(unit, variant)

    [own, *_] = own_model.computations(settings, plan, lambda _: None)
    assert own.label == "as these settings compute: attention int8, fused kernels"
    assert (plan(own).kernels.attention, plan(own).kernels.fused) == ("int8", True)
    for variant in (Variant(EXACT), *own_model.variants(tmp_path, 30, 5)):
        assert not plan(variant).kernels.approximates


def test_every_candidate_is_a_file_of_thresholds_that_the_settings_read(tmp_path: Path) -> None:
    for variant in own_model.variants(tmp_path, 30, 5)[: len(own_model.candidates())]:
        load_acceleration_config(load_settings(**variant.settings))
    chosen = own_model.recommended([summary(EXACT, 30, 99), summary("reuse, threshold 0.1", 16, 40)])
    assert chosen is not None and tomllib.loads(chosen.as_toml())["reuse"] == {"threshold": 0.1}


def test_a_policy_in_the_environment_neither_replaces_the_candidates_nor_undoes_the_recommended_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_LOCAL_ACCELERATION_POLICY", "static")
    base = load_settings(model="tiny")
    for candidate, variant in zip(own_model.candidates(), own_model.variants(tmp_path, 30, 5), strict=False):
        assert load_acceleration_config(replace(base, **variant.settings)).policy == candidate.policy
    chosen = own_model.candidates()[0]
    (tmp_path / "acceleration.toml").write_text(chosen.as_toml(), encoding="utf-8")
    for variable in own_model.environment(chosen, tmp_path / "acceleration.toml", base).split():
        monkeypatch.setenv(*variable.split("=", 1))
    config = load_acceleration_config(load_settings())
    assert (config.policy, config.merge.tau) == ("merge", 0.03)


def test_guidance_other_models_and_a_seed_are_compared_too(tmp_path: Path) -> None:
    labels = [variant.label for variant in own_model.variants(tmp_path, 20, 5, [Path("flf2v-int4")])]
    even = ["10 even steps", "13 even steps", "16 even steps"]
    assert labels[-6:] == [*even, "guide_scale 1", "model flf2v-int4", "another seed"]
    assert "guide_scale 1" not in [variant.label for variant in own_model.variants(tmp_path, 20, 1)]


def test_what_the_vae_keeps_is_measured_in_the_plans_tiles_and_once_a_clip(
    pan: metrics.Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_tiles(job: Job) -> Job:
        stages = tuple(replace(stage, tiling=Tiling(2, 2)) for stage in job.plan.stages)
        return replace(job, plan=replace(job.plan, stages=stages))

    made: list[tuple[int, Tiling]] = []
    encode, decode_tiles = Vae.encode, Vae.decode_tiles

    def encoding(self: Vae, chunks: Iterable[Tensor], tiling: Tiling = WHOLE, **options: Any) -> Tensor:
        kept = list(chunks)
        made.append((len(kept), tiling))
        return encode(self, kept, tiling, **options)

    def decoding(self: Vae, latents: Tensor, tiling: Tiling, **options: Any) -> Iterator[TilePixels]:
        made.append((latents.shape[2], tiling))
        return decode_tiles(self, latents, tiling, **options)

    monkeypatch.setattr(Vae, "encode", encoding)
    monkeypatch.setattr(Vae, "decode_tiles", decoding)
    settings = load_settings(model="tiny", device="cpu", cache_dir=tmp_path / "cache")
    arguments, clip = {"resolution": "480p", "aspect_ratio": "16:9", "guide_scale": 1}, make_clip(pan)
    tiled = Maker(settings, arguments, tmp_path, edit=in_tiles)
    ceilings = [tiled.encode(clip).ceiling for _ in range(2)]
    assert made[1:] == 4 * [(1, Tiling(2, 2))]  # after the condition, which is cached then
    whole = Maker(settings, arguments, tmp_path).encode(clip).ceiling
    assert ceilings[0] == ceilings[1] == pytest.approx(whole, abs=0.1)


def write_pair(folder: Path, name: str) -> None:
    for part in ("first", "last"):
        Image.fromarray(RNG.integers(0, 255, (96, 160, 3), dtype=np.uint8)).save(folder / f"{name}_{part}.png")


def test_pairs_are_read_by_their_names_and_a_lone_picture_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "bird")
    (tmp_path / "bird.txt").write_text(" a bird \n", encoding="utf-8")
    [clip] = own_model.read_pairs(tmp_path)
    assert (clip.name, clip.prompt, clip.start.size, clip.truth) == ("bird", "a bird", (160, 96), None)
    (tmp_path / "bird_last.png").unlink()
    with pytest.raises(InvalidRequest, match=r"bird_first\.png has no partner bird_last\.png"):
        own_model.read_pairs(tmp_path)
    (tmp_path / "bird_first.png").unlink()
    with pytest.raises(InvalidRequest, match="holds no pair"):
        own_model.read_pairs(tmp_path)


def test_a_pair_more_is_no_other_study_and_one_that_is_gone_is() -> None:
    one = Premises({"resolution": "480p"}, {"the pair a": "1", "the compared model x": "2"})
    more = Premises({"resolution": "480p"}, {"the pair a": "1", "the pair b": "3"})
    assert one.changes_to(more) == []
    assert more.changes_to(one) == ["the pair b is gone"]
    other = Premises({"resolution": "720p"}, {"the pair a": "1", "the compared model x": "9"})
    assert one.changes_to(other) == ["resolution 480p is now 720p", "the compared model x is another"]


def test_bench_quality_runs_the_real_model_and_writes_page_and_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, output = tmp_path / "pairs", tmp_path / "out"
    pairs.mkdir()
    write_pair(pairs, "noise")
    few: Mapping[str, Any] = {"acceleration": "regular"}
    monkeypatch.setattr(own_model, "variants", lambda *_: [Variant("static plan", few)])
    command = ["bench", "quality", "--pairs", str(pairs), "--output", str(output), "--model", "tiny", "--device", "cpu"]
    command += ["--num-inference-steps", "14", "8"]
    assert cli.main([*command, "--guide-scale", "1"]) == terminal.DONE
    rows = [json.loads(line) for line in (output / "runs" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    compared = [EXACT, "attention int8", "attention int8_pv", "static plan"]
    assert [row["variant"] for row in rows] == 2 * compared
    assert rows[0]["calls"] == 14 > rows[3]["calls"] and 30 < rows[3]["psnr_to_exact"] < 99
    assert rows[4]["calls"] == 8 and rows[4]["cell"] == "8 steps, shift 5"
    assert all(40 < row["psnr_to_exact"] < 99 for row in rows if row["variant"].startswith("attention"))
    said = capsys.readouterr()
    assert said.out.strip() == str(output / "README.md")
    assert "attention sage is left out: attention='sage' was asked for, but" in said.err
    page = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "static plan" in page
        and "resolution 480p" in page
        and "guide_scale 1.0, precision auto, attention sdpa" in page
    )
    assert load_acceleration_config(load_settings(acceleration_file=output / "acceleration.toml")).policy == "static"
    [*same, _, _] = command
    assert cli.main([*same, "8", "14", "--guide-scale", "1"]) == terminal.DONE  # the same rows, judged by eight steps
    assert "No candidate left out a step" in capsys.readouterr().err and not (output / "acceleration.toml").exists()
    assert cli.main([*command, "--guide-scale", "2"]) != terminal.DONE
    assert "guide_scale 1.0 is now 2.0. Name another --output, or remove" in capsys.readouterr().err
    write_pair(pairs, "noise")
    assert cli.main([*command, "--guide-scale", "1"]) != terminal.DONE
    assert "of another study: the pair noise is another." in capsys.readouterr().err
    (output / "runs" / "study.json").unlink()
    assert cli.main([*command, "--guide-scale", "1"]) != terminal.DONE
    assert "it is not told what they hold for" in capsys.readouterr().err
