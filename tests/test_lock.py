"""Locks: one holder, known by name to whoever comes second, and gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wan_local.errors import Busy
from wan_local.lock import device_lock_path, holding

HOLD = """
import sys, time
from pathlib import Path
from wan_local.lock import holding
with holding(Path(sys.argv[1]), what="cuda:0", way_out="Wait."):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_and_a_kill_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cuda-0.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with (
            pytest.raises(Busy, match=rf"^cuda:0 is held by process {first.pid} \(.+, since 20..-.*\)\. Wait\.$"),
            holding(path, what="cuda:0", way_out="Wait."),
        ):
            pytest.fail("held twice")
        first.send_signal(signal.SIGKILL)
    with holding(path, what="cuda:0", way_out="Wait."):
        pass


def test_the_same_process_is_told_that_it_is_itself(tmp_path: Path) -> None:
    with (
        holding(tmp_path / "lock", what="it", way_out=""),
        pytest.raises(Busy, match=f"process {os.getpid()} .*which is this process"),
        holding(tmp_path / "lock", what="it", way_out=""),
    ):
        pytest.fail("held twice")
    with pytest.raises(KeyError), holding(tmp_path / "lock", what="it", way_out=""):
        raise KeyError
    with holding(tmp_path / "lock", what="it", way_out=""):
        pass


def test_every_device_has_a_lock_of_its_own() -> None:
    assert device_lock_path("cuda:0") != device_lock_path("cuda:1")
    assert ":" not in device_lock_path("cuda:0").name
