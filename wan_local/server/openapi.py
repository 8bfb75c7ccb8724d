"""The endpoint's OpenAPI document: the published page, field by field, and the routes of this server."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from wan_local import __version__
from wan_local.request import APPLICATION, Request

_REF = "#/components/schemas/"


def document(base_url: str) -> dict[str, Any]:
    """Return the document for a server at `base_url`."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{APPLICATION} (wan_local)", "version": __version__},
        "servers": [{"url": base_url}],
        "paths": _paths(),
        "components": {
            "schemas": {
                "WanFlf2vInput": _input(),
                "WanFlf2vOutput": _object({"video": {"$ref": f"{_REF}File"}, "seed": _SEED}, ["video", "seed"]),
                "File": _object(_FILE, ["url"]),
                "QueueStatus": _object(_QUEUE_STATUS, ["status", "request_id"]),
                "ValidationError": _object({"detail": {"type": "array", "items": {"type": "object"}}}, ["detail"]),
                "Refusal": {"type": "object"},
            }
        },
    }


@functools.cache
def _fields() -> dict[str, Any]:
    """Return the words and examples of the published page; names, ranges and defaults are the schema's own."""
    text = (resources.files("wan_local.server") / "endpoint_fields.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _input() -> dict[str, Any]:
    schema = Request.model_json_schema()
    properties: dict[str, Any] = {}
    for name, told in schema["properties"].items():
        plain = next((kind for kind in told.get("anyOf", []) if kind.get("type") != "null"), told)
        kept = {key: plain[key] for key in ("type", "enum", "minimum", "maximum") if key in plain}
        if name == "seed":
            kept = {"type": "integer"}  # the page has no bounds; ours are those of the generator, and errors name them
        if told.get("default") is not None:
            kept["default"] = told["default"]
        properties[name] = {"title": name.replace("_", " ").capitalize(), **kept, **_fields()[name]}
    return {**_object(properties, schema["required"]), "x-fal-order-properties": list(properties)}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_SEED = {"type": "integer", "title": "Seed", "description": "The seed used for generation."}
_FILE = {
    "url": {"type": "string"},
    "content_type": {"type": ["string", "null"]},
    "file_name": {"type": ["string", "null"]},
    "file_size": {"type": ["integer", "null"]},
}
_QUEUE_STATUS = {
    "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
    "request_id": {"type": "string"},
    "response_url": {"type": "string"},
    "status_url": {"type": "string"},
    "cancel_url": {"type": "string"},
    "logs": {"type": ["array", "null"], "items": {"type": "object"}},
    "metrics": {"type": "object"},
    "queue_position": {"type": "integer"},
    "error": {"type": "string"},
    "error_type": {"type": ["string", "null"]},
}
_REQUEST_ID = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}
_LOGS = {"name": "logs", "in": "query", "schema": {"type": "boolean"}}
_WEBHOOK = {"name": "fal_webhook", "in": "query", "schema": {"type": "string"}}


def _paths() -> dict[str, Any]:
    one = f"/queue/{APPLICATION}/requests/{{request_id}}"
    output, status = "WanFlf2vOutput", "QueueStatus"
    return {
        f"/run/{APPLICATION}": {"post": _operation("run", {200: output, 422: "ValidationError"}, body=True)},
        f"/queue/{APPLICATION}": {"post": _operation("submit", {200: status}, body=True, parameters=[_WEBHOOK])},
        one: {"get": _operation("result", {200: output, 422: "ValidationError"}, parameters=[_REQUEST_ID])},
        f"{one}/status": {"get": _operation("status", {200: status, 202: status}, parameters=[_REQUEST_ID, _LOGS])},
        f"{one}/cancel": {"put": _operation("cancel", {202: "Refusal"}, parameters=[_REQUEST_ID])},
    }


def _operation(
    name: str, answers: dict[int, str], *, body: bool = False, parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "responses": {
            **{str(code): _content(schema) for code, schema in answers.items()},
            "default": _content("Refusal"),
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": _content("WanFlf2vInput")["content"]}
    return operation


def _content(schema: str) -> dict[str, Any]:
    return {"description": schema, "content": {"application/json": {"schema": {"$ref": f"{_REF}{schema}"}}}}
