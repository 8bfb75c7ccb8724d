"""The request schema: the endpoint's fifteen fields, its coercions, and the exact body of every refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from wan_local.errors import InvalidRequest
from wan_local.request import APPLICATION, DEFAULT_NEGATIVE_PROMPT, File, Request, Result, Step

ARGUMENTS: dict[str, Any] = {"prompt": "a cat", "start_image_url": "a.png", "end_image_url": "b.png"}

# The published page of the endpoint: name -> default, in its order; ... is required.
FIELDS: dict[str, Any] = {
    "prompt": ...,
    "negative_prompt": "bright colors, overexposed, static, blurred details, subtitles, style, artwork, painting, picture, still, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, malformed limbs, fused fingers, still picture, cluttered background, three legs, many people in the background, walking backwards",  # noqa: E501
    "start_image_url": ...,
    "end_image_url": ...,
    "num_frames": 81,
    "frames_per_second": 16,
    "seed": None,
    "resolution": "720p",
    "num_inference_steps": 30,
    "guide_scale": 5.0,
    "shift": 5.0,
    "enable_safety_checker": False,
    "enable_prompt_expansion": False,
    "acceleration": "regular",
    "aspect_ratio": "auto",
}

NOT_A_WHOLE_NUMBER = "Input should be a valid integer, got a number with a fractional part"
NOT_PARSED = "Input should be a valid integer, unable to parse string as an integer"
NOT_A_BOOLEAN = "Input should be a valid boolean, unable to interpret input"

# field, value, what it becomes (endpoint.md 3.1, proved against FastAPI with pydantic 2)
ACCEPTED: list[tuple[str, Any, Any]] = [
    *[("num_frames", value, 81) for value in ("81", " 81 ", "81.0", 81.0, None)],
    *[("num_frames", value, value) for value in (81, 82, 85, 97, 100)],
    *[("frames_per_second", value, value) for value in (5, 16, 24)],
    ("frames_per_second", None, 16),
    *[("seed", value, value) for value in (None, 0, -1, 42, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63))],
    *[("seed", value, 42) for value in ("42", 42.0, " 42 ")],
    ("seed", True, 1),
    *[("num_inference_steps", value, value) for value in (2, 30, 40)],
    *[(field, value, float(value)) for field in ("guide_scale", "shift") for value in (1, 5, 10, "5", 1.0, "7.5")],
    *[("resolution", value, value) for value in ("480p", "720p")],
    *[("acceleration", value, value) for value in ("none", "regular")],
    *[("aspect_ratio", value, value) for value in ("auto", "16:9", "9:16", "1:1")],
    *[
        (field, value, meaning)
        for field in ("enable_safety_checker", "enable_prompt_expansion")
        for meaning, values in ((True, (True, "true", "yes", 1, "on")), (False, (False, "false", "no", 0, "off")))
        for value in values
    ],
    *[("prompt", value, value) for value in ("", "x", "y" * 20_000, "🐈 مرحبا\n", "a\0b", "&amp;")],
    ("negative_prompt", "", ""),
    ("start_image_url", "", ""),
    ("end_image_url", "data:image/png;base64,xxxx", "data:image/png;base64,xxxx"),
]

# field, value, type, msg, ctx
REFUSED: list[tuple[str, Any, str, str, dict[str, Any] | None]] = [
    ("num_frames", 80, "greater_than_equal", "Input should be greater than or equal to 81", {"ge": 81}),
    ("num_frames", 101, "less_than_equal", "Input should be less than or equal to 100", {"le": 100}),
    ("num_frames", True, "greater_than_equal", "Input should be greater than or equal to 81", {"ge": 81}),
    ("num_frames", 81.5, "int_from_float", NOT_A_WHOLE_NUMBER, None),
    ("num_frames", "abc", "int_parsing", NOT_PARSED, None),
    ("num_frames", "", "int_parsing", NOT_PARSED, None),
    ("num_frames", [81], "int_type", "Input should be a valid integer", None),
    ("frames_per_second", 4, "greater_than_equal", "Input should be greater than or equal to 5", {"ge": 5}),
    ("frames_per_second", 25, "less_than_equal", "Input should be less than or equal to 24", {"le": 24}),
    ("seed", 1.5, "int_from_float", NOT_A_WHOLE_NUMBER, None),
    ("seed", "x", "int_parsing", NOT_PARSED, None),
    ("seed", 2**64, "less_than_equal", f"Input should be less than or equal to {2**64 - 1}", {"le": 2**64 - 1}),
    (
        "seed",
        -(2**63) - 1,
        "greater_than_equal",
        f"Input should be greater than or equal to {-(2**63)}",
        {"ge": -(2**63)},
    ),
    ("num_inference_steps", 1, "greater_than_equal", "Input should be greater than or equal to 2", {"ge": 2}),
    ("num_inference_steps", 41, "less_than_equal", "Input should be less than or equal to 40", {"le": 40}),
    ("num_inference_steps", None, "int_type", "Input should be a valid integer", None),
    *[
        entry
        for field in ("guide_scale", "shift")
        for entry in (
            (field, 0.99, "greater_than_equal", "Input should be greater than or equal to 1", {"ge": 1.0}),
            (field, -0.0, "greater_than_equal", "Input should be greater than or equal to 1", {"ge": 1.0}),
            (field, 10.01, "less_than_equal", "Input should be less than or equal to 10", {"le": 10.0}),
            (field, 16, "less_than_equal", "Input should be less than or equal to 10", {"le": 10.0}),
            (field, None, "float_type", "Input should be a valid number", None),
        )
    ],
    *[
        ("resolution", value, "literal_error", "Input should be '480p' or '720p'", {"expected": "'480p' or '720p'"})
        for value in ("1080p", "720P", None)
    ],
    *[
        (
            "acceleration",
            value,
            "literal_error",
            "Input should be 'none' or 'regular'",
            {"expected": "'none' or 'regular'"},
        )
        for value in ("high", None)
    ],
    (
        "aspect_ratio",
        "4:3",
        "literal_error",
        "Input should be 'auto', '16:9', '9:16' or '1:1'",
        {"expected": "'auto', '16:9', '9:16' or '1:1'"},
    ),
    *[("enable_safety_checker", value, "bool_parsing", NOT_A_BOOLEAN, None) for value in ("maybe", 2)],
    ("enable_prompt_expansion", None, "bool_type", "Input should be a valid boolean", None),
    *[("prompt", value, "string_type", "Input should be a valid string", None) for value in (None, 5)],
    ("negative_prompt", None, "string_type", "Input should be a valid string", None),
    *[
        (field, value, "string_type", "Input should be a valid string", None)
        for field in ("start_image_url", "end_image_url")
        for value in (None, {"url": "http://x/y.png"}, ["a.png"], 5)
    ],
]


def detail(arguments: object) -> list[dict[str, Any]]:
    with pytest.raises(InvalidRequest) as caught:
        Request.from_arguments(arguments)
    assert caught.value.status_code == 422
    json.dumps(caught.value.detail, allow_nan=False).encode()  # it can be a response's body
    return caught.value.detail


def test_the_fields_and_defaults_are_the_published_ones() -> None:
    fields = Request.model_fields
    assert {name: ... if field.is_required() else field.default for name, field in fields.items()} == FIELDS
    assert list(fields) == list(FIELDS)
    assert APPLICATION == "fal-ai/wan-flf2v"
    assert FIELDS["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT


@pytest.mark.parametrize(("field", "value", "meaning"), ACCEPTED)
def test_value_is_accepted_and_coerced_as_the_endpoint_does(field: str, value: Any, meaning: Any) -> None:
    request = Request.from_arguments(ARGUMENTS | {field: value})
    assert getattr(request, field) == meaning
    assert type(getattr(request, field)) is type(meaning)


@pytest.mark.parametrize(("field", "value", "type_", "msg", "ctx"), REFUSED)
def test_value_is_refused_with_the_endpoints_body(
    field: str, value: Any, type_: str, msg: str, ctx: dict[str, Any] | None
) -> None:
    expected = {"type": type_, "loc": ["body", field], "msg": msg, "input": value}
    assert detail(ARGUMENTS | {field: value}) == [expected | ({"ctx": ctx} if ctx else {})]


@pytest.mark.parametrize("field", ["guide_scale", "shift"])
@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_nan_and_infinity_are_refused_and_spelled_out(field: str, value: float, word: str) -> None:
    (entry,) = detail(ARGUMENTS | {field: value})
    assert (entry["type"], entry["input"]) == ("less_than_equal", word)


@pytest.mark.parametrize("names", [["prompt"], ["start_image_url", "end_image_url"], list(ARGUMENTS)])
def test_missing_fields_are_listed_in_order_with_the_whole_body_as_input(names: list[str]) -> None:
    arguments = {name: value for name, value in ARGUMENTS.items() if name not in names}
    assert detail(arguments) == [
        {"type": "missing", "loc": ["body", name], "msg": "Field required", "input": arguments} for name in names
    ]


@pytest.mark.parametrize(
    "arguments",
    [{"input": ARGUMENTS}, {"prompt_": "x", "first_frame_image_url": "a", "end_frame_url": "b"}],
)
def test_wrapped_or_misnamed_fields_are_missing_fields(arguments: dict[str, Any]) -> None:
    assert [entry["loc"][1] for entry in detail(arguments)] == ["prompt", "start_image_url", "end_image_url"]


def test_every_wrong_field_is_listed_at_once() -> None:
    entries = detail(ARGUMENTS | {"num_frames": 80, "resolution": "1080p", "shift": 16})
    assert [entry["loc"] for entry in entries] == [["body", name] for name in ("num_frames", "resolution", "shift")]


def test_an_invalid_request_names_every_field_in_one_line() -> None:
    with pytest.raises(InvalidRequest, match=r"num_frames: Input .* 81; shift: Input .* 10"):
        Request.from_arguments(ARGUMENTS | {"num_frames": 80, "shift": 11})


def test_unknown_fields_are_ignored() -> None:
    extra = {"cfg": 6, "guidance_scale": 3, "foo": None}
    assert Request.from_arguments(ARGUMENTS | extra) == Request.from_arguments(ARGUMENTS)


@pytest.mark.parametrize("body", [[ARGUMENTS], None, "prompt", 5])
def test_a_body_that_is_no_object_has_the_endpoints_error(body: object) -> None:
    msg = "Input should be a valid dictionary or object to extract fields from"
    assert detail(body) == [{"type": "model_attributes_type", "loc": ["body"], "msg": msg, "input": body}]


def test_a_binary_body_is_described_and_not_echoed() -> None:
    assert detail(b"123")[0]["input"] == "<binary 3 bytes>"


def test_lone_surrogates_are_refused_and_their_echo_can_be_sent() -> None:
    for field in ("prompt", "negative_prompt", "start_image_url"):
        (entry,) = detail(ARGUMENTS | {field: "a\ud800b"})
        assert (entry["type"], entry["input"]) == ("string_unicode", r"a\ud800b")
    assert detail({"start_image_url": Path("a\udcffb")})[0]["input"] == {"start_image_url": r"a\udcffb"}


def test_any_key_and_any_depth_can_be_sent_back() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = {"a": [deep]}
    with pytest.raises(InvalidRequest) as error:
        Request.from_arguments({"prompt": deep, "\ud800": 1})
    told = json.dumps(error.value.detail, ensure_ascii=False).encode()
    assert b'"..."' in told and rb"\\ud800" in told and len(told) < 5000


def test_keywords_raise_pydantics_own_error() -> None:
    with pytest.raises(ValidationError):
        Request(prompt="x", start_image_url="a", end_image_url="b", num_frames=80)


def test_in_process_images_may_be_paths_bytes_and_pil_images() -> None:
    picture = Image.new("RGB", (64, 64))
    for source in (Path("a.png"), b"\x89PNG", picture):
        assert Request(prompt="x", start_image_url=source, end_image_url="b").start_image_url is source
    (entry,) = detail({"start_image_url": picture, "end_image_url": b"xyz"})
    assert entry["input"] == {"start_image_url": "<image 64x64 RGB>", "end_image_url": "<binary 3 bytes>"}


def test_a_request_is_frozen_and_passes_through_unchanged() -> None:
    request = Request.from_arguments(ARGUMENTS)
    assert Request.from_arguments(request) is request
    with pytest.raises(ValidationError):
        request.prompt = "another"  # type: ignore[misc]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(list(FIELDS)), JSON, max_size=6))
def test_any_json_gives_a_request_or_the_endpoints_error(values: dict[str, Any]) -> None:
    try:
        request = Request.from_arguments(ARGUMENTS | values)
    except InvalidRequest as error:
        named = [entry["loc"][1] for entry in error.detail]
        assert set(named) <= set(values)
        json.dumps(error.detail, allow_nan=False)
        return
    assert 81 <= request.num_frames <= 100
    assert 5 <= request.frames_per_second <= 24
    assert 1 <= request.guide_scale <= 10
    assert 1 <= request.shift <= 10
    assert request.seed is None or -(2**63) <= request.seed < 2**64


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-(2**70), 2**70))
def test_an_integer_means_the_same_as_number_and_as_text(value: int) -> None:
    outcomes = []
    for spelled in (value, str(value), f" {value} "):
        try:
            outcomes.append(Request.from_arguments(ARGUMENTS | {"seed": spelled}).seed)
        except InvalidRequest as error:
            outcomes.append(error.detail[0]["type"] in ("less_than_equal", "greater_than_equal", "int_parsing_size"))
    assert len(set(outcomes)) == 1


def test_a_result_dumps_to_the_endpoints_output_and_nothing_else() -> None:
    video = File(url="file:///x/a.mp4", file_name="a.mp4", file_size=3, path=Path("/x/a.mp4"))
    result = Result(video=video, seed=7, report={"seconds": 1.0})
    assert result.model_dump() == {
        "video": {"url": "file:///x/a.mp4", "content_type": "video/mp4", "file_name": "a.mp4", "file_size": 3},
        "seed": 7,
    }
    assert list(result.model_dump()["video"]) == ["url", "content_type", "file_name", "file_size"]
    assert result.video.path == Path("/x/a.mp4")
    assert result.report == {"seconds": 1.0}


def test_a_step_becomes_an_event_that_json_can_carry() -> None:
    step = Step("denoise", 3, 30, "step 3 of 30", 12.5, preview=np.zeros((2, 3, 3), np.uint8))
    event = json.loads(json.dumps(step.as_event()))
    assert event.pop("preview").startswith("data:image/png;base64,")
    assert event == {
        "stage": "denoise",
        "index": 3,
        "total": 30,
        "message": "step 3 of 30",
        "elapsed_seconds": 12.5,
        "eta_seconds": None,
    }
    assert Step("text", 1, 1, "", 0.0).as_event()["preview"] is None
