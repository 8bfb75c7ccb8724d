"""The queue: one worker, first come first served, with events and cancel.

Takes validated requests; hands them one at a time to the engine with a `Ticket`; the engine is a generator that yields
`Step`s and last a `Result`, and whose `close()` frees all it holds. Gives jobs that any thread can ask, wait for and
cancel. No torch.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from wan_local.errors import Cancelled, DeviceFailed, InvalidRequest, WanLocalError
from wan_local.failure import StartTimeout
from wan_local.request import Check, Request, Result, Step

Priority = Literal["normal", "low"]
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]

_WAKE_SECONDS = 0.5  # a wait is never longer at a stretch, so that Ctrl-C reaches it (on Windows it cannot otherwise)
_EXIT_SECONDS = 5.0  # how long an ending interpreter waits for the engine to clean up

_MOST_DEVICE_FAILURES = 3  # of one job, over processes: then it is what kills the card

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an engine is told of the job beside its request: its id, and a `check` that raises Cancelled when it was
    cancelled, to be called as often as is cheap. The same id given again after a restart goes on where the job was.
    """

    id: str
    check: Check


Engine = Callable[[Request, Ticket], Iterator[Step | Result]]


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. Only its queue writes to it; read `state` and what follows through `Queue.status`."""

    id: str
    request: Request | None
    priority: Priority = "normal"
    start_timeout: float | None = None
    webhook_url: str | None = None
    base_url: str | None = None
    state: State = "IN_QUEUE"
    cancelled: bool = False
    logs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    result: Result | None = None
    error: BaseException | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    finished_at: float | None = None
    device_failures: int = 0  # how often its run has left the card unusable, in earlier processes too

    @property
    def start_deadline(self) -> float:
        return float("inf") if self.start_timeout is None else self.submitted_at + self.start_timeout


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment. `position` counts the jobs that wait before it, `logs` are all so far, oldest first."""

    state: State
    position: int | None
    logs: list[dict[str, Any]]
    metrics: dict[str, Any]
    error: BaseException | None


class Records(Protocol):
    """What keeps a queue's jobs beyond its process: a `journal.Journal`."""

    def accept(self, job: Job) -> None: ...

    def begin(self, job: Job) -> None: ...

    def keeps(self, job: Job) -> bool: ...

    def accept_again(self, job: Job) -> None: ...

    def end(self, job: Job) -> bool: ...

    def forget(self, job_id: str) -> None: ...

    def close(self) -> None: ...


