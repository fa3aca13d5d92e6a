"""Reads photos: 8 or 16 bits, with EXIF, ICC profile, resolution and transparency.

Pillow reads colour at 8 bits only, so 16-bit colour is decoded by PyAV, which ComfyUI requires.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin

from tools.errors import DAMAGED, DECODING, ClientError

# Editors put whole histories into PNG files; Pillow's 1 MB would refuse the photo for its text.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20

Pixels = npt.NDArray[Any]
"""(H, W) or (H, W, C), uint8 or uint16."""

EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION = 0x0112
# How to turn the stored pixels upright, by the value of the EXIF tag.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
# Bytes of the value types of TIFF 6.0 and EXIF 2.3; 129 is EXIF 3.0's UTF-8.
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
TYPE_SIZES[129] = 1
# What describes the photo in the first folder of a TIFF file; the rest describes the file.
DESCRIPTIONS = (270, 271, 272, 305, 306, 315, 18246, 33432, 40091, 40092, 40093, 40094, 40095)
SUB_FOLDERS = (int(ExifTags.IFD.Exif), int(ExifTags.IFD.GPSInfo))
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV")
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


class PhotoError(ClientError):
    """The photo cannot be read or its result cannot be written; the message names the file."""


@dataclass(frozen=True)
class Photo:
    """A photo in memory, upright."""

    color: Pixels
    """(H, W, 3), uint8 or uint16; three equal channels for a grey photo."""
    alpha: Pixels | None
    """(H, W), of the same type; ``None`` for an opaque photo."""
    grey: bool
    """The file has one channel of brightness, and its result will have one, too."""
    exif: bytes
    """A TIFF structure without the prefix ``Exif``, its orientation upright; may be empty."""
    icc: bytes
    """Colour profile, of grey or RGB as the photo; may be empty."""
    dpi: tuple[float, float] | None
    digest: str
    """SHA-256 of the file."""
    notes: tuple[str, ...] = ()
    """What of the file is not carried over, in words."""

    @property
    def bits(self) -> int:
        """Per channel: 8 or 16."""
        return self.color.dtype.itemsize * 8

    @property
    def pixels(self) -> Pixels:
        """(H, W, 3), or (H, W, 4) with transparency."""
        return self.color if self.alpha is None else np.dstack([self.color, self.alpha])

    @property
    def picture(self) -> Image.Image:
        """The colours at 8 bits."""
        return Image.fromarray(to_bits(self.color, 8))

    def with_color(self, color: Pixels, *notes: str) -> Photo:
        """Returns the photo with other colours, at its own bit depth.

        Args:
            color: (H', W', 3) or (H', W', 4), uint8 or uint16. Transparency of the fourth channel
                replaces the photo's, which is otherwise scaled to the new size.
            notes: To add to the photo's.
        """
        pixels = to_bits(color, self.bits)
        alpha = self.alpha
        if pixels.shape[2] == 4:
            alpha = pixels[..., 3]
        elif alpha is not None and alpha.shape != pixels.shape[:2]:
            alpha = _resize(alpha, (pixels.shape[1], pixels.shape[0]))
        return replace(
            self, color=pixels[..., :3], alpha=alpha, notes=tuple(dict.fromkeys(self.notes + notes))
        )


def to_bits(pixels: Pixels, bits: int) -> Pixels:
    """Returns pixels at 8 or 16 bits; white stays white."""
    if pixels.dtype.itemsize * 8 == bits:
        return pixels
    if bits == 16:
        return pixels.astype(np.uint16) * 257
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read(path: Path, max_side: int = 0) -> Photo:
    """Reads a photo, of any format that Pillow knows, with all that its result shall keep.

    Larger ones than ``max_side`` pixels are shrunk to it; 0 keeps the size. A file that is missing,
    no picture, or of a kind that cannot be restored raises `PhotoError`.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PhotoError(f"there is no photo {path}") from error
    except OSError as error:
        raise PhotoError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with DECODING:
            photo = _decode_what_is_there(path, data)
    except PhotoError:
        raise
    except DAMAGED as error:
        # Pillow's own message names the stream in memory, not the file.
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise PhotoError(f"{path} is not a picture that can be read: {reason}") from error
    if max_side and max(photo.color.shape[:2]) > max_side:
        color = _shrink(photo.color, max_side)
        alpha = None if photo.alpha is None else _shrink(photo.alpha, max_side)
        photo = replace(photo, color=color, alpha=alpha)
    return replace(photo, digest=hashlib.sha256(data).hexdigest())


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, as in `Photo.digest`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _decode_what_is_there(path: Path, data: bytes) -> Photo:
    """A photo, or what there is of one that is cut off, as every viewer shows it."""
    try:
        return _decode(path, data)
    except OSError as fault:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            photo = _decode(path, _pad(data) if data[8:12] == b"WEBP" else data, damaged=True)
        except DAMAGED:
            raise fault from None
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        if (photo.color == photo.color[0, 0]).all():
            raise
        return photo


