"""The queue: order, events, cancel and timeouts, and a worker that nothing a job does can end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from wan_local.errors import Cancelled, DeviceFailed, DoesNotFit, InvalidRequest, WanLocalError
from wan_local.failure import StartTimeout, describe, owner_and_alias, unknown_application
from wan_local.jobs import Job, Queue, Ticket
from wan_local.request import File, Request, Result, Step

SOON = 5.0


def request(prompt: str = "x") -> Request:
    return Request(prompt=prompt, start_image_url="a", end_image_url="b")


def result(seed: int = 1) -> Result:
    return Result(video=File(url="file:///x.mp4"), seed=seed)


def step(index: int = 1, preview: Any = None) -> Step:
    return Step("denoise", index, 3, f"step {index} of 3", 0.1, preview=preview)


class StubEngine:
    """Makes no video; holds at its first step until `gate` is opened, and tells what it was asked and what it did."""

    def __init__(self, *, held: bool = False) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.prompts: list[str] = []
        self.closed: list[str] = []
        if not held:
            self.gate.set()

    def __call__(self, request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        self.prompts.append(request.prompt)
        try:
            for index in (1, 2, 3):
                self.started.set()
                assert self.gate.wait(SOON)
                yield step(index)
            yield result(len(self.prompts))
        finally:
            self.closed.append(request.prompt)


Make = Callable[..., Queue]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build queues that are closed when the test ends."""
    queues: list[Queue] = []

    def build(engine: Any, **options: Any) -> Queue:
        queues.append(Queue(engine, **options))
        return queues[-1]

    yield build
    for queue in queues:
        queue.close(1.0)


def finished(queue: Queue, job: Job) -> Job:
    assert queue.wait(job, SOON), job.state
    return job


# Order and events


