"""The mp4 file: uint8 frames in, a video that plays everywhere out, or nothing at all.

H.264 High, yuv420p, BT.709 in limited range (converted so and tagged so), constant frame rate, index in front, with the
settings in its metadata and in a JSON file beside it. It is written under a temporary name in the same folder and
renamed when it is complete. Frames stream through: memory does not grow with their number.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.codec.context import Flags, ThreadType
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from wan_local import durable
from wan_local.errors import NotAvailable, OutputError
from wan_local.geometry import NATIVE_FPS, Geometry, Size
from wan_local.metadata import public, title, to_json

Frames = NDArray[np.uint8]

CRF = (
    16  # x264's quality scale: 0 is lossless and plays in few places, 18 is called visually lossless, 23 is its default
)
ENCODER = "libx264"
PRESET = "medium"
# x264's code for AVX-512 gives other bytes from run to run (seen at 112x64 and 176x96)
_SAME_EVERYWHERE = "cpu-independent=1"
# A fixed number, since x264's own is that of the processors; a frame each, since slices cost bytes. As many as the VAE
# hands out at once: they are encoded while it makes the next. They hold 45 MB more at 720p than one thread.
_ENCODER_THREADS = 4
KEYFRAME_SECONDS = 2  # how far apart keyframes are at most, so that players can seek
_OPEN_FILES_STAY = os.name == "nt"  # elsewhere a file is replaced whoever has it open
_LONGEST_OWNER = "0" * 36  # of partial files: a queue's ids are the longest
_BYTES_PER_PIXEL = 0.25  # what CRF 16 needs for pictures full of fine noise; usual ones take a tenth of it

# Without the flags swscale takes short cuts in 8 bits that cost up to 3 levels a round trip.
_EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What was written and where."""

    path: Path
    sidecar_path: Path
    num_frames: int
    file_bytes: int


def check_output(path: Path, needed_bytes: int) -> None:
    """Raise OutputError now, not after the run, if `path` could not be written: folder, name, rights, free space."""
    path = path.absolute()
    folder = path.parent
    if not _is_name(path):
        raise OutputError(f"The output {path.name!a} is no name that a file can have here. Choose another output.")
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"The output {path.name!r} must end in .mp4: that is the only format that is written.")
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} for {path.name} does not exist. Create it, or choose another output.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file, such as {path / 'video.mp4'}.")
    with _explained(path):
        _try_names(path)
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{path} may need {needed_bytes / 1e6:.0f} MB and {free_bytes / 1e6:.0f} MB is free. "
            f"Free {(needed_bytes - free_bytes) / 1e6:.0f} MB on that disk, or choose an output on another."
        )
    if ENCODER not in av.codecs_available:
        raise NotAvailable(
            f"This build of PyAV has no {ENCODER}, so no mp4. Reinstall it from its wheel: pip install av"
        )


def _try_names(path: Path) -> None:
    """Make and remove files as the run will; open those that it will replace. Raises OSError."""
    partial = durable.partial_name(_LONGEST_OWNER, ".json")
    for name in (partial, f"{path.name}{durable.PARTIAL}"):  # the second: as long as the sidecar's, of its characters
        probe = path.with_name(name)
        with suppress(FileExistsError), probe.open("xb") as stream:  # one that exists is someone's, and possible
            try:
                stream.write(b"\0")
            finally:
                stream.close()
                probe.unlink()
    for old in (path, _sidecar_path(path)) if _OPEN_FILES_STAY else ():
        with suppress(FileNotFoundError), old.open("r+b"):  # a player may hold it on Windows
            pass


def _is_name(path: Path) -> bool:
    """Tell whether the system can hold the path: `Path.exists` says of one that it cannot hold only that it is not."""
    if os.name == "nt" and ":" in path.name:
        return False  # the name of a stream within another file
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def largest_bytes(geometry: Geometry) -> int:
    """Return an upper estimate of the file's size, for `check_output`."""
    return int(geometry.size.height * geometry.size.width * geometry.num_frames * _BYTES_PER_PIXEL) + 1_000_000


def write_video(
    path: Path,
    frames: Iterable[Frames],
    *,
    size: Size,
    frames_per_second: int,
    metadata: Mapping[str, object],
    embed_metadata: bool = True,
) -> VideoReport:
    """Write all of `frames` (each [N,H,W,3] or [H,W,3], RGB) to `path`; on any error or a cancel nothing remains."""
    with VideoWriter(
        path, size=size, frames_per_second=frames_per_second, metadata=metadata, embed_metadata=embed_metadata
    ) as writer:
        for batch in frames:
            writer.write(batch)
        return writer.finish()


