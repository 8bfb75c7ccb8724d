"""Images: every kind comes out as the same upright sRGB picture, and every fault names its field."""

from __future__ import annotations

import base64
import io
import itertools
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from wan_local import image as image_module
from wan_local.errors import InvalidRequest
from wan_local.geometry import Size
from wan_local.image import MAX_BYTES, MAX_PIXELS, fit, load_image

WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def quadrants(width: int = 96, height: int = 64) -> Image.Image:
    """A picture that looks different each way it is turned."""
    image = Image.new("RGB", (width, height), WHITE)
    for corner, colour in zip(((0, 0), (1, 0), (0, 1)), (RED, GREEN, BLUE), strict=True):
        left, top = corner[0] * width // 2, corner[1] * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(source: Any, **options: Any) -> Image.Image:
    return load_image(source, field="start_image_url", **options)


def difference(image: Image.Image, expected: Image.Image) -> int:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return int(np.abs(np.asarray(image, np.int16) - np.asarray(expected.convert("RGB"), np.int16)).max())


def refusal(source: Any, **options: Any) -> dict[str, Any]:
    with pytest.raises(InvalidRequest) as caught:
        load_image(source, field="end_image_url", **options)
    (entry,) = caught.value.detail
    assert entry["loc"] == ["body", "end_image_url"]
    assert entry["url"] == f"https://docs.fal.ai/errors#{entry['type']}"
    return entry


PICTURE = quadrants()
PNG = encoded(PICTURE)


# Where an image may come from


def data_uris() -> dict[str, str]:
    text = base64.b64encode(PNG).decode()
    return {
        "base64": f"data:image/png;base64,{text}",
        "parameters": f"data:image/png;charset=utf-8;name=a.png;base64,{text}",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{text}",
        "no type": f"data:;base64,{text}",
        "percent-encoded base64": f"data:image/png;base64,{quote(text, safe='')}",
        "url-safe alphabet": f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        "no padding": f"data:image/png;base64,{text.rstrip('=')}",
        "line breaks": "data:image/png;base64," + "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "percent-encoded bytes": f"data:image/png,{quote(PNG)}",
    }


@pytest.mark.parametrize("uri", data_uris().values(), ids=data_uris())
def test_data_uri_in_any_spelling_gives_the_picture(uri: str) -> None:
    assert difference(load(uri), PICTURE) == 0


def test_path_string_path_file_url_bytes_and_pil_give_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a b%20ü.png"
    path.write_bytes(PNG)
    for source in (str(path), path, path.as_uri(), path.as_uri().replace("file://", "file://localhost"), PNG, PICTURE):
        assert difference(load(source), PICTURE) == 0
    assert difference(load(Image.open(path)), PICTURE) == 0


def test_a_pil_image_is_left_as_it_was() -> None:
    source = PICTURE.convert("RGBA")
    before = source.tobytes()
    result = load(source)
    result.paste(BLACK, (0, 0, 10, 10))
    assert (source.mode, source.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///home/a%20b.png", "/home/a b.png"),
        ("file:///C:/Users/a%20b.png", "C:/Users/a b.png"),
        ("FILE:///c:/x.png", "c:/x.png"),
        ("file://localhost/x.png", "/x.png"),
    ],
)
def test_file_url_becomes_a_path_also_as_windows_writes_it(url: str, path: str) -> None:
    assert image_module._path_of_file_url(url, image_module._Refusal("f", url)) == path


@pytest.mark.parametrize("url", ["file://server/share/x.png", "file:////server/share/x.png", "file://[bad/x.png"])
def test_file_url_to_another_machine_is_refused(url: str) -> None:
    assert refusal(url)["type"] == "file_download_error"


def test_a_file_url_without_its_third_slash_is_told_how_to_be_written() -> None:
    entry = refusal("file://first.png")
    assert entry["type"] == "file_download_error" and "file:///its/whole/path" in entry["msg"]