def test_jobs_run_first_come_first_served_and_low_ones_last(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    first = queue.submit(request("first"))
    assert engine.started.wait(SOON)
    low = queue.submit(request("low"), priority="low")
    others = [queue.submit(request(str(index))) for index in range(3)]
    assert [queue.status(job).position for job in (first, *others, low)] == [None, 0, 1, 2, 3]
    engine.gate.set()
    finished(queue, low)
    assert engine.prompts == ["first", "0", "1", "2", "low"]
    assert queue.unfinished == 0


def test_a_job_goes_from_queued_to_running_to_completed_with_logs_and_metrics(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    blocker, job = queue.submit(request("blocker")), queue.submit(request())
    assert engine.started.wait(SOON)
    assert (queue.status(blocker).state, queue.status(job).state) == ("IN_PROGRESS", "IN_QUEUE")
    engine.gate.set()
    finished(queue, job)
    status = queue.status(job)
    assert (status.state, status.position, status.error) == ("COMPLETED", None, None)
    assert [entry["message"] for entry in status.logs] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert set(status.logs[0]) == {"message", "level", "source", "timestamp"}
    assert (status.logs[0]["level"], status.logs[0]["source"]) == ("INFO", "USER")
    assert time.strptime(status.logs[0]["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
    assert status.logs[0]["timestamp"].endswith("Z")
    assert status.metrics["inference_time"] >= 0
    assert job.result == result(2)


def test_logs_are_cumulative_and_a_snapshot(make: Make) -> None:
    queue = make(StubEngine())
    job = finished(queue, queue.submit(request()))
    queue.status(job).logs.clear()
    assert len(queue.status(job).logs) == 3


def test_steps_come_to_every_listener_from_the_first_one_on(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    job = queue.submit(request())
    threading.Timer(0.05, engine.gate.set).start()
    assert [step.index for step in queue.steps(job)] == [1, 2, 3]
    assert [step.index for step in queue.steps(job)] == [1, 2, 3]


def test_only_the_newest_step_keeps_its_preview_and_none_when_done(make: Make) -> None:
    gate = threading.Event()
    picture = np.zeros((2, 2, 3), np.uint8)

    def engine(_: Request, ticket: Ticket) -> Iterator[Step | Result]:
        yield step(1, picture)
        yield step(2, picture)
        assert gate.wait(SOON)
        yield result()

    queue = make(engine)
    job = queue.submit(request())
    while len(job.steps) < 2:
        time.sleep(0.001)
    assert [step.preview is None for step in job.steps] == [True, False]
    gate.set()
    finished(queue, job)
    assert all(step.preview is None for step in job.steps)


def test_eight_threads_at_once_are_served_one_at_a_time(make: Make) -> None:
    running: list[str] = []

    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        running.append(request.prompt)
        assert len(running) == 1
        yield step()
        running.remove(request.prompt)
        yield result()

    queue = make(engine)
    jobs: list[Job] = []
    threads = [
        threading.Thread(target=lambda: jobs.extend(queue.submit(request("x")) for _ in range(25))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 200
    for job in jobs:
        assert finished(queue, job).error is None


# Cancel


def test_a_waiting_job_that_is_cancelled_never_runs(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    blocker, job, last = (queue.submit(request(name)) for name in ("blocker", "cancelled", "last"))
    assert queue.cancel(job)
    assert job.state == "COMPLETED"
    assert isinstance(job.error, Cancelled)
    assert queue.status(last).position in (0, 1)
    engine.gate.set()
    finished(queue, last)
    assert engine.prompts == ["blocker", "last"]
    assert finished(queue, blocker).error is None


def test_a_running_job_that_is_cancelled_is_closed_at_its_next_step(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    job, following = queue.submit(request("cancelled")), queue.submit(request("following"))
    assert engine.started.wait(SOON)
    assert queue.cancel(job)
    assert queue.cancel(job)  # twice is fine
    engine.gate.set()
    finished(queue, following)
    assert isinstance(job.error, Cancelled)
    assert [entry["message"] for entry in job.logs] == ["step 1 of 3"]
    assert engine.closed == ["cancelled", "following"]
    assert following.error is None


def test_a_finished_job_cannot_be_cancelled(make: Make) -> None:
    queue = make(StubEngine())
    job = finished(queue, queue.submit(request()))
    assert not queue.cancel(job)
    assert job.error is None


def test_a_closed_queue_cancels_all_and_takes_nothing_more(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    running, waiting = queue.submit(request("running")), queue.submit(request("waiting"))
    assert engine.started.wait(SOON)
    threading.Timer(0.05, engine.gate.set).start()
    queue.close()
    assert isinstance(running.error, Cancelled)
    assert isinstance(waiting.error, Cancelled)
    assert engine.closed == ["running"]
    with pytest.raises(Cancelled):
        queue.submit(request())


def test_the_interpreter_exits_promptly_and_the_running_engine_cleans_up() -> None:
    script = """
import time
from wan_local.jobs import Queue
from wan_local.request import Request, Step
def engine(request, ticket):
    try:
        while True:
            time.sleep(0.01)
            yield Step("denoise", 1, 1, "", 0.0)
    finally:
        print("cleaned up", flush=True)
queue = Queue(engine)
job = queue.submit(Request(prompt="x", start_image_url="a", end_image_url="b"))
next(queue.steps(job))
print(time.time(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    ended = time.time()
    began, words = done.stdout.split("\n")[:2]
    assert words == "cleaned up"
    assert ended - float(began) < 4
    assert done.stderr == ""


# Timeouts


def test_a_job_that_is_not_started_in_time_fails_and_never_runs(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    queue.submit(request("blocker"))
    assert engine.started.wait(SOON)
    began = time.monotonic()
    job = finished(queue, queue.submit(request("late"), start_timeout=0.15))
    assert 0.1 < time.monotonic() - began < 4
    assert isinstance(job.error, StartTimeout)
    engine.gate.set()
    finished(queue, queue.submit(request("last")))
    assert engine.prompts == ["blocker", "last"]


def test_a_start_timeout_does_not_touch_a_running_job(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    job = queue.submit(request(), start_timeout=0.1)
    assert engine.started.wait(SOON)
    time.sleep(0.2)
    engine.gate.set()
    assert finished(queue, job).error is None


def test_a_start_timeout_is_noticed_by_whoever_only_looks(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    queue.submit(request("blocker"))
    job = queue.submit(request("late"), start_timeout=0.05)
    assert not queue.wait(job, 0.0)
    time.sleep(0.06)
    assert queue.wait(job, 0.0)
    assert isinstance(job.error, StartTimeout)


def test_wait_gives_up_when_its_time_is_over(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine)
    job = queue.submit(request())
    assert not queue.wait(job, 0.05)
    engine.gate.set()
    assert queue.wait(job, SOON)


# Failure


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is one."""


FAULTS = [
    InvalidRequest.field("start_image_url", "image_load_error", "no picture", value="a"),
    DoesNotFit("needs 5.1 GiB"),
    MemoryError(),
    OutOfMemoryError("CUDA out of memory"),
    KeyError("x"),
    AssertionError("x"),
    SystemExit(1),
    KeyboardInterrupt(),
    StopAsyncIteration(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("moment", ["call", "first", "later"])
def test_whatever_a_job_raises_is_its_own_error_and_the_worker_lives_on(
    make: Make, fault: BaseException, moment: str
) -> None:
    def run() -> Iterator[Step | Result]:
        if moment == "later":
            yield step()
        raise fault

    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        if request.prompt != "bad":
            return iter([step(), result(5)])
        if moment == "call":
            raise fault
        return run()

    queue = make(engine)
    bad, good = queue.submit(request("bad")), queue.submit(request("good"))
    error = finished(queue, bad).error
    assert error is fault or (isinstance(error, InvalidRequest) and describe(error) == describe(fault))
    assert finished(queue, good).result == result(5)


def test_an_engine_that_ends_without_a_result_is_an_error(make: Make) -> None:
    queue = make(lambda _request, _ticket: iter([step()]))
    assert isinstance(finished(queue, queue.submit(request())).error, AssertionError)


def test_what_a_failed_job_held_is_freed_at_once(make: Make) -> None:
    held: list[weakref.ref[Any]] = []

    class Tensor:
        pass

    def engine(_: Request, ticket: Ticket) -> Iterator[Step | Result]:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        yield step()
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise OutOfMemoryError("outer") from error

    queue = make(engine)
    job = finished(queue, queue.submit(request()))
    assert isinstance(job.error, OutOfMemoryError)
    assert held[0]() is None
    assert job.request is None


def test_a_crash_is_logged_with_its_place_and_a_wrong_request_is_not(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        yield step()
        raise FAULTS[0] if request.prompt == "wrong" else ZeroDivisionError("the place")

    queue = make(engine)
    finished(queue, queue.submit(request("wrong")))
    assert caplog.text == ""
    finished(queue, queue.submit(request("crash")))
    assert "the place" in caplog.text
    assert "raise FAULTS[0]" in caplog.text


def test_a_rejected_request_is_a_finished_job(make: Make) -> None:
    error = InvalidRequest.field("seed", "int_type", "no", value="x")
    queue = make(StubEngine())
    job = queue.reject(error)
    status = queue.status(job)
    assert isinstance(status.error, InvalidRequest) and status.error.detail == error.detail
    assert (status.state, status.metrics) == ("COMPLETED", {})
    assert queue.find(job.id) is job


def test_of_a_rejected_request_no_long_text_is_kept_and_nothing_that_its_check_held(make: Make) -> None:
    class Body(dict[str, Any]):
        pass

    def rejected() -> Job:
        uri = "data:image/png;base64," + "A" * 100_000
        body = Body(prompt="short", start_image_url=uri)
        held.append(weakref.ref(body))
        try:
            Request.from_arguments(body)
        except InvalidRequest as error:
            return queue.reject(error)
        raise AssertionError("it lacks an image")

    held: list[weakref.ref[Any]] = []
    queue = make(StubEngine())
    error = rejected().error
    assert isinstance(error, InvalidRequest)
    (entry,) = error.detail
    assert (entry["loc"], entry["input"]["prompt"]) == (["body", "end_image_url"], "short")
    assert len(entry["input"]["start_image_url"]) < 2100
    assert entry["input"]["start_image_url"].endswith("... (100022 characters)")
    assert held[0]() is None


def test_of_a_long_list_that_was_rejected_the_first_entries_are_kept() -> None:
    numbers, fields = list(range(1000)), {str(number): number for number in range(1000)}
    (entry,) = InvalidRequest.field("seed", "int_type", "no", value=[numbers, fields]).shortened().detail
    assert entry["input"][0][-2:] == [99, "... (1000 entries)"]
    assert len(entry["input"][1]) == 101 and entry["input"][1]["..."] == "1000 entries"


# Memory


def test_the_store_forgets_the_oldest_finished_jobs_and_never_an_unfinished_one(make: Make) -> None:
    engine = StubEngine(held=True)
    queue = make(engine, keep_jobs=3)
    waiting = queue.submit(request())
    rejected = [queue.reject(InvalidRequest.field("seed", "t", "m", value=0)) for _ in range(10)]
    assert queue.find(waiting.id) is waiting
    assert [queue.find(job.id) is not None for job in rejected] == [False] * 6 + [True] * 4
    engine.gate.set()
    finished(queue, waiting)


def test_the_store_forgets_what_is_too_old(make: Make) -> None:
    queue = make(StubEngine(), keep_seconds=0.05)
    job = finished(queue, queue.submit(request()))
    time.sleep(0.1)
    finished(queue, queue.submit(request()))
    assert queue.find(job.id) is None


# Wording


def test_errors_are_worded_as_the_hosted_service_words_them() -> None:
    wrong = FAULTS[0]
    assert isinstance(wrong, InvalidRequest)
    assert (describe(wrong).status_code, describe(wrong).body) == (422, {"detail": wrong.detail})
    cancelled = describe(Cancelled("x"))
    assert (cancelled.status_code, cancelled.body["error_type"]) == (499, "client_cancelled")
    late = describe(StartTimeout("too late"))
    assert (late.status_code, late.body["error_type"]) == (504, "startup_timeout")
    assert late.headers["x-fal-request-timeout-type"] == "user"
    for fault, msg in ((DoesNotFit("needs 5 GiB"), "needs 5 GiB"), (KeyError("k"), "KeyError: 'k'")):
        failure = describe(fault)
        assert failure.status_code == 500
        assert (failure.body["detail"][0]["type"], failure.body["detail"][0]["msg"]) == ("internal_server_error", msg)


def test_a_start_timeout_is_an_error_of_the_house() -> None:
    assert issubclass(StartTimeout, WanLocalError)
    assert issubclass(StartTimeout, TimeoutError)


@pytest.mark.parametrize(
    ("application", "path", "detail"),
    [
        ("fal-ai/wan-flf2v", "", None),
        ("fal-ai/wan-flf2v", "/", None),
        ("fal-ai/wan-flf2v/", "", None),
        ("fal-ai/wan-flf2v", "x", "Path /x not found"),
        ("fal-ai/wan-flf2v/x", "/y/", "Path /x/y not found"),
        ("fal-ai/wan-i2v", "", 'Application "wan-i2v" not found'),
        ("someone/wan-flf2v", "", 'Application "wan-flf2v" not found'),
        ("nope", "", 'Application "nope" not found'),
        ("", "", 'Application "" not found'),
    ],
)
def test_one_application_is_served_at_its_root(application: str, path: str, detail: str | None) -> None:
    failure = unknown_application(application, path)
    assert (failure and failure.body) == (detail and {"detail": detail})


@pytest.mark.parametrize(
    ("application", "expected"),
    [
        ("fal-ai/wan-flf2v", ("fal-ai", "wan-flf2v")),
        ("fal-ai/wan-flf2v/image/x", ("fal-ai", "wan-flf2v")),
        ("110602490-foo", ("110602490", "foo")),
        ("workflows/me/mine", ("me", "mine")),
    ],
)
def test_application_ids_are_split_as_the_client_does(application: str, expected: tuple[str, str]) -> None:
    assert owner_and_alias(application) == expected


def test_an_application_id_without_an_owner_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^Invalid app id: nope\. Must be in the format <appOwner>/<appId>$"):
        owner_and_alias("nope")


# A card that answers no more


def test_after_a_device_failure_no_job_is_begun_or_taken(make: Make) -> None:
    engine, told = StubEngine(held=True), threading.Event()

    def failing(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        yield next(engine(request, ticket))
        raise DeviceFailed("cuda:0 answers no more")

    queue = make(failing)
    queue.on_device_failure(told.set)
    jobs = [queue.submit(request(str(number))) for number in range(3)]
    engine.gate.set()
    for job in jobs:
        assert isinstance(finished(queue, job).error, DeviceFailed)
    assert engine.prompts == ["0"] and told.wait(SOON)
    with pytest.raises(DeviceFailed, match="cuda:0"):
        queue.submit(request())
    again = threading.Event()
    queue.on_device_failure(again.set)
    assert again.is_set()
