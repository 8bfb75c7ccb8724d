"""A server with a stub engine in a process of its own: python stub_server.py FOLDER PORT; prints its address.

The engine notes each prompt that it begins in FOLDER/begun.txt, and takes 5 ms a request.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from wan_local.jobs import Ticket
from wan_local.request import File, Request, Result, Step
from wan_local.server.options import ServerOptions
from wan_local.server.process import _config, _listen, opened

folder = Path(sys.argv[1])


def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
    with (folder / "begun.txt").open("a") as file:
        file.write(f"{request.prompt}\n")
    time.sleep(0.005)
    yield Step("denoise", 1, 1, "a step", 0.1)
    path = folder / f"{ticket.id}.mp4"
    path.write_bytes(b"a video")
    yield Result(video=File(url=path.as_uri(), file_name=path.name, file_size=7, path=path), seed=request.seed or 1)


if __name__ == "__main__":
    options = ServerOptions(port=int(sys.argv[2]))
    listening = _listen(options)
    options = replace(options, port=listening.getsockname()[1])
    with listening, opened(folder, engine, options) as server:
        print(options.base_url, flush=True)
        uvicorn.Server(_config(server.app, None)).run(sockets=[listening])