class Queue:
    """Runs jobs on `engine`, one at a time, in a thread that starts with the first job.

    Normal jobs go before low ones, else first come first served. Finished jobs are remembered for `keep_seconds`, and
    at most `keep_jobs` of them. `on_end` is told each job that has ended for good, and must not block. What a job
    raises is that job's outcome: the worker lives on, but after DeviceFailed, which the next job would end with, too.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        keep_jobs: int = 1000,
        keep_seconds: float = 24 * 3600.0,
        on_end: Callable[[Job], None] | None = None,
        records: Records | None = None,
    ) -> None:
        self._engine = engine
        self._on_end = on_end
        self._records = records
        self._keep_jobs = keep_jobs
        self._keep_seconds = keep_seconds
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[Priority, deque[Job]] = {"normal": deque(), "low": deque()}
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._device_failure: DeviceFailed | None = None
        self._on_device_failure: Callable[[], None] | None = None

    def submit(
        self,
        request: Request,
        *,
        priority: Priority = "normal",
        start_timeout: float | None = None,
        webhook_url: str | None = None,
        base_url: str | None = None,
        attached: bool = False,
    ) -> Job:
        """Line up a request. Not begun within `start_timeout` seconds, it fails with StartTimeout.

        `base_url`: where its caller reaches this process's files, for the webhook. `attached`: its caller waits on a
        connection that ends with this process, so no later process takes it up.
        Raises DeviceFailed once a job has ended with it.
        """
        job = Job(str(uuid.uuid4()), request, priority, start_timeout, webhook_url, base_url)
        with self._changed:
            if self._closed:
                raise Cancelled("The queue is closed; no job is taken any more.")
            if self._device_failure is not None:
                raise DeviceFailed(str(self._device_failure))
            if self._records is not None and not attached:
                self._records.accept(job)
            self._line_up(job)
        return job

    def restore(self, ended: Sequence[Job], waiting: Sequence[Job]) -> None:
        """Take over the jobs of an earlier process, in their order, before any is submitted here."""
        with self._changed:
            for job in ended:
                self._remember(job)
            for job in waiting:
                self._line_up(job)

    def reject(self, error: InvalidRequest, *, webhook_url: str | None = None) -> Job:
        """Return a job that failed before it could run, as a submitted bad request does."""
        job = Job(str(uuid.uuid4()), None, webhook_url=webhook_url)
        with self._changed:
            self._remember(job)
            self._finish(job, error=error)
        return job

    @property
    def device_failure(self) -> DeviceFailed | None:
        """What the worker ended with, if a job has left the device unusable for this process."""
        return self._device_failure

    def on_device_failure(self, tell: Callable[[], None]) -> None:
        """Call `tell`, which must not block, when a job has left the device unusable: at once if one has."""
        with self._changed:
            self._on_device_failure = tell
            if self._device_failure is not None:
                tell()

    def find(self, job_id: str) -> Job | None:
        with self._changed:
            return self._jobs.get(job_id)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for their turn."""
        with self._changed:
            return len(self._line())

    @property
    def unfinished(self) -> int:
        """The number of jobs that wait or run."""
        with self._changed:
            return sum(job.state != "COMPLETED" for job in self._jobs.values())

    def status(self, job: Job) -> JobStatus:
        with self._changed:
            self._expire()
            position = self._line().index(job) if job.state == "IN_QUEUE" else None
            seconds = None if job.started_at is None or job.finished_at is None else job.finished_at - job.started_at
            return JobStatus(
                state=job.state,
                position=position,
                logs=list(job.logs),
                metrics={} if seconds is None else {"inference_time": seconds},
                error=job.error,
            )

    def wait(self, job: Job, timeout: float | None = None) -> bool:
        """Block until the job has ended, or for `timeout` seconds; return whether it has."""
        deadline = float("inf") if timeout is None else time.perf_counter() + timeout
        with self._changed:
            self._expire()
            while job.state != "COMPLETED" and (left := deadline - time.perf_counter()) > 0:
                self._sleep(job, left)
        return job.state == "COMPLETED"

    def steps(self, job: Job) -> Iterator[Step]:
        """Yield the job's steps, from its first one on, until it has ended. Only the newest has a preview."""
        seen = 0
        while True:
            with self._changed:
                while len(job.steps) == seen and job.state != "COMPLETED":
                    self._sleep(job, _WAKE_SECONDS)
                fresh, ended = job.steps[seen:], job.state == "COMPLETED"
            yield from fresh
            seen += len(fresh)
            if ended:
                return

    def steps_so_far(self, job: Job, seen: int = 0) -> list[Step]:
        """Return the job's steps but the first `seen`. Only the newest has a preview."""
        with self._changed:
            return job.steps[seen:]

    def cancel(self, job: Job) -> bool:
        """Cancel a job: a waiting one never runs, a running one ends at its next check. False if it had ended."""
        with self._changed:
            if job.state == "COMPLETED":
                return False
            job.cancelled = True
            if job.state == "IN_QUEUE":
                self._waiting[job.priority].remove(job)
                self._finish(job, error=Cancelled("Request was cancelled"))
            return True

    def close(self, timeout: float = _EXIT_SECONDS) -> None:
        """Cancel all jobs and let the worker end; return when it has, or after `timeout` seconds."""
        with self._changed:
            if self._records is not None:
                self._records.close()  # what is cancelled now will be taken up again
            self._closed = True
            for job in self._jobs.values():
                self.cancel(job)
            self._changed.notify_all()
            worker = self._worker
        atexit.unregister(self.close)
        if worker is not None and worker is not threading.current_thread():
            worker.join(timeout)

    def _line_up(self, job: Job) -> None:
        self._remember(job)
        self._waiting[job.priority].append(job)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="wan-local-worker", daemon=True)
            self._worker.start()
            atexit.register(self.close)
        self._changed.notify_all()

    def _work(self) -> None:
        """Run jobs until the queue is closed (the worker's thread)."""
        while True:
            with self._changed:
                self._expire()
                while not (line := self._line()) and not self._closed:
                    self._changed.wait()
                    self._expire()
                if self._closed:
                    return
                job = line[0]
                self._waiting[job.priority].popleft()
                job.state = "IN_PROGRESS"
                job.started_at = time.perf_counter()
                if self._records is not None:
                    self._records.begin(job)
                self._changed.notify_all()
            self._run(job)
            if self._device_failure is not None:
                return

    def _run(self, job: Job) -> None:
        outcome = _Outcome()
        with outcome:
            outcome.result = self._iterate(job)
        if outcome.error is not None:
            _release(job, outcome.error)
        with self._changed:
            if isinstance(outcome.error, DeviceFailed):
                self._give_up(job, outcome.error)
            else:
                self._finish(job, result=outcome.result, error=outcome.error)

    def _give_up(self, job: Job, error: DeviceFailed) -> None:
        """End the job that left the device unusable. What is on record is left to the next process, this job too unless
        it has done so too often; nothing else can come to an end.
        """
        self._device_failure = error
        job.device_failures += 1
        again = self._keeps(job) and job.device_failures < _MOST_DEVICE_FAILURES and not job.cancelled
        for lost in [waiting for waiting in self._line() if not self._keeps(waiting)]:
            self._waiting[lost.priority].remove(lost)
            self._finish(lost, error=error)
        if not again:
            times = f" It was run {job.device_failures} times." if job.device_failures > 1 else ""
            self._finish(job, error=DeviceFailed(f"{error}{times}"))
        if self._records is not None:
            if again:
                self._records.accept_again(job)
            self._records.close()
        if again:
            self._finish(job, error=error)
        if self._on_device_failure is not None:
            self._on_device_failure()

    def _keeps(self, job: Job) -> bool:
        return self._records is not None and self._records.keeps(job)

    def _iterate(self, job: Job) -> Result:
        """Run the engine to its end; a cancelled job ends where the engine checks, or where it yields."""
        assert job.request is not None, "only a waiting job is run"
        result: Result | None = None

        def check() -> None:
            if job.cancelled:
                raise Cancelled("Request was cancelled")

        run = self._engine(job.request, Ticket(job.id, check))
        try:
            for item in run:
                if isinstance(item, Result):
                    result = item
                else:
                    self._record(job, item)
                    check()
        finally:
            if isinstance(run, Generator):
                run.close()
        assert result is not None, "an engine's last item is a Result"
        return result

    def _record(self, job: Job, step: Step) -> None:
        timestamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._changed:
            if job.steps:
                job.steps[-1] = replace(job.steps[-1], preview=None)
            job.steps.append(step)
            job.logs.append({"message": step.message, "level": "INFO", "source": "USER", "timestamp": timestamp})
            self._changed.notify_all()

    def _finish(self, job: Job, *, result: Result | None = None, error: BaseException | None = None) -> None:
        job.result, job.error = result, error.shortened() if isinstance(error, InvalidRequest) else error
        job.request = None  # it may hold images, as a wrong one's values and frames may
        job.steps = [replace(step, preview=None) for step in job.steps]
        job.finished_at = time.perf_counter()
        for_good = self._records is None or self._records.end(job)
        job.state = "COMPLETED"
        self._changed.notify_all()
        if self._on_end is not None and for_good:
            self._on_end(job)

    def _line(self) -> list[Job]:
        """The waiting jobs in the order in which they will run."""
        return [*self._waiting["normal"], *self._waiting["low"]]

    def _sleep(self, job: Job, seconds: float) -> None:
        """Wait for a change, but not past the job's start deadline."""
        self._expire()
        if job.state == "IN_QUEUE":
            seconds = min(seconds, job.start_deadline - time.perf_counter())
        if job.state != "COMPLETED":
            self._changed.wait(max(0.0, min(seconds, _WAKE_SECONDS)))

    def _expire(self) -> None:
        """Fail the waiting jobs whose start timeout has run out."""
        now = time.perf_counter()
        for job in self._line():
            if now >= job.start_deadline:
                self._waiting[job.priority].remove(job)
                message = f"Request was not started within {job.start_timeout} seconds"
                self._finish(job, error=StartTimeout(message))

    def _remember(self, job: Job) -> None:
        """Add the job to the store, and forget finished ones beyond its bounds, oldest first."""
        oldest = time.perf_counter() - self._keep_seconds
        finished = [old for old in self._jobs.values() if old.finished_at is not None]
        for index, old in enumerate(finished):
            if index < len(finished) - self._keep_jobs or (old.finished_at or 0.0) < oldest:
                del self._jobs[old.id]
                if self._records is not None:
                    self._records.forget(old.id)
        self._jobs[job.id] = job


class _Outcome:
    """Takes whatever leaves a job's run. An engine may raise anything at all, and none of it may end the worker:
    this is the one place where anything is taken, and nothing of it is lost, since it becomes the job's error.
    """

    result: Result | None = None
    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


def _release(job: Job, error: BaseException) -> None:
    """Log an error that is not the caller's, and clear the frames it holds, so that their tensors are freed."""
    if not isinstance(error, InvalidRequest | Cancelled):
        _log.error("request %s failed", job.id, exc_info=None if isinstance(error, WanLocalError) else error)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        traceback.clear_frames(link.__traceback__)
        chain.append(link)
        link = link.__cause__ or link.__context__
