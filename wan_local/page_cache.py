"""Reading and writing past the system's page cache what is used once: no copies, and others keep the cache.

Takes open files; gives bytes in memory that is laid out for it, and appends such. On Linux alone (O_DIRECT): elsewhere,
and where a file system has no such thing, nothing is read here, the caller reads as always, and writing is the usual.
So it is with reading what the cache holds already, such as a file that was just downloaded.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from io import FileIO

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # bytes: places, lengths and memory are multiples of it. No disk has larger blocks
_REFUSED = (errno.EINVAL, errno.ENOTSUP)
_WRITE_BYTES = 2**23  # at a time
_CACHED = 0.5  # of the pages: from here on they are read as always


def aligned_bytes(count: int) -> Tensor:
    """Return room for `count` bytes, or a few more to whole blocks, that begins at a multiple of BLOCK."""
    count = -(-count // BLOCK) * BLOCK
    room = torch.empty(count + BLOCK, dtype=torch.uint8)
    begin = -room.data_ptr() % BLOCK
    return room[begin : begin + count]


def read_past_cache(descriptor: int, offset: int, into: Tensor) -> int:
    """Fill `into`, of `aligned_bytes`, from `offset` of a file on, a multiple of BLOCK; return how many bytes are done.

    They are fewer than asked for where the file ends; none where the cache holds them or there is no reading past it.
    """
    if sys.platform != "linux" or _is_cached(descriptor, offset, into.nbytes):
        return 0
    if not _go_past_cache(descriptor, on=True):
        return 0
    buffer, done = _memory(into), 0
    try:
        while done < len(buffer) and done % BLOCK == 0:  # else the file has ended
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    finally:
        _go_past_cache(descriptor, on=False)
    return done


class Appender:
    """Appends to an open file some MiB at a time, past the cache where that is possible; for one thread.

    In the file are whole blocks. The last, filled up with zeros, is written again with what comes to stand in it: the
    same bytes first, so that what was there is good whatever becomes of the second writing.
    """

    def __init__(self, stream: FileIO, end: int) -> None:
        """stream: open for reading and writing, and `end` bytes long."""
        self._stream, self._room = stream, _memory(aligned_bytes(_WRITE_BYTES))
        self._filled = end % BLOCK
        self._begin = end - self._filled
        stream.seek(self._begin)
        count = stream.readinto(self._room[: self._filled])
        assert count == self._filled, (stream.name, end, count)
        self._past_cache = _go_past_cache(stream.fileno(), on=True)

    @property
    def end(self) -> int:
        """How many bytes there are, those included that are not handed over yet."""
        return self._begin + self._filled

    def append(self, content: bytes | memoryview) -> None:
        """Take bytes, and write what fills the room. Raises OSError where the disk is full or fails."""
        left = memoryview(content)
        while left:
            taken, left = left[: len(self._room) - self._filled], left[len(self._room) - self._filled :]
            self._room[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == len(self._room):
                self.hand_over()

    def hand_over(self) -> None:
        """Write what is there, up to a whole block. Raises OSError where the disk is full or fails."""
        tail = self._filled % BLOCK
        whole = self._filled + (-tail % BLOCK)
        self._room[self._filled : whole] = bytes(whole - self._filled)
        self._write(self._room[:whole])
        self._room[:tail] = bytes(self._room[self._filled - tail : self._filled])
        self._begin, self._filled = self.end - tail, tail

    def _write(self, left: memoryview) -> None:
        """Write all of it: one call may take less."""
        self._stream.seek(self._begin)
        while left:
            try:
                left = left[self._stream.write(left) :]
            except OSError as error:
                if error.errno not in _REFUSED or not self._past_cache:
                    raise
                self._past_cache = _go_past_cache(self._stream.fileno(), on=False)


def _go_past_cache(descriptor: int, *, on: bool) -> bool:
    """Let reading and writing of an open file go past the cache, or not; tell whether they do."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return on


def _memory(room: Tensor) -> memoryview:
    return memoryview(room.numpy())  # type: ignore[arg-type,unused-ignore] # numpy says so from Python 3.12 on


def _is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Tell whether the cache holds most of these bytes; also where the system won't tell, as of others' files."""
    begin = offset - offset % mmap.PAGESIZE
    length = max(0, min(offset + count, os.fstat(descriptor).st_size) - begin)
    pages = np.empty(-(-length // mmap.PAGESIZE), np.uint8)
    try:
        with mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin) as mapping:
            place = np.frombuffer(mapping, np.uint8).ctypes.data
            asked = ctypes.c_void_p(place), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
            failed = _c_library().mincore(*asked)
    except (OSError, ValueError):  # ValueError: of nothing there is no mapping
        return True
    return bool(failed) or float((pages & 1).mean()) >= _CACHED


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