@pytest.mark.parametrize(
    "source", ["", "no/such.png", "ftp://host/x.png", "gopher://x", "x\0.png", "a" * 5000, "~nobody9/x"]
)
def test_a_place_without_a_file_is_a_download_error_with_the_value_as_input(source: str) -> None:
    entry = refusal(source)
    assert (entry["type"], entry["input"]) == ("file_download_error", source)
    assert len(entry["msg"]) < 500


def test_directories_and_devices_are_no_images_and_the_message_says_what_they_are(tmp_path: Path) -> None:
    places = ((tmp_path, "is a folder"), ("/dev/zero", "no plain file"), (tmp_path.as_uri(), "is a folder"))
    for source, what in (*places, (tmp_path / "no.png", "is not there")):
        entry = refusal(source)
        assert entry["type"] == "file_download_error" and what in entry["msg"]


def test_local_files_are_refused_where_they_are_not_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    for source in (str(path), path, path.as_uri(), "../../x.png", r"\\server\share\x.png", "file:///etc/passwd"):
        assert refusal(source, allow_local=False)["type"] == "file_download_error"
    assert difference(load(data_uris()["base64"], allow_local=False), PICTURE) == 0


# Over http


class _Site(BaseHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name == "picture.png":
            self._send(200, PNG)
        elif name == "redirect":
            self._send(302, b"", location="/picture.png")
        elif name == "loop":
            self._send(302, b"", location="/loop")
        elif name == "to-file":
            self._send(302, b"", location="file:///etc/passwd")
        elif name == "page":
            self._send(200, b"<!DOCTYPE html><html><body>Sign in</body></html>")
        elif name == "endless":
            self._endless()
        elif name == "hang-up":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(PNG[:100])
        else:
            self._send(404, b"no such thing")

    def _send(self, status: int, body: bytes, location: str | None = None) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**16))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the method it replaces
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_http_url_and_redirect_give_the_picture(site: str) -> None:
    assert difference(load(f"{site}/picture.png"), PICTURE) == 0
    assert difference(load(f"{site}/redirect"), PICTURE) == 0


def test_loopback_is_reached_past_a_proxy(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert difference(load(f"{site}/picture.png"), PICTURE) == 0


@pytest.mark.parametrize("page", ["missing.png", "loop", "to-file", "hang-up"])
def test_what_http_does_not_deliver_is_a_download_error(site: str, page: str) -> None:
    entry = refusal(f"{site}/{page}")
    assert (entry["type"], entry["input"]) == ("file_download_error", f"{site}/{page}")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://", "https://[bad", "http://a\nb/", "http://x:99999/"]
)
def test_a_host_that_does_not_answer_is_a_download_error(url: str) -> None:
    assert refusal(url)["type"] == "file_download_error"


def test_a_page_is_no_picture_and_is_called_a_page(site: str) -> None:
    entry = refusal(f"{site}/page")
    assert entry["type"] == "image_load_error"
    assert "HTML page" in entry["msg"]


# Too many bytes, too many pixels, too few


