"""Weights from the Hugging Face hub to a folder: planned in bytes first, resumed, and held to the hub's own hashes.

The only room that talks to the hub, and the only one that imports huggingface_hub. A run never does: see
`wan-local download`. No torch.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from wan_local.durable import reason
from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable, OutputError, WanLocalError
from wan_local.lock import folder_lock_path, holding
from wan_local.settings import read_toml

_RECORD = ".wan_local-download.json"  # what was verified: so that running again does not hash 80 GB
_SPARE = 1.02  # of the bytes to come, free on disk: file systems have their own needs
_HASHED_AT_ONCE = 2**22
_PARTIAL_CONTENT = 206
_MOST_TRIES = 5  # without a byte, at growing intervals: half a minute in all
_TELL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DownloadSource:
    """Files of one repository of the hub, by patterns of their paths."""

    repository: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DownloadConfig:
    """One choice of `wan-local download`. `runs`: whether a run loads it as it is, without converting."""

    title: str
    gigabytes: int
    runs: bool
    sources: tuple[DownloadSource, ...]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at one commit. `sha256` for large files, git's own hash `blob` for small ones."""

    repository: str
    commit: str
    path: str
    nbytes: int
    sha256: str | None
    blob: str | None


class Hub(Protocol):
    """What is needed of the hub; `FaceHub` is the real one."""

    def files(self, repository: str) -> list[RemoteFile]:
        """Return every file of a repository."""
        ...

    def stream(self, file: RemoteFile, start: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Give the byte that the answer begins at (`start`, or 0 where the server does not resume), and its pieces."""
        ...


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What will be fetched where. `present`: files that are there in the right size, and are only verified.

    `begun_bytes`: of files that an earlier try did not finish.
    """

    title: str
    target: Path
    files: tuple[RemoteFile, ...]
    present: tuple[RemoteFile, ...]
    free_bytes: int
    begun_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def left_bytes(self) -> int:
        return self.nbytes - sum(file.nbytes for file in self.present) - self.begun_bytes


class FaceHub:
    """The Hugging Face hub, or the mirror at `endpoint` (HF_ENDPOINT where None)."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def files(self, repository: str) -> list[RemoteFile]:
        from huggingface_hub import HfApi

        with _typed_errors(repository):
            info = HfApi(endpoint=self._endpoint).model_info(repository, files_metadata=True, timeout=30)
        return [
            RemoteFile(
                repository, info.sha or "main", entry.rfilename, entry.size or 0,
                entry.lfs.sha256 if entry.lfs else None, entry.blob_id,
            )
            for entry in info.siblings or ()
        ]  # fmt: skip

    @contextmanager
    def stream(self, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(file.repository, file.path, revision=file.commit, endpoint=self._endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with (
            _typed_errors(file.repository),
            get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response,
        ):
            hf_raise_for_status(response)
            yield (start if response.status_code == _PARTIAL_CONTENT else 0), response.iter_bytes()


def load_downloads() -> dict[str, DownloadConfig]:
    """Read what `wan-local download` can fetch, by the name of its `--format`."""
    downloads = {}
    for name, table in read_toml("downloads").items():
        sources = tuple(
            DownloadSource(source["repository"], tuple(source["patterns"])) for source in table.pop("sources")
        )
        downloads[name] = DownloadConfig(sources=sources, **table)
    return downloads


def plan_download(config: DownloadConfig, target: Path, hub: Hub) -> DownloadPlan:
    """Ask the hub which files there are and how large; write nothing.

    Raises ModelNotFound (no such repository or file), NotAvailable (no network, or access is to be asked for),
    OutputError (the disk is too small, or the folder can't be looked into).
    """
    files: list[RemoteFile] = []
    for source in config.sources:
        listed = hub.files(source.repository)
        for pattern in source.patterns:
            matched = [file for file in listed if fnmatch.fnmatch(file.path, pattern)]
            if not matched:
                raise ModelNotFound(f"{source.repository} has no file {pattern!r} any more; choose another --format.")
            files += [file for file in matched if file not in files]
    for file in files:
        _check_path(file)
    with _disk_errors(target):
        present = [file for file in files if _size(target / file.path) == file.nbytes]
        begun = {file: _size(_part_of(target / file.path)) for file in files if file not in present}
        begun_bytes = sum(size for file, size in begun.items() if 0 < size <= file.nbytes)
        plan = DownloadPlan(config.title, target, tuple(files), tuple(present), _free_bytes(target), begun_bytes)
    if plan.left_bytes * _SPARE > plan.free_bytes:
        raise OutputError(
            f"{plan.left_bytes / 1e9:.1f} GB are to come, and {plan.free_bytes / 1e9:.1f} GB are free at "
            f"{str(target)!r}. Name another folder with --to, or a smaller --format."
        )
    return plan


def run_download(
    plan: DownloadPlan, hub: Hub, say: Callable[[str], None], *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Fetch what is not there, verify each file by its hash, and remember what was verified.

    A file grows under its name with `.part`, which the next try goes on with. Raises CorruptModel for a file that is
    not what the hub says (it is removed), OutputError (it can't be written), Busy (another process downloads to that
    folder), and as `plan_download`.
    """
    lock, what = folder_lock_path("download", plan.target), f"the download to {str(plan.target)!r}"
    way_out = "Wait until it has ended: the same command then fetches only what is not there."
    with holding(lock, what=what, way_out=way_out):
        _fetch_all(plan, hub, say, sleep)


def _fetch_all(plan: DownloadPlan, hub: Hub, say: Callable[[str], None], sleep: Callable[[float], None]) -> None:
    with _disk_errors(plan.target):
        verified = _read_record(plan.target)
    for number, file in enumerate(plan.files, start=1):
        path = plan.target / file.path
        say(f"[{number}/{len(plan.files)}] {file.path} ({file.nbytes / 1e6:,.1f} MB)")
        with _disk_errors(path):
            if _size(path) != file.nbytes:
                path.parent.mkdir(parents=True, exist_ok=True)
                _fetch(file, path, hub, say, sleep)
            stamp = _stamp(file, path)
            if verified.get(file.path) != stamp:
                _verify(file, path)
                verified[file.path] = stamp
                _write_record(plan.target, verified)


def _fetch(file: RemoteFile, path: Path, hub: Hub, say: Callable[[str], None], sleep: Callable[[float], None]) -> None:
    """Bring a file to `path`; a connection that breaks is tried again as long as bytes come, and a few times more."""
    part = _part_of(path)
    if _size(part) > file.nbytes:
        part.unlink()
    tries = 0
    while (before := max(_size(part), 0)) < file.nbytes or not part.exists():
        try:
            _append(file, part, hub, say)
        except NotAvailable:
            tries = 0 if _size(part) > before else tries + 1
            if tries >= _MOST_TRIES:
                raise
            sleep(2.0**tries)
            continue
        if _size(part) <= before and file.nbytes:
            raise CorruptModel(f"the hub ended {file.path!r} at byte {before} of {file.nbytes}. Run the command again.")
    os.replace(part, path)


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _append(file: RemoteFile, part: Path, hub: Hub, say: Callable[[str], None]) -> None:
    """Write what the hub sends behind what is there, and never more than the file has: its hash is judged later."""
    began = told = time.monotonic()
    with (
        hub.stream(file, max(_size(part), 0)) as (start, pieces),
        _disk_errors(part),
        part.open("ab") as stream,
    ):
        stream.truncate(start)
        done = start
        for piece in pieces:
            done += stream.write(piece[: file.nbytes - done])
            if done == file.nbytes:
                break
            now = time.monotonic()
            if now - told > _TELL_SECONDS:
                told, rate = now, (done - start) / (now - began)
                left = int((file.nbytes - done) / rate) if rate else 0
                say(f"    {done / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left // 60}:{left % 60:02d} left")
        stream.flush()
        os.fsync(stream.fileno())


def _check_path(file: RemoteFile) -> None:
    parts = PurePosixPath(file.path).parts
    if ".." in parts or file.path.startswith("/") or "\\" in file.path or ":" in file.path:
        raise CorruptModel(f"{file.repository} has a file with the path {file.path!r}, which leads out of the folder")


def _verify(file: RemoteFile, path: Path) -> None:
    """Compare a file with the hub's hash; remove it if it differs, so that the next try fetches it anew."""
    size = _size(path)
    if file.sha256 is not None:
        wanted, digest = file.sha256, hashlib.sha256()
    elif file.blob is not None:  # git's: of a small header and the content
        wanted, digest = file.blob, hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        raise NotAvailable(f"the hub tells no hash of {file.path!r}, so it can't be verified. Try again later.")
    with path.open("rb") as stream:
        while content := stream.read(_HASHED_AT_ONCE):
            digest.update(content)
    if size != file.nbytes or digest.hexdigest() != wanted:
        path.unlink()
        raise CorruptModel(
            f"{file.path!r} came as {size} bytes with hash {digest.hexdigest()[:12]}..., and the hub has {file.nbytes} "
            f"bytes with {wanted[:12]}... It was removed: run the command again."
        )


def _stamp(file: RemoteFile, path: Path) -> str:
    return f"{file.sha256 or file.blob} {file.nbytes} {path.stat().st_mtime_ns}"


def _read_record(target: Path) -> dict[str, str]:
    try:
        content = json.loads((target / _RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_record(target: Path, verified: dict[str, str]) -> None:
    part = target / f"{_RECORD}.part"
    with _disk_errors(part):
        part.write_text(json.dumps(verified, indent=1), encoding="utf-8")
        os.replace(part, target / _RECORD)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _free_bytes(target: Path) -> int:
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours, with the way out. That nobody reads what is said is none of the disk's."""
    try:
        yield
    except (WanLocalError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full at {str(path)!r}. Free some space and run the command again: it goes on where it "
                "stopped."
            ) from error
        elsewhere = "a folder on another disk" if error.errno == errno.EFBIG else "another folder"
        raise OutputError(f"{str(path)!r} can't be written: {reason(error)}. Name {elsewhere} with --to.") from error


@contextmanager
def _typed_errors(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into ours, each with the way out."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of httpx or httpx2, as its version has it
    again = "Run the command again later: it goes on where it stopped."
    try:
        yield
    except errors.GatedRepoError as error:
        raise NotAvailable(
            f"{repository} asks for its conditions to be accepted: do so at https://huggingface.co/{repository}, then "
            "log in with `hf auth login` and run the command again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(f"there is no repository {repository} on the hub, or it is private.") from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise ModelNotFound(f"{repository} has changed on the hub: a file is gone. Run the command again.") from error
    except errors.OfflineModeIsEnabled as error:
        raise NotAvailable("HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it to download.") from error
    except errors.HfHubHTTPError as error:
        raise NotAvailable(f"the hub refused {repository}: {_short(error)}. {again}") from error
    except BrokenPipeError:  # nobody reads any more what is said: the network's errors are http_errors
        raise
    except (errors.LocalEntryNotFoundError, http_error, ConnectionError, TimeoutError) as error:
        raise NotAvailable(f"the hub can't be reached: {_short(error)}. Check the connection. {again}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
