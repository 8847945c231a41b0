"""Pictures of every depth and form as 8-bit RGB, and what is told of it."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.data import pictures
from dist_defend.data.pictures import Tally, open_picture
from dist_defend.errors import UserError

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
EIGHT_BITS = np.floor(RAMP / 257 + 0.5)  # 65535 = 255 * 257


def encoded(picture: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format_, **options)
    return stream.getvalue()


def png(depth: int, colour: int, levels: np.ndarray) -> bytes:
    """A PNG of big-endian levels (H, W, channels), written by the standard alone."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in levels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits: int, kind: int, levels: np.ndarray) -> bytes:
    """A little-endian grey TIFF; kind 1 is unsigned, 2 signed, 3 float."""
    data = levels.astype(levels.dtype.newbyteorder("<")).tobytes()
    height, width = levels.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
            (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize("form", ["png", "pgm", "tiff", "pgm-1023"])
def test_sixteen_bit_grey_is_scaled_by_its_range(form: str) -> None:
    top = 1023 if form == "pgm-1023" else 65535
    levels = RAMP if top == 65535 else (RAMP // 64).astype(np.uint16)
    data = {
        "png": lambda: png(16, 0, levels),
        "tiff": lambda: tiff(16, 1, levels),
        "pgm": lambda: b"P5 8 8 65535\n" + levels.astype(">u2").tobytes(),
        "pgm-1023": lambda: b"P5 8 8 1023\n" + levels.astype(">u2").tobytes(),
    }[form]()
    pixels, told = open_picture(data)
    expected = np.floor(levels * (255 / top) + 0.5)
    assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)
    assert np.abs(pixels - expected[:, :, None]).max() <= (0 if top == 65535 else 1)
    assert told == ("16-bit pictures scaled to 8 bits",)


@pytest.mark.parametrize("form", ["png", "ppm"])
def test_sixteen_bit_colour_is_told_and_at_most_one_level_off(form: str) -> None:
    levels = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    data = png(16, 2, levels) if form == "png" else b"P6 8 8 65535\n" + levels.astype(">u2").tobytes()
    pixels, told = open_picture(data)
    assert np.abs(pixels - levels / 257).max() < 1.01 and told == ("16-bit pictures scaled to 8 bits",)


def test_float_levels_in_0_to_1_are_scaled_and_others_refused() -> None:
    shares = (EIGHT_BITS / 255).astype(np.float32)
    pixels, told = open_picture(tiff(32, 3, shares))
    assert np.array_equal(pixels[:, :, 1], EIGHT_BITS) and told == ("float pictures in 0..1 scaled to 8 bits",)
    for levels, why in (
        (shares * 255, "float levels from 0 to 255"),
        (shares - 0.5, "from -0.5"),
        (shares * np.nan, "not finite"),
    ):
        with pytest.raises(UserError, match=f"a.tif: .*{why}.*; save it with 8 or 16 bits"):
            open_picture(tiff(32, 3, levels.astype(np.float32)), "a.tif")


@pytest.mark.parametrize(("bits", "kind", "type_"), [(16, 2, np.int16), (32, 1, np.uint32), (32, 2, np.int32)])
def test_whole_numbers_of_unknown_range_are_refused(bits: int, kind: int, type_: type) -> None:
    with pytest.raises(UserError, match=r"a.tif: whole numbers of 32 bits or with a sign"):
        open_picture(tiff(bits, kind, (RAMP // 4).astype(type_)), "a.tif")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format_: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16, 0] = 255  # red above left
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(np.ascontiguousarray(as_stored))
    pixels, told = open_picture(encoded(picture, format_, exif=exif))
    assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).mean() < 12
    assert told == (() if orientation == 1 else ("pictures turned as their EXIF orientation says",))


def test_a_jpeg_with_broken_exif_is_read_as_it_lies() -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = open_picture(data)
    assert pixels.shape == (8, 8, 3)


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = [[0, 255], [128, 51]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    expected = np.array([[[255] * 3, [200, 0, 0]], [[227, 127, 127], [244, 204, 204]]])
    pixels, told = open_picture(png(8, 6, rgba))
    assert np.array_equal(pixels, expected) and told == ("pictures with transparent pixels, laid on white",)
    kept, told = open_picture(png(8, 6, rgba), keep_alpha=True)
    assert np.array_equal(kept, rgba) and told == ()
    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    assert open_picture(png(8, 4, grey))[0][0, :, 0].tolist() == [255, 10]
    assert open_picture(encoded(palette, "PNG", transparency=1))[0].min() == 255
    keyed = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert open_picture(encoded(keyed, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[[255] * 3, [9] * 3]]


def test_alpha_that_hides_nothing_is_not_told() -> None:
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[..., 1] = 7
    pixels, told = open_picture(png(8, 6, rgba))
    assert told == () and np.array_equal(pixels, rgba[..., :3])
    assert open_picture(png(8, 2, rgba[..., :3]), keep_alpha=True)[0].shape == (2, 2, 3)


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(format_: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red")]
    pixels, told = open_picture(encoded(frames[0], format_, save_all=True, append_images=frames[1:]))
    assert pixels[..., 2].min() > 240 and pixels[..., 0].max() < 15
    assert told == ("pictures of several frames, of which the first is taken",)


@pytest.mark.parametrize(("mode", "format_"), [("1", "PNG"), ("L", "BMP"), ("P", "PNG"), ("1", "PPM"), ("RGB", "WEBP")])
def test_plain_modes_are_converted_as_pillow_does(mode: str, format_: str) -> None:
    picture = Image.fromarray((np.indices((8, 8)).sum(0) * 17).astype(np.uint8)).convert(mode)
    options = {"lossless": True} if format_ == "WEBP" else {}
    pixels, told = open_picture(encoded(picture, format_, **options))
    assert np.array_equal(pixels, np.asarray(picture.convert("RGB"))) and told == ()


def test_cmyk_is_converted_as_pillow_does() -> None:
    picture = Image.new("CMYK", (8, 8), (0, 200, 200, 0))
    assert np.array_equal(open_picture(encoded(picture, "TIFF"))[0], np.asarray(picture.convert("RGB")))


def test_postscript_called_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=r"a.png: not a picture that can be read \(none of PNG, JPEG"):
        open_picture(file)
    assert not (tmp_path / "started").exists()


def test_what_cannot_be_read_is_one_line_with_the_path(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG")
    gif = encoded(Image.new("L", (4, 4)), "GIF")
    contents = {"cut.png": whole[:2000], "text.jpg": b"hello", "empty.png": b"", "gif.png": gif}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "missing.png", "."]:
        with pytest.raises(UserError, match="not a picture that can be read") as caught:
            open_picture(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(1, 0, np.zeros((1, 1, 1), np.uint8)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 12000, 9000))
    body = bomb[12:29]
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(body)) + bomb[33:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="12000x9000 px, more than 100,000,000 pixels"):
            open_picture(bomb)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 63)
    with pytest.raises(UserError, match="8x8 px, more than 63 pixels; shrink it"):
        open_picture(png(16, 0, RAMP))


def test_a_tally_counts_rows_from_several_threads_once() -> None:
    tally = Tally()

    def count(*told: str) -> None:
        for row in range(500):
            tally.add(row, told[: 1 + row % 2])

    threads = [threading.Thread(target=count, args=told) for told in [("a", "b"), *[("a",)] * 4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.lines() == ["a: 500", "b: 250"]
