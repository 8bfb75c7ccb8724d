"""Locks: one holder, known by name to whoever comes second, and gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stamps import stamp_request, stamp_settings
from wan_local import pipeline, service
from wan_local.errors import Busy, Cancelled, OutputError
from wan_local.jobs import Ticket
from wan_local.lock import holding, holding_card
from wan_local.pipeline import Pipeline
from wan_local.request import Result, Step

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


def test_a_card_can_be_shared_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with holding_card("cuda-1", shared=False), holding_card("cuda-2", shared=False):
        with (
            pytest.raises(Busy, match=r"the card cuda-1 is held .*WAN_LOCAL_SHARE_DEVICE"),
            holding_card("cuda-1", shared=False),
        ):
            pytest.fail("held twice")
        with holding_card("cuda-1", shared=True):
            pass


def test_a_pipeline_holds_its_card_while_it_runs_and_not_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that is called a card for the occasion."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "card_name", lambda device: f"card-{device}")
    settings = stamp_settings(tmp_path, monkeypatch)
    running = Pipeline(settings).generate(stamp_request())
    with holding_card("card-cpu", shared=False):
        pass
    next(running)
    with pytest.raises(Busy, match="which is this process"):
        next(Pipeline(settings).generate(stamp_request()))
    next(Pipeline(replace(settings, share_device=True)).generate(stamp_request()))
    running.close()
    with holding_card("card-cpu", shared=False):
        pass


def test_a_queue_waits_for_a_card_and_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_LOOK_SECONDS", 0.01)
    tries: list[int] = []

    def run() -> Iterator[Step | Result]:
        tries.append(1)
        if len(tries) < 5:
            raise Busy("the card cuda-1 is held by process 5 (wan-local, since noon).")
        yield Step("denoise", 1, 1, "a step", 0.1)

    steps = list(service.once_free(run, Ticket("x", lambda: None)))
    assert [step.message for step in steps if isinstance(step, Step)] == [
        "the card cuda-1 is held by process 5 (wan-local, since noon).", "a step",
    ]  # fmt: skip

    def cancelled() -> None:
        raise Cancelled("stop")

    tries.clear()
    with pytest.raises(Cancelled):
        list(service.once_free(run, Ticket("x", cancelled)))
    assert len(tries) == 1


def test_a_note_that_cannot_be_written_or_removed_keeps_nobody_from_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("wan_local.durable.write", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        with holding(tmp_path / "lock", what="it", way_out=""):
            pass


def test_a_folder_that_no_lock_can_be_made_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    lock = tmp_path / "file" / "x.lock"
    with (
        pytest.raises(
            OutputError, match=r"the card cuda:0 can't be taken.*x\.lock.*(Not a directory|File exists).*TMPDIR"
        ),
        holding(lock, what="the card cuda:0", way_out="Wait."),
    ):
        raise AssertionError


def test_no_folder_for_temporary_files_at_all_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    with pytest.raises(OutputError, match=r"no place for a lock.*TMPDIR"), holding_card("cuda:0", shared=False):
        raise AssertionError