class VideoWriter:
    """An mp4 in the making, for a decoder that hands out a few frames at a time.

    Use it in a `with` block and call `finish` at its end: a block that is left before that leaves no file.
    `metadata` is written as JSON; paths in it are cut to their last part, so that a file tells nothing of the machine.
    owner: after whom the partial files are named, so that `durable.sweep_after` finds them if the process is killed;
    the process itself unless given.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: Size,
        frames_per_second: int,
        metadata: Mapping[str, object],
        embed_metadata: bool = True,
        owner: str | None = None,
    ) -> None:
        assert size.height % 2 == 0 and size.width % 2 == 0, f"yuv420p needs even sides, not {size}"
        _require_encoder()
        self._path = path.absolute()
        self._sidecar_path = _sidecar_path(self._path)
        owner = owner or str(os.getpid())  # not after the file: its name may be as long as can be
        self._partial = self._path.with_name(durable.partial_name(owner, ".mp4"))
        self._partial_sidecar = self._path.with_name(durable.partial_name(owner, ".json"))
        self._size = size
        self._frames_per_second = frames_per_second
        self._metadata = public(metadata)
        self._num_frames = 0
        with _explained(self._path):
            self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = _add_stream(self._container, size, frames_per_second)
        if embed_metadata:
            self._container.metadata["comment"] = to_json(self._metadata)
            self._container.metadata["title"] = title(self._metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing twice does nothing; of two errors the first is the one to tell.
        with suppress(OSError, av.FFmpegError):
            self._container.close()
        self._partial.unlink(missing_ok=True)
        self._partial_sidecar.unlink(missing_ok=True)

    def write(self, frames: Frames) -> None:
        """Append RGB frames, [N,H,W,3] or [H,W,3], uint8."""
        expected = (self._size.height, self._size.width, 3)
        assert frames.dtype == np.uint8 and frames.shape[-3:] == expected, f"{frames.dtype} {frames.shape}, {expected}"
        with _explained(self._path):
            for frame_HWC in frames.reshape(-1, *expected):
                frame = _to_yuv(frame_HWC)
                frame.pts = self._num_frames
                self._container.mux(self._stream.encode(frame))
                self._num_frames += 1

    def finish(self) -> VideoReport:
        """Complete the file, put it and its sidecar in place, and return what was written."""
        if self._num_frames == 0:
            raise OutputError(f"{self._path} was not written: there are no frames.")
        with _explained(self._path):
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._partial_sidecar.write_text(to_json(self._description(), indent=2) + "\n", encoding="utf-8")
            _flush_to_disk(self._partial)
            _flush_to_disk(self._partial_sidecar)
            durable.replace(self._partial, self._path)
            durable.replace(self._partial_sidecar, self._sidecar_path)
            durable.flush_folder(self._path.parent)
            return VideoReport(self._path, self._sidecar_path, self._num_frames, self._path.stat().st_size)

    def _description(self) -> dict[str, object]:
        video = {
            "file_name": self._path.name,
            "width": self._size.width,
            "height": self._size.height,
            "num_frames": self._num_frames,
            "frames_per_second": self._frames_per_second,
            "native_frames_per_second": NATIVE_FPS,  # the pace at which the motion was learned; any other re-times it
        }
        return {**self._metadata, "video": video}


def read_video(path: Path) -> Frames:
    """Return all frames of `path` as RGB [N,H,W,3], converted by the matrix and range that the file names."""
    with av.open(str(path)) as container:
        return np.stack([_to_rgb(frame) for frame in container.decode(video=0)])


def _require_encoder() -> None:
    if ENCODER not in av.codecs_available:
        raise NotAvailable(
            f"This build of PyAV has no {ENCODER}, so no mp4. Reinstall it from its wheel: pip install av"
        )


def _add_stream(container: OutputContainer, size: Size, frames_per_second: int) -> VideoStream:
    options = {"crf": str(CRF), "preset": PRESET, "x264-params": _SAME_EVERYWHERE}
    stream = container.add_stream(ENCODER, rate=frames_per_second, options=options)
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
    stream.profile = "High"
    stream.gop_size = KEYFRAME_SECONDS * frames_per_second
    context = stream.codec_context
    context.time_base = Fraction(1, frames_per_second)
    context.thread_type, context.thread_count = ThreadType.FRAME, _ENCODER_THREADS
    context.flags |= Flags.closed_gop
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.color_range = ColorRange.MPEG
    return stream


def _to_yuv(frame_HWC: Frames) -> av.VideoFrame:
    """Convert RGB to BT.709 in limited range; the matrix is said aloud, since swscale's default is BT.601."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24").reformat(
        format="yuv420p",
        interpolation=_EXACT,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_color_trc=ColorTrc.BT709,
        dst_color_primaries=ColorPrimaries.BT709,
    )


def _to_rgb(frame: av.VideoFrame) -> Frames:
    named = set(Colorspace)
    rgb = frame.reformat(
        format="rgb24",
        interpolation=_EXACT,
        src_colorspace=frame.colorspace if frame.colorspace in named else Colorspace.ITU709,
        src_color_range=frame.color_range or ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()
    assert rgb.dtype == np.uint8, rgb.dtype
    return rgb.astype(np.uint8, copy=False)


def _sidecar_path(path: Path) -> Path:
    """`clip.mp4` has `clip.mp4.json`: `clip.json` might be someone's own file."""
    return path.with_name(f"{path.name}.json")


def _flush_to_disk(path: Path) -> None:
    """Make sure that a crash of the machine can't leave a name without its bytes."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's or the encoder's error into an OutputError that names the file and the way out."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise OutputError(f"{path} could not be written: {_reason(error)}") from error


def _reason(error: OSError | av.FFmpegError) -> str:
    code = error.errno
    if code == errno.EFBIG:
        return f"{durable.TOO_LARGE}. Choose an output on another disk."
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full or a quota is reached. Free some space, or choose an output on another disk."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY):
        return "there is no right to write there, or another program has it open. Close that, or choose another output."
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "its folder does not exist (any more). Create it, or choose another output."
    if code == errno.ENAMETOOLONG:
        return "the name is too long for this file system. Choose a shorter one."
    return f"{error.strerror or error}. Choose another output."
