"""What holds for every test: no setting of this machine reaches it, and it reaches nothing beyond this machine."""

from __future__ import annotations

import errno
import gc
import os
import socket
import stat
import sys
from collections.abc import Iterator

import pytest

_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [name for name in os.environ if name.startswith("WAN_LOCAL_")]:
        monkeypatch.delenv(name)
    elsewhere = tmp_path_factory.mktemp("home")  # unfinished runs and encodings of one test are not another's
    monkeypatch.setenv("XDG_STATE_HOME", str(elsewhere / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(elsewhere / "local"))


@pytest.fixture
def folders_that_cannot_be_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a file system of a network, or one shared with a virtual machine; Windows flushes no folder anyway."""
    if sys.platform == "win32":
        pytest.skip("no folder is flushed there")
    flush = os.fsync

    def of_files(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", of_files)


@pytest.fixture(scope="session")
def modules_kept() -> list[int]:
    """Hold how many modules there were when what they made was last set aside."""
    return [0]


@pytest.fixture(autouse=True)
def libraries_are_no_garbage(modules_kept: list[int]) -> None:
    """Set aside what imported libraries made: each stage ends with a search for garbage, 0.2 s through all of that."""
    if len(sys.modules) > modules_kept[0] + 50:
        gc.collect()
        gc.freeze()
        modules_kept[0] = len(sys.modules)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let a connection to anywhere but this machine fail the test that tries it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        assert host is None or host in _LOCAL_HOSTS, f"a test wants to connect to {address}"
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