@pytest.fixture
def small_cap(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(image_module, "MAX_BYTES", 4096)
    return 4096


def test_a_file_over_the_cap_is_refused_wherever_it_comes_from(small_cap: int, site: str, tmp_path: Path) -> None:
    big = PNG + bytes(small_cap)
    path = tmp_path / "big.png"
    path.write_bytes(big)
    uri = "data:image/png;base64," + base64.b64encode(big).decode()
    for source in (
        big,
        path,
        uri,
        f"data:image/png,{quote(big)}",
        f"{site}/endless",
        "data:," + "a" * (3 * small_cap + 1),
    ):
        entry = refusal(source)
        assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": small_cap})


def test_the_cap_is_the_hosted_services() -> None:
    assert MAX_BYTES == 50 * 1024 * 1024


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    entry = refusal(bomb(*size))
    assert entry["type"] == "image_too_large"
    assert entry["ctx"] == {"max_height": 9459, "max_width": 9459}
    assert entry["input"].startswith("<binary ")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_also_where_warnings_are_errors() -> None:
    assert refusal(bomb(10_000, 10_000))["type"] == "image_too_large"


def test_pillows_own_limit_is_left_alone() -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


@pytest.mark.parametrize(
    ("size", "ctx"),
    [
        ((1, 1), {"min_height": 64, "min_width": 64}),
        ((63, 64), {"min_height": 64, "min_width": 64}),
        ((1, 4000), {"min_height": 64, "min_width": 250}),
        ((1601, 100), {"min_height": 101, "min_width": 64}),
    ],
)
def test_too_small_and_too_thin_pictures_say_what_is_needed(size: tuple[int, int], ctx: dict[str, int]) -> None:
    entry = refusal(Image.new("RGB", size))
    assert (entry["type"], entry["ctx"]) == ("image_too_small", ctx)


@pytest.mark.parametrize("size", [(64, 64), (1600, 100), (100, 1600)])
def test_the_smallest_and_thinnest_accepted_pictures_load(size: tuple[int, int]) -> None:
    assert load(Image.new("RGB", size)).size == size


# Kinds of picture


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 128))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.paste((0, 80, 0, 255), (0, 0, 64, 32))
    result = load(encoded(image))
    assert result.getpixel((10, 50)) == WHITE
    assert result.getpixel((10, 10)) == (0, 80, 0)
    assert result.getpixel((50, 50)) == pytest.approx((227, 127, 127), abs=1)


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.new("LA", (64, 64), (0, 0))
    image.paste((100, 255), (0, 0, 64, 32))
    result = load(encoded(image))
    assert (result.getpixel((5, 5)), result.getpixel((5, 60))) == ((100, 100, 100), WHITE)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rare_alpha_modes_are_composited_on_white(mode: str) -> None:
    result = load(Image.new(mode, (64, 64), 0))
    assert result.getpixel((5, 5)) == WHITE


def test_palette_with_transparency_is_composited_on_white() -> None:
    image = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = image.getpixel((2, 2))
    result = load(encoded(image, transparency=image.getpixel((2, 2))))
    assert (result.getpixel((2, 2)), result.getpixel((90, 2))) == (WHITE, GREEN)


def test_palette_without_transparency_keeps_its_colours() -> None:
    assert difference(load(encoded(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE))), PICTURE) == 0


def test_cmyk_jpeg_keeps_its_colours() -> None:
    assert difference(load(encoded(PICTURE.convert("CMYK"), "JPEG", quality=100)), PICTURE) <= 8


def test_one_bit_picture_is_black_and_white() -> None:
    image = Image.new("1", (64, 64), 1)
    image.paste(0, (0, 0, 64, 32))
    result = load(encoded(image))
    assert (result.getpixel((5, 5)), result.getpixel((5, 60))) == (BLACK, WHITE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    result = np.asarray(load(encoded(Image.fromarray(values), kind)))[..., 0].astype(int)
    assert np.abs(result - values / 257).max() <= 0.51


def test_16_bit_colour_keeps_its_colours() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 32896, 0) * 64 for _ in range(64))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert load(content).getpixel((0, 0)) == (255, 128, 0)


def test_integer_picture_of_8_bits_is_not_taken_for_16() -> None:
    assert load(Image.new("I", (64, 64), 200)).getpixel((0, 0)) == (200, 200, 200)


def test_values_of_unknown_range_are_refused_and_not_guessed_at() -> None:
    assert "32-bit" in refusal(Image.new("I", (64, 64), 70_000))["msg"]
    assert "floating-point" in refusal(Image.new("F", (64, 64), 0.5))["msg"]


def test_big_endian_16_bit_grey_is_read_as_such() -> None:
    values = np.full((64, 64), 32896, ">u2")
    image = Image.frombytes("I;16B", (64, 64), values.tobytes())
    assert load(image).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("1", 0)])
