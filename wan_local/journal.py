"""The queue on disk: what was accepted and what came of it, so that no job is lost with its process.

Takes jobs; keeps one small file for each request that has not ended and one for each outcome. Every file appears
complete under its name (written aside, synced, renamed), so a process that dies at any moment leaves a journal that
can be read. Requests must be such as JSON can carry: image sources are strings or paths.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wan_local import durable
from wan_local.errors import InvalidRequest, OutputError
from wan_local.failure import Failure, RecordedFailure, describe
from wan_local.jobs import Job
from wan_local.request import File, Request, Result

_REQUEST, _OUTCOME = ".request.json", ".outcome.json"
_SPELLED_OUT = 19  # digits of a number in a name, so that names sort as numbers do

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a journal holds: jobs that have ended, oldest first, and jobs that have not, in the order of the line."""

    ended: list[Job]
    waiting: list[Job]


class Journal:
    """A folder of records. The queue calls it with its lock held, so that the order on disk is that of the line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[str, int] = {}
        self._last = 0
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)

    def recover(self) -> Recovered:
        """Read everything; what cannot be read is left where it is and said so. Start timeouts count from now on."""
        durable.sweep(self._folder, older_than_seconds=0.0)
        ended = [job for path in self._records(_OUTCOME) if (job := self._outcome(path))]
        done = {job.id for job in ended}
        waiting = []
        for path in self._records(_REQUEST):
            job = self._request(path)
            if job is not None and job.id in done:
                path.unlink()  # the process died between writing the outcome and forgetting the request
            elif job is not None:
                waiting.append(job)
        return Recovered(ended, waiting)

    def accept(self, job: Job) -> None:
        """Write down a request that is about to be lined up. Raises OutputError, and then it must not be accepted."""
        self._last += 1
        self._numbers[job.id] = self._last
        try:
            self._write_request(job, start_timeout=job.start_timeout)
        except OSError as error:
            raise OutputError(f"the request could not be written to {self._folder}: {error}") from error

    def keeps(self, job: Job) -> bool:
        """Tell whether a job that has not ended is on record, to be taken up by a later process."""
        return job.id in self._numbers

    def begin(self, job: Job) -> None:
        """Write down that a job has begun: begun again by a later process, it has kept its start timeout already."""
        if not self._closed and job.start_timeout is not None and self.keeps(job):
            self._write_again(job)

    def accept_again(self, job: Job) -> None:
        """Write down a request anew, whose run has left the device unusable once more."""
        self._write_again(job)

    def end(self, job: Job) -> bool:
        """Write down what came of a job and return whether that is final.

        After `close`, nothing is: what is stopped now will be started again.
        """
        if self._closed:
            return False
        if job.id not in self._numbers:
            self._last += 1
            self._numbers[job.id] = self._last
        seconds = 0.0 if job.started_at is None else time.perf_counter() - job.started_at
        record: dict[str, Any] = {"id": job.id, "ended_at": time.time(), "seconds": seconds, "logs": job.logs}
        record["started"] = job.started_at is not None
        if job.result is not None:
            video = job.result.video
            record["result"] = {**job.result.model_dump(), "path": None if video.path is None else str(video.path)}
        else:
            assert job.error is not None, "a job ends with a result or with an error"
            failure = describe(job.error)
            record["failure"] = [failure.status_code, failure.body, failure.headers]
        try:
            durable.write(self._path(job.id, _OUTCOME), [json.dumps(record).encode()])
            self._path(job.id, _REQUEST).unlink(missing_ok=True)
        except OSError as error:  # the outcome is known to this process all the same
            _log.error("the outcome of request %s could not be written: %s", job.id, error)
        return True

    def forget(self, job_id: str) -> None:
        """Remove what is known of a job that has ended."""
        if job_id in self._numbers and not self._closed:
            with suppress(OSError):  # it is read again at the next start, and forgotten then
                self._path(job_id, _OUTCOME).unlink(missing_ok=True)
            del self._numbers[job_id]

    def close(self) -> None:
        """Write nothing any more."""
        self._closed = True

    def _write_again(self, job: Job) -> None:
        """Write down a request that has begun, and so has kept its start timeout."""
        try:
            self._write_request(job, start_timeout=None)
        except OSError as error:  # it runs, and is taken up, all the same
            _log.error("request %s could not be written anew: %s", job.id, error)

    def _write_request(self, job: Job, *, start_timeout: float | None) -> None:
        assert job.request is not None, "a job that has not ended has its request"
        record = {
            "id": job.id,
            "priority": job.priority,
            "start_timeout": start_timeout,
            "device_failures": job.device_failures,
            "webhook_url": job.webhook_url,
            "base_url": job.base_url,
            "request": _request_as_json(job.request),
        }
        durable.write(self._path(job.id, _REQUEST), [json.dumps(record).encode()])

    def _records(self, ending: str) -> list[Path]:
        return sorted(self._folder.glob(f"*{ending}"))

    def _path(self, job_id: str, ending: str) -> Path:
        return self._folder / f"{self._numbers[job_id]:0{_SPELLED_OUT}d}-{job_id}{ending}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            number = int(path.name.partition("-")[0])
            self._numbers[str(record["id"])] = number
            self._last = max(self._last, number)
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.error("%s cannot be read and is left there: %s", path, error)
            return None
        return dict(record)

    def _request(self, path: Path) -> Job | None:
        record = self._read(path)
        if record is None:
            return None
        try:
            request = Request(**_request_from_json(record["request"]))
            job = Job(record["id"], request, record["priority"], record["start_timeout"], record["webhook_url"])
            job.base_url = record.get("base_url")  # journals of earlier versions have none
            job.device_failures = int(record.get("device_failures", 0))
        except (ValidationError, LookupError, TypeError, ValueError) as error:
            _log.error("%s cannot be read and is left there: %s", path, error)
            return None
        return job

    def _outcome(self, path: Path) -> Job | None:
        record = self._read(path)
        if record is None:
            return None
        try:
            job = Job(record["id"], None, state="COMPLETED", logs=record["logs"])
            job.finished_at = time.perf_counter() - (time.time() - record["ended_at"])
            job.started_at = job.finished_at - record["seconds"] if record["started"] else None
            if "result" in record:
                video = {**record["result"]["video"], "path": record["result"]["path"]}
                job.result = Result(video=File(**video), seed=record["result"]["seed"])
            else:
                job.error = _recorded(Failure(*record["failure"]))
        except (ValidationError, LookupError, TypeError) as error:
            _log.error("%s cannot be read and is left there: %s", path, error)
            return None
        return job


def _recorded(failure: Failure) -> Exception:
    detail = failure.body.get("detail")
    if failure.status_code == InvalidRequest.status_code and isinstance(detail, list):
        return InvalidRequest(detail)
    return RecordedFailure(failure)


def _request_as_json(request: Request) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in type(request).model_fields}
    return {name: {"path": str(value)} if isinstance(value, Path) else value for name, value in fields.items()}


def _request_from_json(record: dict[str, Any]) -> dict[str, Any]:
    return {name: Path(value["path"]) if isinstance(value, dict) else value for name, value in record.items()}
