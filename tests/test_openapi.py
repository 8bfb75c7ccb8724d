"""The OpenAPI document is the endpoint's published page, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.endpoint_page import parse_page
from wan_local.server.openapi import document

GOLDEN = json.loads((Path(__file__).parent / "golden" / "endpoint.json").read_text())
SCHEMAS: dict[str, Any] = document("http://127.0.0.1:8787")["components"]["schemas"]
KINDS = {"float": "number", "ResolutionEnum": "string", "AccelerationEnum": "string", "AspectRatioEnum": "string"}


def test_it_has_the_pages_fields_in_the_pages_order() -> None:
    assert list(SCHEMAS["WanFlf2vInput"]["properties"]) == list(GOLDEN["input"])
    assert list(SCHEMAS["WanFlf2vOutput"]["properties"]) == list(GOLDEN["output"])
    for half, name in (("input", "WanFlf2vInput"), ("output", "WanFlf2vOutput")):
        required = [field for field, told in GOLDEN[half].items() if told["required"]]
        assert SCHEMAS[name]["required"] == required


@pytest.mark.parametrize("name", GOLDEN["input"])
def test_every_field_is_as_on_the_page(name: str) -> None:
    ours, told = SCHEMAS["WanFlf2vInput"]["properties"][name], GOLDEN["input"][name]
    assert ours["type"] == KINDS.get(told["type"], told["type"])
    assert ours["description"] == told["description"]
    assert ours.get("default") == told.get("default")
    assert ours.get("enum") == told.get("options")
    assert ours.get("examples") == told.get("examples")
    assert [ours.get("minimum"), ours.get("maximum")] == told.get("range", [None, None])


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(document("http://127.0.0.1:8787"))
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(SCHEMAS)


def test_the_page_is_understood_line_by_line() -> None:
    text = (
        "### Input Schema\n\n- **`shift`** (`float`, _optional_):\n  How far. Default value: `5`\n  - Default: `5`\n"
        "  - Range: `1` to `10`\n  - Options: `1`, `2`\n\n### Output Schema\n\n- **`seed`** (`integer`, _required_):\n"
        "  The seed.\n\n## Usage Examples\n"
    )
    assert parse_page(text)["input"]["shift"] == {
        "type": "float", "required": False, "description": "How far. Default value: `5`", "default": 5,
        "range": [1, 10], "options": [1, 2],
    }  # fmt: skip
    with pytest.raises(ValueError, match="not understood"):
        parse_page(text.replace("- Range", "- Rnage"))