def test_a_transparent_colour_is_composited_on_white(mode: str, colour: Any) -> None:
    image = Image.new(mode, (64, 64), colour)
    assert load(encoded(image, transparency=colour)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "L"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (64, 64), (90, 90, 90)).convert(mode)
    assert load(image).getpixel((0, 0)) == pytest.approx((90, 90, 90), abs=2)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_formats_besides_png_and_jpeg_load(kind: str) -> None:
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    )
    assert difference(load(encoded(PICTURE, kind, **options)), PICTURE) <= (8 if kind == "AVIF" else 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame_and_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(PICTURE, kind, save_all=True, append_images=[Image.new("RGB", PICTURE.size, RED)], **options)
    assert difference(load(content), PICTURE) == 0
    assert "start_image_url has several frames; the first is used" in caplog.text


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored turned left, so that the viewer turns it right
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_all_eight_orientations_give_the_same_upright_picture(orientation: int, kind: str) -> None:
    turn = TURNS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_kind: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = by_kind.get(kind, {})
    content = encoded(PICTURE.transpose(turn) if turn is not None else PICTURE, kind, exif=exif, **options)
    assert difference(load(content), PICTURE) <= (3 if kind == "JPEG" else 0)
    assert difference(load(Image.open(io.BytesIO(content))), PICTURE) <= (3 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_data_does_not_cost_the_picture(exif: bytes) -> None:
    assert difference(load(encoded(PICTURE, "JPEG", quality=100, subsampling=0, exif=exif)), PICTURE) <= 3


def wide_gamut_profile() -> bytes:
    """sRGB with its red and green columns swapped: wrong on purpose, so that nobody can miss that it is applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = (profile[entries[tag] + 4 : entries[tag] + 12] for tag in (b"rXYZ", b"gXYZ"))
    profile[entries[b"rXYZ"] + 4 : entries[b"rXYZ"] + 12] = green
    profile[entries[b"gXYZ"] + 4 : entries[b"gXYZ"] + 12] = red
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_embedded_profile_is_converted_to_srgb(mode: str) -> None:
    image = Image.new("RGB", (64, 64), RED).convert(mode)
    result = load(encoded(image, icc_profile=wide_gamut_profile()))
    assert result.getpixel((0, 0)) == pytest.approx(GREEN, abs=3)


def test_the_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert difference(load(encoded(noise, icc_profile=profile)), noise) <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "1"])
def test_a_profile_of_another_colour_space_does_not_cost_the_picture(mode: str) -> None:
    image = Image.new("RGB", (64, 64), (90, 90, 90)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    result = load(encoded(image, kind, icc_profile=wide_gamut_profile()))
    assert result.size == (64, 64)


def test_a_damaged_profile_is_ignored_aloud(caplog: pytest.LogCaptureFixture) -> None:
    assert difference(load(encoded(PICTURE, icc_profile=b"not a profile")), PICTURE) == 0
    assert "its colour profile is damaged" in caplog.text


# Broken files


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "an empty file"),
        (b"this is no picture, only text\n", "a text file"),
        (b"<html><head><title>502</title>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"\x9f\x01\x02\x03" * 20, "not an image that is known here"),
        (PNG[: len(PNG) // 2], "damaged"),
        (encoded(quadrants(640, 480), "JPEG")[:3000], "damaged"),
        (encoded(quadrants(640, 480), "WEBP")[:200], "damaged"),
        (PNG[:20], ""),
    ],
)
def test_a_file_that_is_no_whole_picture_is_a_load_error_that_says_what_it_is(content: bytes, word: str) -> None:
    entry = refusal(content)
    assert entry["type"] == "image_load_error"
    assert word in entry["msg"]


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x18ftypheic", b"%PDF-1.7", b"<svg xmlns='x'>", b"<?xml version='1.0'?>\n<svg>"]
)
def test_a_kind_of_picture_that_is_not_read_is_told_which_are(head: bytes) -> None:
    entry = refusal(head + bytes(100))
    assert entry["type"] == "unsupported_image_format"
    assert {"JPEG", "PNG", "WEBP"} <= set(entry["ctx"]["supported_formats"])


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,@@@@", "data:image/png;base64,abcde", "data:image/png", "data:,", "data:;base64,ü"]
)
def test_a_malformed_data_uri_is_a_load_error(uri: str) -> None:
    entry = refusal(uri)
    assert (entry["type"], entry["input"]) == ("image_load_error", uri)


FUZZED = {kind: encoded(quadrants(80, 72), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FUZZED)), st.data())
def test_damage_anywhere_in_a_file_gives_a_picture_or_a_typed_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(FUZZED[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    try:
        outcome = load(bytes(content)).mode
    except InvalidRequest as error:
        outcome = error.detail[0]["type"]
    assert outcome in ("RGB", "image_load_error", "unsupported_image_format", "image_too_small", "image_too_large")


# Fitting


SIZES = [(1024, 1024), (640, 360), (360, 640), (200, 200), (1500, 500)]
DOTS = [(0.5, 0.5), (0.42, 0.45), (0.58, 0.56), (0.5, 0.41)]


def dotted(width: int, height: int) -> Image.Image:
    """Black with four white 5x5 dots near the centre, where no crop reaches."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for x, y in DOTS:
        column, row = round(x * (width - 1)), round(y * (height - 1))
        pixels[row - 2 : row + 3, column - 2 : column + 3] = 255
    return Image.fromarray(pixels)


def analytic(x: float, y: float, image: Image.Image, size: Size) -> tuple[float, float]:
    """Where a point of the image lies after cover and centre crop."""
    width, height = image.size
    scale = max(size.width / width, size.height / height)
    column, row = round(x * (width - 1)) + 0.5 - width / 2, round(y * (height - 1)) + 0.5 - height / 2
    return column * scale + size.width / 2 - 0.5, row * scale + size.height / 2 - 0.5


@pytest.mark.parametrize(("first", "last"), list(itertools.product(SIZES, SIZES)), ids=str)
def test_dots_of_both_images_land_within_a_pixel_whatever_their_sizes(
    first: tuple[int, int], last: tuple[int, int]
) -> None:
    size = Size(height=256, width=448)
    for source in (first, last):
        image = dotted(*source)
        fitted = fit(image, size)
        assert fitted.size == (448, 256)
        pixels = np.asarray(fitted.convert("L"), np.float64)
        for x, y in DOTS:
            column, row = analytic(x, y, image, size)
            if not (8 < column < 440 and 8 < row < 248):
                continue  # cropped away
            rows, columns = np.mgrid[0:256, 0:448]
            near = (abs(rows - row) < 8) & (abs(columns - column) < 8)
            weight = pixels * near
            assert abs((weight * columns).sum() / weight.sum() - column) < 1
            assert abs((weight * rows).sum() / weight.sum() - row) < 1


def test_a_larger_image_of_the_same_aspect_is_a_plain_downscale() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 896, 3), np.uint8))
    assert difference(fit(noise, Size(256, 448)), noise.resize((448, 256), Image.Resampling.LANCZOS)) == 0


def test_an_image_of_the_right_size_is_not_touched() -> None:
    assert difference(fit(PICTURE, Size(64, 96)), PICTURE) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(64, 300), st.integers(64, 300), st.integers(1, 20), st.integers(1, 20))
def test_every_size_is_fitted_exactly_and_covered_without_borders(w: int, h: int, columns: int, rows: int) -> None:
    size = Size(height=16 * rows, width=16 * columns)
    fitted = fit(Image.new("RGB", (w, h), WHITE), size)
    assert fitted.size == (size.width, size.height)
    assert fitted.getextrema() == ((255, 255),) * 3
