"""`wan-local serve`: the endpoint on this machine, for clients that cannot be changed, and a page for people."""

from __future__ import annotations

import argparse
import logging
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_kernel_flags, add_lora_flag, add_memory_flags, add_place_flags, settings_from
from wan_local.cli.terminal import DONE, FAILED, say
from wan_local.errors import DeviceFailed, NotAvailable

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.server.options import ServerOptions
    from wan_local.server.process import Server

_TAKEN_UP = "What waited or ran is taken up again by the next `wan-local serve` on the same folder."
_NEEDED = ("fastapi", "uvicorn", "cryptography")


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "serve",
        help="answer fal_client, @fal-ai/client, curl and browsers on this machine",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=_serve)
    place = parser.add_argument_group("where and how")
    add_place_flags(place)
    add_kernel_flags(place)
    add_memory_flags(place)
    add_lora_flag(place)
    place.add_argument("--output-dir", type=Path, metavar="DIR", help="where videos, uploads and the queue are kept")
    place.add_argument("--host", help="address to listen at (default: 127.0.0.1; others need --api-key)")
    place.add_argument("--port", type=int, help="port to listen at, 0 for a free one (default: 8787)")
    place.add_argument(
        "--tls", action="store_true", help="serve https, and print how fal_client finds it by environment"
    )
    who = parser.add_argument_group("who may do what")
    who.add_argument("--api-key", metavar="KEY", help="clients must show this key (or WAN_LOCAL_API_KEY)")
    who.add_argument(
        "--cors-origin", action="append", metavar="ORIGIN",
        help="a page of this origin may use the server, such as http://localhost:3000; may be given several times",
    )  # fmt: skip
    who.add_argument("--allow-local-files", action="store_true", help="take paths and file:// as images")
    who.add_argument(
        "--allow-private-urls", action="store_true", help="fetch images from addresses of this network too"
    )


def _serve(options: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise NotAvailable(f"the server needs {', '.join(missing)}: pip install 'wan_local[server]'")
    from wan_local.server.options import ServerOptions
    from wan_local.server.process import serve
    from wan_local.settings import server_key

    given = vars(options)
    names = ("host", "port", "tls", "allow_local_files", "allow_private_urls")
    settings = settings_from(given)
    origins = tuple(origin.lower().rstrip("/") for origin in given.get("cors_origin", ()))
    wanted = {name: given[name] for name in names if name in given}
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        key = given.get("api_key") or server_key()
        serve(settings, ServerOptions(**wanted, cors_origins=origins, api_key=key), ready=_say_where)
    except KeyboardInterrupt:
        say(f"Stopped. {_TAKEN_UP}")
    except DeviceFailed as error:
        say(f"{error} The server ends. {_TAKEN_UP}")
        return FAILED
    return DONE


def _say_where(options: ServerOptions, server: Server) -> None:
    url = options.base_url
    say(f"wan_local serves fal-ai/wan-flf2v at {url} (the page is at {url}/; Ctrl-C ends it)")
    if server.recovered:
        say(f"{server.recovered} requests that had not ended are taken up again.")
    if options.tls:
        address = url.removeprefix("https://")
        bundle = server.folder / "tls" / "bundle.pem"
        say("Unmodified fal_client, by environment (everything but uploads):")
        say(
            f"  export FAL_KEY={shlex.quote(options.api_key or 'local')} FAL_RUN_HOST={address}/run "
            f"FAL_QUEUE_RUN_HOST={address}/queue SSL_CERT_FILE={shlex.quote(str(bundle))}"
        )
    else:
        say(f'Unmodified fal_client:    wan_local.redirect("{url}")')
    say(f'Unmodified @fal-ai/client: fal.config({{ proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }})')
