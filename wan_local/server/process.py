"""A server from its settings to its end: folder, journal, queue, socket.

The queue's folder belongs to one server at a time. A server that ends, in whatever way, leaves its queue on disk, and
the next one on that folder takes it up: requests that waited wait again in their order, the one that ran runs again.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import uvicorn

from wan_local.download import check_public
from wan_local.durable import make_output_dir
from wan_local.errors import NotAvailable
from wan_local.jobs import Engine
from wan_local.journal import Journal
from wan_local.lock import holding
from wan_local.runs import kept_pictures
from wan_local.server.app import create_app
from wan_local.server.files import ServedFiles
from wan_local.server.guard import App
from wan_local.server.images import Kept, fetching, none_kept
from wan_local.server.options import ServerOptions, is_loopback
from wan_local.server.tls import Certificate, ensure_certificate
from wan_local.service import Service, pipeline_engine
from wan_local.settings import Settings
from wan_local.webhook import Webhooks

_GRACE_SECONDS = 2  # how long open connections are waited for at the end
_CONNECTIONS = 512
_BACKLOG = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """A server on its folder: its application, its service, and how many jobs it took over."""

    folder: Path
    app: App
    service: Service
    recovered: int


@contextmanager
def opened(output_dir: Path, engine: Engine, options: ServerOptions, *, kept: Kept = none_kept) -> Iterator[Server]:
    """Give a server on the folder, for as long as the block runs. Raises Busy, OutputError. kept: see `fetching`."""
    folder = output_dir / "server"
    make_output_dir(folder)
    way_out = "Use that server, end it, or give this one another --output-dir."
    with holding(folder / "lock", what=f"the queue in {folder}", way_out=way_out):
        files = ServedFiles(
            folder / "uploads",
            base_url=options.base_url,
            max_upload_bytes=options.max_upload_bytes,
            max_uploads_bytes=options.max_uploads_bytes,
        )
        journal = Journal(folder / "requests")
        service = Service(
            fetching(engine, files, options, kept),
            output_dir=output_dir,
            files=files,
            webhooks=Webhooks(check=_webhook_check(options)),
            records=journal,
        )
        recovered = journal.recover()
        service.queue.restore(recovered.ended, recovered.waiting)
        for job in recovered.ended:
            if job.result is not None and job.result.video.path is not None:
                files.target_of(job.result.video.path)  # its address is good again
        try:
            yield Server(folder, create_app(service, files, options), service, len(recovered.waiting))
        finally:
            service.close()


def serve(settings: Settings, options: ServerOptions, *, ready: Callable[[ServerOptions, Server], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. `ready` is called with the options as they became (the port, if 0 was asked).

    Raises NotAvailable for an address that cannot be listened at, or that is open to the network without a key;
    DeviceFailed as soon as a run has left the card unusable for this process.
    """
    options.check()
    make_output_dir(settings.output_dir / "server")
    listening = _listen(options)
    options = replace(options, port=listening.getsockname()[1])
    certificate = ensure_certificate(settings.output_dir / "server" / "tls", options.host) if options.tls else None
    engine, kept = pipeline_engine(settings), functools.partial(kept_pictures, settings)
    with listening, opened(settings.output_dir, engine, options, kept=kept) as server:
        running, queue = uvicorn.Server(_config(server.app, certificate)), server.service.queue
        ready(options, server)

        def stop() -> None:
            running.should_exit = True

        queue.on_device_failure(stop)
        running.run(sockets=[listening])
        if queue.device_failure is not None:
            raise queue.device_failure


def _config(app: App, certificate: Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_certfile=None if certificate is None else certificate.certificate,
        ssl_keyfile=None if certificate is None else certificate.key,
    )


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
        listening.listen(_BACKLOG)  # from now on nobody is turned away
    except OSError as error:
        listening.close()
        way_out = "End what listens there, or choose another --port." if options.port else "Choose another --host."
        raise NotAvailable(f"{options.host} port {options.port}: {error.strerror or error}. {way_out}") from error
    return listening


def _webhook_check(options: ServerOptions) -> Callable[[str], str | None] | None:
    """Return what webhooks are checked with: clients on this machine may name anything here, others nothing private."""

    def check(url: str) -> str | None:
        here = options.loopback and is_loopback(httpx.URL(url).host)
        return None if here else check_public(url)

    return None if options.allow_private_urls else check
