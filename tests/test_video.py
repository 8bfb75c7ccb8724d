"""The mp4: what is in it, that its colours are right, and that a failure leaves nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from wan_local.errors import NotAvailable, OutputError
from wan_local.geometry import Geometry, Size
from wan_local.video import Frames, VideoWriter, check_output, largest_bytes, read_video, write_video

NAMES_ARE_BYTES = pytest.mark.skipif(sys.platform == "win32", reason="names are UTF-16 there")

SIZE = Size(height=64, width=112)
BARS = [(255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255)]


def noise(num_frames: int, size: Size = SIZE) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (num_frames, size.height, size.width, 3), dtype=np.uint8)


def write(path: Path, frames: Frames, frames_per_second: int = 16, **metadata: object) -> Path:
    return write_video(
        path, [frames], size=SIZE, frames_per_second=frames_per_second, metadata={"prompt": "a bird"} | metadata
    ).path


def test_flat_colours_come_back_within_three_levels(tmp_path: Path) -> None:
    colours = [*BARS, *itertools.product((0, 96, 200), repeat=3)]
    flat = [x for x in range(SIZE.width) if 10 <= x % 28 < 18]  # away from edges, where 4:2:0 mixes neighbours
    for start in range(0, len(colours), 4):
        bars = np.zeros((SIZE.height, SIZE.width, 3), np.uint8)
        for index, colour in enumerate(colours[start : start + 4]):
            bars[:, 28 * index : 28 * (index + 1)] = colour
        decoded = read_video(write(tmp_path / "bars.mp4", np.stack([bars] * 9)))
        assert np.abs(decoded[:, :, flat].astype(int) - bars[:, flat]).max() <= 3


def test_the_same_frames_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    """x264's own choice of instructions fails this at this size on processors with AVX-512."""
    spots = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(float)
    glowing = [Image.fromarray((spots * glow).astype(np.uint8)) for glow in np.linspace(0.3, 1, 81)]
    frames = np.stack([np.asarray(x.resize((SIZE.width, SIZE.height), Image.Resampling.BICUBIC)) for x in glowing])
    assert len({write(tmp_path / "again.mp4", frames).read_bytes() for _ in range(12)}) == 1


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two processors to be held to one"
)
def test_the_same_frames_are_the_same_bytes_however_many_processors_there_are(tmp_path: Path) -> None:
    """x264 itself makes a slice for each processor, if each is 64 rows high."""
    tall = Size(height=256, width=112)
    allowed, videos = os.sched_getaffinity(0), set()
    try:
        for processors in ({min(allowed)}, set(range(os.cpu_count() or 1))):
            os.sched_setaffinity(0, processors)
            path = tmp_path / "same.mp4"
            write_video(path, [noise(9, tall)], size=tall, frames_per_second=16, metadata={})
            videos.add(path.read_bytes())
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(videos) == 1


def test_luma_is_bt709_in_limited_range(tmp_path: Path) -> None:
    """Y = 16 + 219 (.2126R + .7152G + .0722B); BT.601 both ways would pass a round trip."""
    for colour, luma in (((255, 0, 0), 62.6), ((0, 255, 0), 172.6), ((0, 0, 255), 31.8), ((255, 255, 255), 235.0)):
        path = write(tmp_path / "flat.mp4", np.broadcast_to(np.uint8(colour), (5, SIZE.height, SIZE.width, 3)))
        with av.open(str(path)) as container:
            plane = next(container.decode(video=0)).to_ndarray()[: SIZE.height]
        assert abs(plane.mean() - luma) < 1


@pytest.mark.parametrize(("num_frames", "frames_per_second"), [(1, 16), (82, 5), (81, 16), (100, 24)])
def test_frame_count_rate_and_size_are_exact(tmp_path: Path, num_frames: int, frames_per_second: int) -> None:
    path = write(tmp_path / "clip.mp4", noise(num_frames), frames_per_second)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.base_rate) == (
            num_frames,
            frames_per_second,
            frames_per_second,
        )
        assert (stream.height, stream.width) == (SIZE.height, SIZE.width)
        assert stream.duration is not None and stream.time_base is not None
        assert stream.duration * stream.time_base * frames_per_second == num_frames
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([index / frames_per_second for index in range(num_frames)])
    assert read_video(path).shape == (num_frames, SIZE.height, SIZE.width, 3)


def test_first_and_last_frame_stay_close_to_what_was_written(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, SIZE.width)[None, None, :, None] * np.linspace(0.2, 1, 21)[:, None, None, None]
    frames = np.broadcast_to(ramp, (21, SIZE.height, SIZE.width, 3)).round().astype(np.uint8)
    decoded = read_video(write(tmp_path / "ramp.mp4", frames))
    for index in (0, -1):
        error = np.mean((decoded[index].astype(float) - frames[index]) ** 2)
        assert 10 * np.log10(255**2 / error) > 42


