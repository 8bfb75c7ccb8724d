"""Reading past the system's page cache what is read once: no byte is copied, and the cache is left to others.

Takes an open file; gives bytes in memory that is laid out for it. On Linux alone (O_DIRECT): elsewhere, and where a
file system has no such thing, nothing is read here and the caller reads as always. So it is with what the cache holds
already, such as a file that was just downloaded.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # bytes: places, lengths and memory are multiples of it. No disk has larger blocks
_REFUSED = (errno.EINVAL, errno.ENOTSUP)
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
    import fcntl

    buffer, done = memoryview(into.numpy()), 0  # type: ignore[arg-type,unused-ignore] # numpy says so from Python 3.12 on
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < len(buffer) and done % BLOCK == 0:  # else the file has ended
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Tell whether the cache holds most of these bytes; also where the system won't tell, as of others' files."""
    begin = offset - offset % mmap.PAGESIZE
    length = offset + count - begin
    pages = np.empty(-(-length // mmap.PAGESIZE), np.uint8)
    try:
        with mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin) as mapping:
            place = np.frombuffer(mapping, np.uint8).ctypes.data
            asked = ctypes.c_void_p(place), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
            failed = _c_library().mincore(*asked)
    except (OSError, ValueError):  # ValueError: the file ends before
        return True
    return bool(failed) or float((pages & 1).mean()) >= _CACHED


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
