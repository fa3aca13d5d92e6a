"""Photos as files: what goes in comes out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal
from unittest import mock

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from tests.e2e.graph import make_photo
from tools import photo, photo_writer
from tools.photo import Photo, PhotoError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def deep_pixels(channels: int, seed: int = 0) -> np.ndarray:
    """(41, 67, channels), every value of 16 bits alike."""
    noise = np.random.default_rng(seed)
    return noise.integers(0, 65536, (41, 67, channels), dtype=np.uint16)


def make_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "A camera"
    exif[ExifTags.IFD.Exif] = {int(ExifTags.Base.ISOSpeedRatings): 3200}
    return exif.tobytes()


def as_photo(pixels: np.ndarray) -> Photo:
    """A photo of grey (1, 2 channels) or colour (3, 4)."""
    channels = pixels.shape[2]
    color = np.repeat(pixels[..., :1], 3, 2) if channels < 3 else pixels[..., :3]
    alpha = None if channels % 2 else pixels[..., -1]
    return Photo(color, alpha, channels < 3, b"", b"", None, "")


# Without 16-bit grey TIFF with alpha, which Pillow cannot open.
LAYOUTS = [
    (suffix, channels, bits)
    for suffix in (".png", ".tif")
    for channels in (1, 2, 3, 4)
    for bits in (8, 16)
    if (suffix, channels, bits) != (".tif", 2, 16)
]


@pytest.mark.parametrize(("suffix", "channels", "bits"), LAYOUTS)
def test_pixels_survive(tmp_path: Path, suffix: str, channels: int, bits: int):
    pixels = photo.to_bits(deep_pixels(channels), bits)
    written = as_photo(pixels)
    path = tmp_path / f"photo{suffix}"
    photo_writer.write(path, written, {"who": "Jürgen"})
    read = photo.read(path)
    assert np.array_equal(read.color, written.color)
    assert (read.grey, read.bits) == (channels < 3, bits)
    if written.alpha is None:
        assert read.alpha is None
    else:
        assert read.alpha is not None
        assert np.array_equal(read.alpha, written.alpha)
    assert photo_writer.read_record(path) == {"who": "Jürgen"}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tifffile_reads_our_tiff(tmp_path: Path, channels: int):
    pixels = deep_pixels(channels)
    photo_writer.write(tmp_path / "photo.tif", as_photo(pixels), {})
    assert np.array_equal(tifffile.imread(tmp_path / "photo.tif").reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_others(
    tmp_path: Path, channels: int, compression: str | None, order: Literal["<", ">"]
):
    pixels = deep_pixels(channels)
    kind = "minisblack" if channels == 1 else "rgb"
    stored = pixels[..., 0] if channels == 1 else pixels
    path = tmp_path / "photo.tif"
    extra = ["unassalpha"] if channels == 4 else None
    tifffile.imwrite(
        path,
        stored,
        photometric=kind,
        compression=compression,
        byteorder=order,
        extrasamples=extra,
    )
    read = photo.read(path)
    assert read.bits == 16
    assert np.array_equal(read.color[..., : min(channels, 3)], pixels[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_photo_is_turned_upright_once(tmp_path: Path, orientation: int, suffix: str):
    path, out = tmp_path / f"photo{suffix}", tmp_path / "out.png"
    make_photo(48, 32).save(path, exif=make_exif(orientation), lossless=True)
    with Image.open(path) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    photo_writer.write(out, photo.read(path), {})
    with Image.open(out) as opened:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(opened)), upright)
        assert opened.getexif().get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_tiff_is_turned_like_8_bits(tmp_path: Path, orientation: int):
    pixels = deep_pixels(3)
    paths = [tmp_path / "8.tif", tmp_path / "16.tif"]
    for path, stored in zip(paths, [photo.to_bits(pixels, 8), pixels], strict=True):
        tags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, stored, photometric="rgb", extratags=tags)
    shallow, deep = (photo.read(path) for path in paths)
    assert (shallow.bits, deep.bits) == (8, 16)
    assert np.array_equal(photo.to_bits(deep.color, 8), shallow.color)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_profile_and_resolution_are_kept(tmp_path: Path, suffix: str):
    path = tmp_path / f"photo{suffix}"
    make_photo().save(path, exif=make_exif(6), icc_profile=SRGB, dpi=(300, 300), lossless=True)
    out = tmp_path / ("out.tif" if suffix == ".tif" else "out.png")
    photo_writer.write(out, photo.read(path), {})
    with Image.open(out) as written:
        exif = written.getexif()
        assert exif[ExifTags.Base.Make] == "A camera"
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 3200
        assert written.info["icc_profile"] == SRGB
        if suffix != ".webp":
            assert written.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert photo.read(path).notes == ()


def test_exif_keeps_its_bytes(tmp_path: Path):
    path = tmp_path / "photo.jpg"
    make_photo().save(path, exif=make_exif(8))
    with Image.open(path) as opened:
        before = opened.info["exif"].removeprefix(photo.EXIF_PREFIX)
    after = photo.read(path).exif
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert len(before) == len(after)
    assert [before[place] for place in changed] == [8]


def damage_table(exif: bytes) -> bytes:
    return exif[:-20]


def damage_offset(exif: bytes) -> bytes:
    return exif[:4] + b"\xff\xff\xff\x7f" + exif[8:]


def damage_header(exif: bytes) -> bytes:
    return b"JUNK" + exif[4:]


@pytest.mark.parametrize("damage", [damage_table, damage_offset, damage_header])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_exif_is_left_out(tmp_path: Path, damage: Callable[[bytes], bytes], suffix: str):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "A camera with a long name at the end"
    path = tmp_path / f"photo{suffix}"
    raw = damage(exif.tobytes().removeprefix(photo.EXIF_PREFIX))
    make_photo().save(path, exif=photo.EXIF_PREFIX + raw)
    read = photo.read(path)
    assert read.exif == b""
    assert read.notes == ("its EXIF is damaged and is left out",)
    assert read.color.shape == (72, 96, 3)


def test_damaged_exif_still_says_where_up_is(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "A name that is long enough to be cut off"
    make_photo(48, 32).save(tmp_path / "photo.png", exif=exif.tobytes()[:-10])
    read = photo.read(tmp_path / "photo.png")
    assert np.array_equal(read.color, np.rot90(np.asarray(make_photo(48, 32)), -1))
    assert (read.exif, len(read.notes)) == (b"", 1)


def test_white_is_zero(tmp_path: Path):
    values = deep_pixels(1)[..., 0]
    tifffile.imwrite(tmp_path / "photo.tif", values, photometric="miniswhite")
    assert np.array_equal(photo.read(tmp_path / "photo.tif").color[..., 0], 65535 - values)


def test_multiplied_alpha_is_undone(tmp_path: Path):
    pixels = deep_pixels(4)
    pixels[..., 3] |= 0x8000
    stored = pixels.copy()
    stored[..., :3] = (pixels[..., :3] * (pixels[..., 3:] / 65535)).round()
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, stored, photometric="rgb", extrasamples=["assocalpha"])
    read = photo.read(path)
    assert np.abs(read.color.astype(int) - pixels[..., :3]).max() <= 1
    assert np.array_equal(np.asarray(read.alpha), pixels[..., 3])


def test_grey_stays_grey(tmp_path: Path):
    path = tmp_path / "grey.tif"
    values = np.arange(41 * 67, dtype=np.uint16).reshape(41, 67) * 20
    tifffile.imwrite(path, values)
    read = photo.read(path)
    tinted = read.color.copy()
    tinted[..., 0] += 100
    photo_writer.write(path, read.with_color(tinted), {})
    with Image.open(path) as written:
        assert written.mode == "I;16"
        assert np.array_equal(np.asarray(written), values + 30)  # 0.299 of the red tint


def test_alpha_grows_with_the_picture():
    ramp = np.linspace(0, 65535, 67).astype(np.uint16)
    source = as_photo(np.dstack([deep_pixels(3), np.tile(ramp, (41, 1))]))
    larger = source.with_color(np.repeat(np.repeat(source.color, 2, 0), 2, 1))
    assert larger.alpha is not None
    assert larger.alpha.shape == (82, 134)
    assert np.abs(larger.alpha[::2, ::2].astype(int) - np.asarray(source.alpha)).max() < 600
    assert (source.with_color(larger.color[:, :, [0, 1, 2, 0]]).alpha == larger.color[..., 0]).all()


def test_8_bits_fill_16():
    levels = np.arange(256, dtype=np.uint8)
    assert photo.to_bits(levels, 16)[[0, 1, 255]].tolist() == [0, 257, 65535]
    assert np.array_equal(photo.to_bits(photo.to_bits(levels, 16), 8), levels)


@pytest.mark.parametrize("bits", [8, 16])
def test_large_photos_are_shrunk(tmp_path: Path, bits: int):
    path = tmp_path / "photo.png"
    pixels = photo.to_bits(np.asarray(make_photo(200, 100, mode="RGBA")), bits)
    photo_writer.write(path, as_photo(pixels), {})
    small = photo.read(path, 50)
    assert small.bits == bits
    assert small.color.shape == (25, 50, 3)
    assert small.alpha is not None
    assert small.alpha.shape == (25, 50)
    assert photo.read(path, 50).picture.size == (50, 25)
    assert photo.read(path, 200).picture.size == (200, 100)


def test_cmyk_becomes_rgb(tmp_path: Path):
    path = tmp_path / "photo.jpg"
    make_photo(mode="CMYK").save(path, icc_profile=b"damaged")
    read = photo.read(path)
    assert read.color.shape == (72, 96, 3)
    assert read.icc == b""
    assert read.notes == ("its CMYK colours become sRGB",)


def test_only_the_first_page_is_taken_and_said(tmp_path: Path):
    path = tmp_path / "pages.tif"
    first = make_photo()
    first.save(path, save_all=True, append_images=[make_photo(seed=1)])
    read = photo.read(path)
    assert np.array_equal(read.color, np.asarray(first))
    assert read.notes == ("only the first of 2 pictures is restored",)


def write_float(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((8, 8), np.float32))


def write_truncated(path: Path) -> None:
    make_photo().save(path, "PNG")
    path.write_bytes(path.read_bytes()[:40])


def write_avif_without_frames(path: Path) -> None:
    make_photo().save(path, "AVIF")
    path.write_bytes(path.read_bytes()[:-50])


def write_truncated_deep(path: Path) -> None:
    tifffile.imwrite(path, deep_pixels(3), photometric="rgb", compression="zlib")
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no photo"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.write_bytes(b""), "not a picture"),
        (lambda path: path.write_text("no picture"), "unknown format"),
        (write_truncated, "not a picture that can be read"),
        (write_truncated_deep, "read"),
        (write_avif_without_frames, "not a picture that can be read"),
        (write_float, "'F'; accepted are 8 and 16 bits"),
    ],
)
def test_bad_photos_are_named(tmp_path: Path, make: Callable[[Path], None], message: str):
    path = tmp_path / "ein Foto.tif"
    make(path)
    with pytest.raises(PhotoError, match=message) as caught:
        photo.read(path)
    assert str(path) in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "out.png"
    path.write_text("old")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=full))
    with pytest.raises(PhotoError, match=r"out\.png cannot be written: No space left"):
        photo_writer.write(path, as_photo(deep_pixels(3)), {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_have_no_record(tmp_path: Path):
    for name in ("photo.png", "photo.tif", "photo.jpg"):
        make_photo().save(tmp_path / name)
        assert photo_writer.read_record(tmp_path / name) is None
    assert photo_writer.read_record(tmp_path / "nowhere.png") is None


def test_exif_that_tiff_cannot_hold_is_a_fault_of_the_photo(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {int(ExifTags.GPS.GPSLatitudeRef): "N"}
    latitude = exif.tobytes().replace(b"\0\1\0\2\0\0\0\2N", b"\0\2\0\2\0\0\0\2N")
    make_photo().save(tmp_path / "jpeg.tif", "JPEG", exif=latitude)
    odd = photo.read(tmp_path / "jpeg.tif")
    with pytest.raises(PhotoError, match=r"out\.tif cannot be written: bad operand") as caught:
        photo_writer.write(tmp_path / "out.tif", odd, {})
    assert not isinstance(caught.value, photo_writer.OutputError)
    assert [path.name for path in tmp_path.iterdir()] == ["jpeg.tif"]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tif", ".tga"])
def test_what_is_there_of_a_photo_is_read(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"photo{suffix}"
    make_photo().save(path)
    whole = photo.read(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share) - 2])
    read = photo.read(path)
    assert read.color.shape == whole.color.shape
    # Headers take their part, too.
    same = (read.color == whole.color).all(2)
    assert same.mean() > share * 0.4
    # Two bytes less may leave all pixels, of which nothing is to be said.
    assert same.all() or any("cut off" in note for note in read.notes)
    assert photo.read(path).notes == read.notes, "the switch for one photo is left on"


@pytest.mark.parametrize("suffix", [".webp", ".tif"])
def test_what_decoders_refuse_is_read_up_to_its_end(tmp_path: Path, suffix: str):
    path = tmp_path / f"photo{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(
            path, deep_pixels(3), photometric="rgb", compression="zlib", rowsperstrip=4
        )
    else:
        make_photo().save(path, quality=90)
    whole = photo.read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    read = photo.read(path)
    assert (read.bits, read.color.shape) == (whole.bits, whole.color.shape)
    difference = np.abs(read.color.astype(float) - whole.color).mean((1, 2))
    assert (difference < 10).mean() > 0.4
    assert any("cut off" in note for note in read.notes)
    assert not any("8 of its 16" in note for note in read.notes)
    assert read.digest == photo.file_digest(path)


def test_a_deep_photo_that_is_cut_off_is_read_at_8_bits(tmp_path: Path):
    path = tmp_path / "photo.png"
    pixels = deep_pixels(3)
    photo_writer.write(path, as_photo(pixels), {})
    path.write_bytes(path.read_bytes()[:-20])
    read = photo.read(path)
    assert np.array_equal(read.color[:-2], (pixels >> 8).astype(np.uint8)[:-2])
    assert any("8 of its 16 bits" in note for note in read.notes)


def test_a_history_of_edits_is_no_reason_to_refuse(tmp_path: Path):
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 2**22, zip=True)
    make_photo().save(tmp_path / "photo.png", pnginfo=text)
    assert photo.read(tmp_path / "photo.png").notes == ()


def test_a_note_without_an_end_is_no_record(tmp_path: Path):
    text = PngImagePlugin.PngInfo()
    text.add_text(photo_writer.RECORD_KEY, "[" * 100_000)
    make_photo().save(tmp_path / "photo.png", pnginfo=text)
    assert photo_writer.read_record(tmp_path / "photo.png") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_fault_of_the_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(stream: BinaryIO, *arguments: object) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(photo_writer, "_write_png", full)
    with pytest.raises(photo_writer.OutputError, match="No space left"):
        photo_writer.write(tmp_path / "photo.png", as_photo(deep_pixels(3)), {})
    assert list(tmp_path.iterdir()) == []