def test_stream_is_what_browsers_play(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(40))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.profile, context.pix_fmt) == ("h264", "High", "yuv420p")
        assert context.colorspace == Colorspace.ITU709
        assert context.color_primaries == ColorPrimaries.BT709
        assert context.color_trc == ColorTrc.BT709
        assert context.color_range == ColorRange.MPEG
        keyframes = [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keyframes[0] == 0 and max(np.diff(keyframes)) <= 32


def test_index_lies_before_the_pictures_and_names_the_colours(tmp_path: Path) -> None:
    data = write(tmp_path / "clip.mp4", noise(9)).read_bytes()
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")
    # nclx: primaries 1, transfer 1, matrix 1 (all BT.709), limited range
    assert data[data.index(b"colrnclx") + 8 :][:7] == bytes([0, 1, 0, 1, 0, 1, 0])


def test_settings_are_in_the_file_and_in_its_sidecar(tmp_path: Path) -> None:
    settings = {"prompt": "ein Vogel, 鳥 \U0001f426", "seed": 42, "guide_scale": 5.0, "model": "tiny"}
    report = write_video(tmp_path / "clip.mp4", [noise(5)], size=SIZE, frames_per_second=8, metadata=settings)
    with av.open(str(report.path)) as container:
        assert json.loads(container.metadata["comment"]) == settings
        assert container.metadata["title"] == settings["prompt"]
    sidecar = json.loads(report.sidecar_path.read_text(encoding="utf-8"))
    assert report.sidecar_path.name == "clip.mp4.json"
    assert {key: sidecar[key] for key in settings} == settings
    assert sidecar["video"]["num_frames"] == 5 and sidecar["video"]["native_frames_per_second"] == 16
    assert report.file_bytes == report.path.stat().st_size


def test_metadata_can_be_left_out_of_the_video(tmp_path: Path) -> None:
    report = write_video(
        tmp_path / "clip.mp4",
        [noise(5)],
        size=SIZE,
        frames_per_second=8,
        metadata={"prompt": "secret"},
        embed_metadata=False,
    )
    assert b"secret" not in report.path.read_bytes()
    assert "secret" in report.sidecar_path.read_text(encoding="utf-8")


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    path = write(
        tmp_path / "clip.mp4",
        noise(5),
        prompt="/imagine a bird",
        start_image_url="/home/ann/first.png",
        end_image_url="file:///home/ann/a%20b.png",
        model=Path("/home/ann/models/wan"),
        source="https://ann:key@example.org/a.png?token=ann",
        report={"loras": ["C:\\Users\\ann\\fast.safetensors", "~ann/other"], "image": "data:image/png;base64,QUJD"},
    )
    sidecar = path.with_name("clip.mp4.json").read_text(encoding="utf-8")
    assert b"ann" not in path.read_bytes() and "ann" not in sidecar and str(tmp_path) not in sidecar
    assert json.loads(sidecar) | {"video": None} == {
        "prompt": "/imagine a bird",
        "start_image_url": "first.png",
        "end_image_url": "a b.png",
        "model": "wan",
        "source": "https://example.org/a.png",
        "report": {"loras": ["fast.safetensors", "other"], "image": "data:image/png;base64,..."},
        "video": None,
    }


def test_path_may_hold_any_character(tmp_path: Path) -> None:
    folder = tmp_path / "Vögel 鳥 %03d"
    folder.mkdir()
    path = write(folder / "ein Vogel: 鳥 \U0001f426 %d.mp4", noise(5))
    assert len(read_video(path)) == 5
    assert sorted(entry.name for entry in folder.iterdir()) == [path.name, f"{path.name}.json"]


def test_frames_may_come_one_by_one_and_in_batches(tmp_path: Path) -> None:
    frames = noise(7)
    with VideoWriter(tmp_path / "a.mp4", size=SIZE, frames_per_second=16, metadata={}) as writer:
        writer.write(frames[0])
        writer.write(frames[1:4])
        for frame in frames[4:]:
            writer.write(frame)
        report = writer.finish()
    whole = write_video(tmp_path / "b.mp4", [frames], size=SIZE, frames_per_second=16, metadata={})
    assert report.num_frames == whole.num_frames == 7
    assert report.path.read_bytes() == whole.path.read_bytes()


class _Stop(BaseException):
    """Something that no `except Exception` would catch."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _Stop, MemoryError])
def test_nothing_is_left_after_a_failure_midway(tmp_path: Path, error: type[BaseException]) -> None:
    def frames() -> Iterator[Frames]:
        yield noise(60)
        raise error("midway")

    with pytest.raises(error, match="midway"):
        write_video(tmp_path / "clip.mp4", frames(), size=SIZE, frames_per_second=16, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_a_generator_around_it_is_closed(tmp_path: Path) -> None:
    def run() -> Iterator[int]:
        with VideoWriter(tmp_path / "clip.mp4", size=SIZE, frames_per_second=16, metadata={}) as writer:
            for index in range(9):
                writer.write(noise(60))
                yield index
            writer.finish()

    steps = run()
    next(steps)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".part"]
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_an_older_video_survives_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(5))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="no frames"):
        write_video(path, [], size=SIZE, frames_per_second=16, metadata={})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let writes beyond `limit_bytes` fail, as FAT32 does beyond 4 GB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size to set there")
@pytest.mark.parametrize("limit_bytes", [0, 100_000, 400_000])
def test_a_file_that_grows_too_large_is_an_output_error_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    message = rf"{re.escape(str(tmp_path / 'clip.mp4'))} could not be written: no file there .*on another disk"
    with _file_size_limit(limit_bytes), pytest.raises(OutputError, match=message):
        write(tmp_path / "clip.mp4", noise(81))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"clip\.mp4 could not be written: the disk is full"):
        write(tmp_path / "clip.mp4", noise(5))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    for attempt in (check_output, lambda path, _: write(path, noise(5))):
        with pytest.raises(OutputError, match=r"nowhere.* does not exist"):
            attempt(tmp_path / "nowhere" / "clip.mp4", 0)


def test_preflight_passes_and_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "clip.mp4", largest_bytes(Geometry(SIZE, 81)))
    assert list(tmp_path.iterdir()) == []


def test_preflight_counts_the_free_space(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"may need 1000000000 MB and \d+ MB is free"):
        check_output(tmp_path / "clip.mp4", 10**15)


def test_preflight_refuses_what_is_no_mp4_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.mp4"):
        check_output(tmp_path / "clip.gif", 0)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "folder.mp4", 0)


def test_preflight_refuses_too_long_a_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name is too long"):
        check_output(tmp_path / ("x" * 250 + ".mp4"), 0)  # the sidecar's name is the longer one


def test_preflight_tries_the_names_that_the_run_will_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has no such character, or a path too long for the partial file's name alone."""
    opening, impossible = Path.open, "?"

    def picky(self: Path, mode: str = "r", **options: Any) -> Any:
        if "x" in mode and impossible in self.name:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opening(self, mode, **options)

    monkeypatch.setattr(Path, "open", picky)
    check_output(tmp_path / "clip.mp4", 0)
    with pytest.raises(OutputError, match=r"what\?\.mp4 could not be written: Invalid argument"):
        check_output(tmp_path / "what?.mp4", 0)
    impossible = ".wan_local-"
    with pytest.raises(OutputError, match="Invalid argument"):
        check_output(tmp_path / "clip.mp4", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mp4.json"])
def test_preflight_refuses_a_video_that_cannot_be_replaced(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, while a player has it open."""
    path, opening = write(tmp_path / "clip.mp4", noise(5)), Path.open
    before = path.read_bytes()

    def held(self: Path, mode: str = "r", **options: Any) -> Any:
        if self.name == name and "+" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opening(self, mode, **options)

    check_output(path, 0)
    monkeypatch.setattr(Path, "open", held)
    monkeypatch.setattr("wan_local.video._OPEN_FILES_STAY", True)
    with pytest.raises(OutputError, match="another program has it open"):
        check_output(path, 0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_preflight_touches_no_file_of_someone_else(tmp_path: Path) -> None:
    theirs = tmp_path / "clip.mp4.part"
    theirs.write_bytes(b"a download")
    check_output(tmp_path / "clip.mp4", 0)
    assert theirs.read_bytes() == b"a download"


def test_a_video_that_a_virus_scanner_looks_at_is_put_in_place_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, refused = os.replace, set[str]()

    def first_refused(source: Path, target: Path) -> None:
        if target.name not in refused:
            refused.add(target.name)
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", first_refused)
    assert write(tmp_path / "clip.mp4", noise(5)).exists() and refused == {"clip.mp4", "clip.mp4.json"}


@pytest.mark.usefixtures("folders_that_cannot_be_flushed")
def test_a_folder_that_cannot_be_flushed_fails_no_finished_video(tmp_path: Path) -> None:
    assert write(tmp_path / "clip.mp4", noise(5)).exists()


@pytest.mark.parametrize("name", ["a\0b.mp4", pytest.param("a\ud800b.mp4", marks=NAMES_ARE_BYTES)])
def test_a_name_that_no_file_can_have_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="no name that a file can have"):
        check_output(tmp_path / name, 0)


def test_longest_name_that_passes_the_preflight_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (255 - len(".mp4.json")) + ".mp4")
    check_output(path, 0)
    assert write(path, noise(5)).exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder where even root may not write")
def test_preflight_refuses_a_folder_without_the_right_to_write() -> None:
    with pytest.raises(OutputError, match=r"/proc/clip\.mp4 could not be written: "):
        check_output(Path("/proc/clip.mp4"), 0)


def test_missing_encoder_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", set())
    with pytest.raises(NotAvailable, match="libx264"):
        write(tmp_path / "clip.mp4", noise(5))
    assert list(tmp_path.iterdir()) == []


def test_size_estimate_covers_the_worst_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(33))
    assert path.stat().st_size <= largest_bytes(Geometry(SIZE, 33))


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    frame = noise(1, Size(256, 256))
    with VideoWriter(tmp_path / "clip.mp4", size=Size(256, 256), frames_per_second=16, metadata={}) as writer:
        for _ in range(100):  # x264's look-ahead is full by then
            writer.write(frame)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(200):
            writer.write(frame)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 20 * 1024, f"200 frames of 192 KiB cost {grown_kib} KiB"  # kept, they would be 37.5 MiB


def test_same_frames_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.mp4", noise(20)) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