def _pad(data: bytes) -> bytes:
    """Zeros in place of what is cut off, up to which decoders read that would refuse the file."""
    return data + bytes(len(data) + 2**24)


def _decode(path: Path, data: bytes, *, damaged: bool = False) -> Photo:
    notes: list[str] = []
    if damaged:
        notes.append("the file is damaged or cut off: what is missing stays empty")
    with Image.open(io.BytesIO(data)) as opened:
        tiff = isinstance(opened, TiffImagePlugin.TiffImageFile)
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # the further pictures of MPO are previews
            notes.append(f"only the first of {frames} pictures is restored")
        exif, orientation = _exif(opened, notes)
        icc, dpi = opened.info.get("icc_profile") or b"", _dpi(opened)
        deep = _codec_of_deep_color(opened, data)
        pixels = None
        if deep:
            try:
                pixels = _deep_color(path, _pad(data) if damaged else data, deep)
                # Pillow turns the pixels of a TIFF file upright itself.
                pixels = UPRIGHT.get(orientation, np.asarray)(pixels)
                if tiff and opened.tag_v2.get(338) == (1,):
                    pixels = _divide_by_alpha(pixels)
            except OSError:
                if not damaged:
                    raise
                notes.append("only 8 of its 16 bits could be read")
        if pixels is None:
            opened.load()
            turn = UPRIGHT.get(1 if tiff else orientation, np.asarray)
            pixels = turn(_shallow(path, opened, icc, notes))
    grey, alpha = pixels.ndim == 2 or pixels.shape[2] < 3, None
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] in (2, 4):
        alpha = np.ascontiguousarray(pixels[..., -1])
    color = np.ascontiguousarray(np.repeat(pixels[..., :1], 3, 2) if grey else pixels[..., :3])
    if icc and icc[16:20] != (b"GRAY" if grey else b"RGB "):
        icc = b""
        if not any("sRGB" in note for note in notes):
            notes.append("its colour profile is not for its colours and is left out")
    return Photo(color, alpha, grey, exif, icc, dpi, "", tuple(notes))


def _shallow(path: Path, opened: Image.Image, icc: bytes, notes: list[str]) -> Pixels:
    """(H, W) or (H, W, C) of what Pillow reads without loss."""
    mode = opened.mode
    if mode in DEEP_GREY or (mode == "I" and opened.format == "PNG"):  # I: Pillow before 11
        values = np.asarray(opened).astype(np.uint16)
        inverted = isinstance(opened, TiffImagePlugin.TiffImageFile) and opened.tag_v2[262] == 0
        return 65535 - values if inverted else values
    if mode not in MODES:
        raise PhotoError(
            f"{path} has pixels of the kind {mode!r}; accepted are 8 and 16 bits per channel in "
            "grey, RGB, CMYK or a palette. Save it as a 16-bit PNG or TIFF"
        )
    if mode == "CMYK":
        notes.append("its CMYK colours become sRGB")
        return np.asarray(_cmyk_to_srgb(opened, icc))
    transparent = opened.has_transparency_data
    if mode in ("1", "L", "LA", "La"):
        return np.asarray(opened.convert("LA" if transparent else "L"))
    return np.asarray(opened.convert("RGBA" if transparent else "RGB"))


def _cmyk_to_srgb(opened: Image.Image, icc: bytes) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    with suppress(ImageCms.PyCMSError, OSError):  # no profile, or a damaged one
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(opened, profile, srgb, outputMode="RGB")
        return cast("Image.Image", converted)
    return opened.convert("RGB")


def _codec_of_deep_color(opened: Image.Image, data: bytes) -> str | None:
    """PyAV's name of the codec, where Pillow would drop the lower half of 16 bits."""
    if opened.mode in DEEP_GREY:
        return None
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return "tiff" if 16 in opened.tag_v2.get(258, ()) else None
    # Byte 24 of a PNG file is the bit depth.
    return "png" if opened.format == "PNG" and data[24] == 16 and opened.mode != "I" else None


