"""The command line: flags in, a video and words on the terminal out. The only room that prints.

One module a command: its `add` draws the flags and sets `run`, which takes the options and returns the exit code.
Every field of a request is a flag, made from the schema itself. The result goes to stdout, all else to stderr.
Exit codes: 0 done, 1 the run failed, 2 the request or a setting is wrong, 130 stopped by Ctrl-C, 141 nobody reads what
is printed any more, 143 terminated, 129 its terminal was closed.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import cast

from wan_local import __version__
from wan_local.cli import (
    bench,
    cache,
    convert,
    doctor,
    download,
    export,
    generate,
    inspect,
    plan,
    resume,
    runs,
    serve,
    tune,
)
from wan_local.cli.flags import flag, given
from wan_local.cli.terminal import FAILED, INTERRUPTED, UNREAD, WRONG_REQUEST, say
from wan_local.errors import Cancelled, InvalidRequest, WanLocalError, WrongSetting

_COMMANDS = (
    generate,
    resume,
    runs,
    cache,
    plan,
    inspect,
    doctor,
    tune,
    download,
    convert,
    export,
    bench,
    serve,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _print_everything()
    options = parser().parse_args(arguments)
    run = cast(Callable[[argparse.Namespace], int], options.run)
    try:
        with _stopped_by_signals():
            code = run(options)
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        _let_go_of_output()
        return UNREAD
    except (KeyboardInterrupt, Cancelled):
        say("Stopped. No part of a video was left behind.")
        return INTERRUPTED
    except InvalidRequest as error:
        say("The request is not valid:")
        for entry in error.detail:
            say(f"  {flag(str(entry['loc'][-1]))}: {entry['msg']}{given(entry)}")
        return WRONG_REQUEST
    except WrongSetting as error:
        say(f"A setting is wrong: {error}")
        return WRONG_REQUEST
    except WanLocalError as error:
        say(f"{type(error).__name__}: {error}")
        return FAILED


def _print_everything() -> None:
    """Let letters of a path that the output cannot hold (a file's on Windows: cp1252) be escaped, and fail nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    root = argparse.ArgumentParser(
        prog="wan-local", description="Wan-2.1 first-last-frame-to-video on your own machine."
    )
    root.add_argument("--version", action="version", version=f"wan-local {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return root


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let `kill`, `timeout` and a closed terminal end the run as Ctrl-C does, so that no half-written file stays."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # SIGHUP: the terminal was closed
    previous = {name: signal.getsignal(getattr(signal, name)) for name in names}
    heard = [name for name in names if previous[name] != signal.SIG_IGN]  # nohup ignores it, and is to be obeyed
    for name in heard:
        signal.signal(getattr(signal, name), stop)
    try:
        yield
    finally:
        for name in heard:
            signal.signal(getattr(signal, name), previous[name])


def _let_go_of_output() -> None:
    """Point what nobody reads any more at nothing, so that the interpreter's last flush does not fail on it."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nothing, stream.fileno())
