"""The images of a request that somebody else sent: what may be opened, and when.

Data URIs are decoded when the request is submitted, so that the queue holds small things; our own addresses are files
here; everything else is fetched when its turn comes, and not from where only this machine can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from wan_local.errors import InvalidRequest
from wan_local.image import fetch, load_image
from wan_local.jobs import Engine, Ticket
from wan_local.request import Check, Request, Result, Step, as_json
from wan_local.server.files import ServedFiles
from wan_local.server.options import ServerOptions

FIELDS = ("start_image_url", "end_image_url")
Kept = Callable[[str], Mapping[str, bytes]]


def none_kept(_: str) -> Mapping[str, bytes]:
    return {}


def unpack(request: Request, files: ServedFiles) -> Request:
    """Return the request with its data URIs as files. Raises InvalidRequest for what is no image."""
    kept = {}
    for field in FIELDS:
        source = getattr(request, field)
        if isinstance(source, str) and source[:5].lower() == "data:":
            content = fetch(source, field=field, allow_local=False)
            try:
                load_image(content, field=field)
            except InvalidRequest as error:
                raise _with_inputs(error, {field: source}) from error
            kept[field] = files.keep(content, "application/octet-stream").path
    return request.model_copy(update=kept) if kept else request


def fetching(engine: Engine, files: ServedFiles, options: ServerOptions, kept: Kept = none_kept) -> Engine:
    """Return the engine behind a step that opens the images as the options allow.

    kept: those of a job's unfinished run, for where its addresses are gone: it is gone on with all the same.
    """

    def run(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        given = {field: getattr(request, field) for field in FIELDS}
        opened: dict[str, Path | bytes] = {}
        for field, source in given.items():
            ticket.check()
            try:
                opened[field] = _open(source, field, files, options, ticket.check)
            except InvalidRequest:
                pictures = kept(ticket.id)
                if field not in pictures:
                    raise
                opened[field] = pictures[field]
        try:
            yield from engine(request.model_copy(update=opened), ticket)
        except InvalidRequest as error:
            raise _with_inputs(error, given) from error

    return run


def _open(source: str | Path, field: str, files: ServedFiles, options: ServerOptions, check: Check) -> Path | bytes:
    if isinstance(source, Path):
        return source
    if (path := files.path_of_url(source)) is not None:
        return path
    return fetch(
        source,
        field=field,
        allow_local=options.allow_local_files,
        allow_private=options.allow_private_urls,
        check=check,
    )


def _with_inputs(error: InvalidRequest, given: dict[str, str | Path]) -> InvalidRequest:
    """Return the error with the values that the caller sent: where the images lie here is not their business."""
    detail = []
    for entry in error.detail:
        source = given.get(entry["loc"][-1])
        detail.append(entry if source is None else {**entry, "input": _told(source)})
    return InvalidRequest(detail)


def _told(source: str | Path) -> str:
    return source.name if isinstance(source, Path) else str(as_json(source))
