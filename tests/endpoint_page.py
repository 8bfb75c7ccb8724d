"""Reads the endpoint's published page (Markdown) into fields: type, default, range, options, description, examples."""

from __future__ import annotations

import json
import re
from typing import Any


def parse_page(text: str) -> dict[str, dict[str, Any]]:
    """Return {"input": fields, "output": fields} of the page."""
    halves = text.split("### Output Schema")
    return {
        "input": _fields(halves[0].split("### Input Schema")[1]),
        "output": _fields(halves[1].split("## Usage Examples")[0]),
    }


def _fields(section: str) -> dict[str, Any]:
    found = {}
    for match in re.finditer(r"^- \*\*`(\w+)`\*\* \(`(\w+)`, _(\w+)_\):\n((?:  .*\n)+)", section, re.MULTILINE):
        name, kind, required, body = match.groups()
        lines = [line.strip() for line in body.splitlines()]
        field: dict[str, Any] = {"type": kind, "required": required == "required", "description": lines[0]}
        for line in lines[1:]:
            if told := re.fullmatch(r"- Default: `(.*)`", line):
                field["default"] = json.loads(told[1])
            elif told := re.fullmatch(r"- Range: `(.*)` to `(.*)`", line):
                field["range"] = [json.loads(told[1]), json.loads(told[2])]
            elif told := re.fullmatch(r"- Options: (.*)", line):
                field["options"] = [json.loads(option) for option in re.findall(r"`(.*?)`", told[1])]
            elif told := re.fullmatch(r"- Examples: (.*)", line):
                field["examples"] = [json.loads(told[1])]
            else:
                raise ValueError(f"{name}: {line!r} is not understood")
        found[name] = field
    return found