def _deep_color(path: Path, data: bytes, codec: str) -> Pixels:
    try:
        context = cast("av.VideoCodecContext", av.CodecContext.create(codec, "r"))
        frames = context.decode(av.Packet(data)) or context.decode(None)
        # ya16, grey with transparency, has no array of its own.
        name = frames[0].format.name
        frame = frames[0].reformat(format="rgba64le") if name.startswith("ya16") else frames[0]
        pixels = frame.to_ndarray()
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise OSError(f"no 16-bit picture: {error}") from error
    if pixels.dtype != np.uint16:
        raise PhotoError(f"{path} has 16 bits per channel in a layout that is not known: {name}")
    return pixels[..., [0, 3]] if name.startswith("ya16") else pixels


def _divide_by_alpha(pixels: Pixels) -> Pixels:
    """Undoes the multiplication of the colours with alpha that a TIFF file says it has."""
    alpha = np.maximum(pixels[..., 3:].astype(np.float64), 1)
    color = (pixels[..., :3] * (65535 / alpha)).round().clip(0, 65535).astype(np.uint16)
    return np.concatenate([color, pixels[..., 3:]], 2)


def _exif(opened: Image.Image, notes: list[str]) -> tuple[bytes, int]:
    """EXIF with the upright orientation, and the orientation of the pixels (1: upright)."""
    exif, orientation = None, 1
    try:
        if isinstance(opened, TiffImagePlugin.TiffImageFile):
            orientation = int(opened.tag_v2.get(ORIENTATION, 1))
            exif = _describe_tiff(opened)
        else:
            raw = opened.info.get("exif") or opened.getexif().tobytes()
            exif, orientation = _turn_upright(raw.removeprefix(EXIF_PREFIX))
    except DAMAGED:
        pass
    if exif is None:
        notes.append("its EXIF is damaged and is left out")
    return exif or b"", orientation


def _turn_upright(exif: bytes) -> tuple[bytes | None, int]:
    """Sets the orientation in place, so that maker notes keep their offsets.

    Returns:
        The EXIF, ``None`` if it is damaged, and the orientation that it had, even so.
    """
    if not exif:
        return b"", 1
    turned: bytearray | None = bytearray(exif)
    orientation = 1
    try:
        order = {b"II*\x00": "<", b"MM\x00*": ">"}[exif[:4]]
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHII", exif, place)
            size = TYPE_SIZES.get(kind, 0) * count
            if kind not in TYPE_SIZES or (size > 4 and value + size > len(exif)):
                turned = None
            if tag == ORIENTATION and kind == 3:
                (orientation,) = struct.unpack_from(f"{order}H", exif, place + 8)
                if turned is not None:
                    struct.pack_into(f"{order}H", turned, place + 8, 1)
    except (KeyError, struct.error):
        turned = None
    return (None if turned is None else bytes(turned)), orientation


def _describe_tiff(opened: TiffImagePlugin.TiffImageFile) -> bytes:
    """The tags that describe the photo, as EXIF; empty if there are none."""
    known, kept = opened.getexif(), Image.Exif()
    kept.update((tag, known[tag]) for tag in DESCRIPTIONS if tag in known)
    for tag in SUB_FOLDERS:
        if folder := known.get_ifd(tag):
            kept[tag] = folder
    return kept.tobytes().removeprefix(EXIF_PREFIX) if len(kept) else b""


def _dpi(opened: Image.Image) -> tuple[float, float] | None:
    dpi = opened.info.get("dpi")
    try:
        across, down = (float(value) for value in dpi or ())
    except (ValueError, TypeError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def _shrink(pixels: Pixels, max_side: int) -> Pixels:
    small = Image.fromarray(to_bits(pixels, 8))
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return np.asarray(small) if pixels.dtype == np.uint8 else _resize(pixels, small.size)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes to (width, height), at any bit depth."""
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)
        for channel in np.atleast_3d(pixels).transpose(2, 0, 1)
    ]
    highest = np.iinfo(pixels.dtype).max
    resized = np.stack([np.asarray(channel) for channel in channels], 2).round().clip(0, highest)
    return resized.astype(pixels.dtype).reshape(size[1], size[0], *pixels.shape[2:])
