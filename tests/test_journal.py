"""The journal: whatever moment a process dies at, the next one knows every job and its place in the line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_local.errors import DeviceFailed, InvalidRequest, OutputError
from wan_local.failure import RecordedFailure, describe
from wan_local.jobs import Job, Queue, Ticket
from wan_local.journal import Journal, Recovered
from wan_local.request import File, Request, Result, Step

SOON = 5.0


def request(prompt: str = "x", **more: object) -> Request:
    return Request(prompt=prompt, start_image_url="http://a/", end_image_url=Path("b.png"), **more)


class Engine:
    """Notes the order of prompts; waits for its gate; fails for the prompt "bad"."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.gate = threading.Event()

    def __call__(self, request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        self.prompts.append(request.prompt)
        assert self.gate.wait(SOON)
        if request.prompt == "bad":
            raise RuntimeError("out of paint")
        yield Step("denoise", 1, 1, "a step", 0.1)
        yield Result(video=File(url="file:///v.mp4", file_name="v.mp4", file_size=3, path=Path("/v.mp4")), seed=7)


def recovered(folder: Path) -> Recovered:
    return Journal(folder).recover()


def test_waiting_and_running_jobs_come_back_in_their_order(tmp_path: Path) -> None:
    engine = Engine()
    queue = Queue(engine, records=Journal(tmp_path))
    low = queue.submit(request("low"), priority="low", webhook_url="http://127.0.0.1/hook", base_url="http://a:1")
    jobs = [queue.submit(request(str(number), seed=number)) for number in range(20)]
    found = recovered(tmp_path)  # as after a kill: nothing was closed
    assert [job.id for job in found.waiting] == [low.id, *(job.id for job in jobs)]
    again = found.waiting[0]
    assert (again.priority, again.webhook_url, again.base_url) == ("low", "http://127.0.0.1/hook", "http://a:1")
    assert found.waiting[3].request == jobs[2].request
    engine.gate.set()
    queue.close()

    second = Engine()
    second.gate.set()
    queue = Queue(second, records=Journal(tmp_path))
    queue.restore(found.ended, found.waiting)
    for job in found.waiting:
        assert queue.wait(job, SOON)
    assert second.prompts == [*map(str, range(20)), "low"]
    queue.close()


def test_a_start_timeout_is_kept_once_and_counts_from_the_restart(tmp_path: Path) -> None:
    engine = Engine()
    queue = Queue(engine, records=Journal(tmp_path))
    running = queue.submit(request("running"), start_timeout=2.0)
    while queue.status(running).state == "IN_QUEUE":
        time.sleep(0.001)
    queue.submit(request("waiting"), start_timeout=2.0)
    time.sleep(2.1)  # the process dies, and it is a while until the next one
    found = recovered(tmp_path)
    assert [job.start_timeout for job in found.waiting] == [None, 2.0]
    second = Engine()
    second.gate.set()
    later = Queue(second, records=Journal(tmp_path / "later"))
    later.restore([], found.waiting)
    for job in found.waiting:
        assert later.wait(job, SOON) and job.result is not None, job.error
    engine.gate.set()
    queue.close()
    later.close()


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    engine = Engine()
    engine.gate.set()
    queue = Queue(engine, records=Journal(tmp_path))
    good, bad = queue.submit(request("good")), queue.submit(request("bad"))
    wrong = queue.reject(InvalidRequest.field("seed", "int_type", "no", value="x"))
    for job in (good, bad):
        assert queue.wait(job, SOON)
    found = {job.id: job for job in recovered(tmp_path).ended}
    assert set(found) == {good.id, bad.id, wrong.id}
    again = found[good.id]
    assert again.result is not None
    assert (again.result.seed, again.result.video.path) == (7, Path("/v.mp4"))
    assert [entry["message"] for entry in again.logs] == ["a step"]
    for job in (bad, wrong):
        error = found[job.id].error
        assert error is not None and job.error is not None
        assert describe(error) == describe(job.error)
    assert isinstance(found[bad.id].error, RecordedFailure)
    restored = Queue(engine)
    restored.restore(list(found.values()), [])
    assert restored.status(again).metrics["inference_time"] == pytest.approx(
        queue.status(good).metrics["inference_time"], abs=0.05
    )
    queue.close()


def test_a_closed_queue_leaves_its_jobs_for_the_next(tmp_path: Path) -> None:
    engine = Engine()
    queue = Queue(engine, records=Journal(tmp_path))
    jobs = [queue.submit(request(str(number))) for number in range(3)]
    threading.Timer(0.05, engine.gate.set).start()
    queue.close()
    assert [job.id for job in recovered(tmp_path).waiting] == [job.id for job in jobs]


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    engine = Engine()
    queue = Queue(engine, records=Journal(tmp_path))
    queue.submit(request("first"))
    job = queue.submit(request("second"))
    queue.cancel(job)
    found = recovered(tmp_path)
    assert [job.request.prompt for job in found.waiting if job.request] == ["first"]
    assert [entry.id for entry in found.ended] == [job.id]
    engine.gate.set()
    queue.close()


def test_what_is_half_written_or_damaged_does_not_stand_in_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    queue = Queue(engine, records=Journal(tmp_path))
    jobs = [queue.submit(request(str(number))) for number in range(3)]
    (tmp_path / f".{1:019d}-half.request.json.77-ab.part").write_text("{")
    records = sorted(tmp_path.glob("*.request.json"))
    records[1].write_text("{")
    (tmp_path / f"{9:019d}-x.outcome.json").write_text(json.dumps({"id": "x"}))
    found = recovered(tmp_path)
    assert [job.id for job in found.waiting] == [jobs[0].id, jobs[2].id]
    assert found.ended == []
    assert caplog.text.count("cannot be read and is left there") == 2
    assert not list(tmp_path.glob(".*.part"))
    engine.gate.set()
    queue.close()


def test_a_death_between_outcome_and_request_runs_nothing_twice(tmp_path: Path) -> None:
    engine = Engine()
    engine.gate.set()
    queue = Queue(engine, records=Journal(tmp_path))
    job = queue.submit(request())
    kept = next(tmp_path.glob("*.request.json")).read_text() if list(tmp_path.glob("*.request.json")) else None
    assert queue.wait(job, SOON)
    name = next(tmp_path.glob("*.outcome.json")).name.replace(".outcome.", ".request.")
    (tmp_path / name).write_text(kept or json.dumps(_record(job)))
    found = recovered(tmp_path)
    assert ([job.id for job in found.ended], found.waiting) == ([job.id], [])
    assert not (tmp_path / name).exists()
    queue.close()


def _record(job: Job) -> dict[str, object]:
    fields = {"prompt": "x", "start_image_url": "a", "end_image_url": "b"}
    return {
        "id": job.id, "request": fields, "priority": "normal", "start_timeout": None, "webhook_url": None,
    }  # fmt: skip


def test_new_jobs_come_after_those_of_the_last_process(tmp_path: Path) -> None:
    held = Engine()
    queue = Queue(held, records=Journal(tmp_path))
    old = [queue.submit(request(f"old {number}")).id for number in range(3)]
    journal = Journal(tmp_path)
    journal.recover()
    second = Queue(held, records=journal)
    new = second.submit(request("new")).id
    assert [job.id for job in recovered(tmp_path).waiting] == [*old, new]
    held.gate.set()
    queue.close()
    second.close()


def test_forgotten_jobs_leave_no_file(tmp_path: Path) -> None:
    queue = Queue(Engine(), records=Journal(tmp_path), keep_jobs=2)
    for _ in range(10):
        queue.reject(InvalidRequest.field("seed", "t", "m", value=0))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_request_that_cannot_be_written_is_not_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "requests"
    queue = Queue(Engine(), records=Journal(folder))
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        queue.submit(request())
    assert queue.unfinished == 0


def test_jobs_outlive_a_device_failure_and_the_one_that_fails_it_thrice_is_failed(tmp_path: Path) -> None:
    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        yield Step("denoise", 1, 1, "a step", 0.1)
        assert gate.wait(SOON)
        raise DeviceFailed("cuda:0 answers no more.")

    gate = threading.Event()
    ended: list[str] = []
    first = Queue(engine, records=Journal(tmp_path), on_end=lambda job: ended.append(job.id))
    jobs = [first.submit(request(str(number))) for number in range(3)]
    attached = first.submit(request("on a connection"), attached=True)
    gate.set()
    assert first.wait(jobs[0], SOON) and first.wait(attached, SOON)
    assert [job.state for job in jobs] == ["COMPLETED", "IN_QUEUE", "IN_QUEUE"]
    first.close()
    assert ended == [attached.id]
    for life in (1, 2):
        journal = Journal(tmp_path)
        found = journal.recover()
        assert [job.id for job in found.waiting] == [job.id for job in jobs]
        assert [job.device_failures for job in found.waiting] == [life, 0, 0]
        queue = Queue(engine, records=journal)
        queue.restore(found.ended, found.waiting)
        assert queue.wait(found.waiting[0], SOON)
        queue.close()
    found = recovered(tmp_path)
    assert [job.id for job in found.waiting] == [job.id for job in jobs[1:]]
    [failed] = [job for job in found.ended if job.id == jobs[0].id]
    assert "answers no more. It was run 3 times" in str(failed.error)


def test_a_job_that_was_cancelled_before_it_failed_the_device_does_not_come_back(tmp_path: Path) -> None:
    begun, gate = threading.Event(), threading.Event()

    def failing(_: Request, __: Ticket) -> Iterator[Step | Result]:
        begun.set()
        assert gate.wait(SOON)
        yield from ()
        raise DeviceFailed("cuda:0 answers no more.")

    journal = Journal(tmp_path)
    queue = Queue(failing, records=journal)
    running, waiting = queue.submit(request("running")), queue.submit(request("waiting"))
    assert begun.wait(SOON) and queue.cancel(running)
    gate.set()
    assert queue.wait(running, SOON)
    queue.close()
    assert [job.id for job in recovered(tmp_path).waiting] == [waiting.id]
