"""Writes photos as PNG or TIFF of 8 or 16 bits, with a record of what they were made from.

Pillow writes no 16-bit colour: PyAV compresses the pixels of PNG files, and what is said about them
is put together here.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import putchunk

from tools.errors import DAMAGED
from tools.photo import DESCRIPTIONS, EXIF_PREFIX, SUB_FOLDERS, Photo, PhotoError, Pixels

RECORD_KEY = "diff-restorer"
RECORD_TAG = 65000
"""The private TIFF tag of the record."""
PART_PREFIX = ".diff-restorer-part-"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LAYOUTS = {
    8: ("gray", "ya8", "rgb24", "rgba"),
    16: ("gray16be", "ya16be", "rgb48be", "rgba64be"),
}
"""PyAV's names for one to four channels."""


class OutputError(PhotoError):
    """No result can be written any more: the disk is full or read-only."""


def write(path: Path, photo: Photo, record: Mapping[str, Any]) -> None:
    """Writes a photo as TIFF (``.tif``) or PNG, with a record that `read_record` finds.

    Raises `PhotoError` if the file cannot be written, and `OutputError` if no other can be, either.
    """
    note = json.dumps(record)
    try:
        with whole(path) as stream:
            (_write_tiff if path.suffix == ".tif" else _write_png)(stream, photo, note)
    except DAMAGED as error:  # of odd EXIF, too
        kind = OutputError if getattr(error, "errno", None) in NO_SPACE else PhotoError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path} cannot be written: {reason}") from error


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears complete or not at all, whoever else writes one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PART_PREFIX}{uuid.uuid4().hex}")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the record of a file that `write` made, or ``None`` for every other file."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return None
    try:
        with Image.open(path, formats=("PNG", "TIFF")) as opened:
            if isinstance(opened, TiffImagePlugin.TiffImageFile):
                note = opened.tag_v2.get(RECORD_TAG)
            else:
                note = opened.info.get(RECORD_KEY)
            record = json.loads(note) if isinstance(note, str) else None
    except DAMAGED:
        return None
    return cast("dict[str, Any]", record) if isinstance(record, dict) else None


def decodes(path: Path) -> bool:
    """Whether all pixels of a PNG or TIFF file are there."""
    try:
        with Image.open(path, formats=("PNG", "TIFF")) as opened:
            opened.verify()  # checksums, which load ignores
        with Image.open(path, formats=("PNG", "TIFF")) as opened:
            opened.load()
    except DAMAGED:
        return False
    return True


def _channels(photo: Photo) -> Pixels:
    """(H, W, C) as it is stored: grey or RGB, then transparency."""
    if not photo.grey:
        return photo.pixels
    # Rec. 601, as Pillow's convert("L"); a restoration may tint what was grey.
    luma = (photo.color @ np.array([0.299, 0.587, 0.114])).round().astype(photo.color.dtype)
    return replace(photo, color=luma[..., None]).pixels


def _write_png(stream: BinaryIO, photo: Photo, record: str) -> None:
    encoded = _encode_png(_channels(photo))
    begin = encoded.index(b"IDAT") - 4
    stream.write(encoded[:33])  # signature and IHDR
    if photo.icc:
        putchunk(stream, b"iCCP", b"ICC profile\x00\x00", zlib.compress(photo.icc))
    if photo.dpi:
        per_metre = np.array([value / 0.0254 for value in photo.dpi]).round().astype(">u4")
        putchunk(stream, b"pHYs", per_metre.tobytes(), b"\x01")
    if photo.exif:
        putchunk(stream, b"eXIf", photo.exif)
    putchunk(stream, b"tEXt", f"{RECORD_KEY}\x00{record}".encode("latin-1"))
    stream.write(encoded[begin:])


def _encode_png(pixels: Pixels) -> bytes:
    """(H, W, C) as a PNG file without anything but pixels."""
    height, width, channels = pixels.shape
    bits = pixels.itemsize * 8
    encoder = cast("av.VideoCodecContext", av.CodecContext.create("png", "w"))
    encoder.width, encoder.height, encoder.time_base = width, height, Fraction(1)
    encoder.pix_fmt = layout = LAYOUTS[bits][channels - 1]
    encoder.options = {"pred": "paeth"}
    frame = av.VideoFrame(width, height, layout)
    rows = pixels.astype(f">u{bits // 8}").view(np.uint8).reshape(height, -1)
    gap = frame.planes[0].line_size - rows.shape[1]
    frame.planes[0].update(np.pad(rows, ((0, 0), (0, gap))).tobytes())
    return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


def _write_tiff(stream: BinaryIO, photo: Photo, record: str) -> None:
    pixels = _channels(photo)
    height, width, channels = pixels.shape
    # Predictor 2: differences to the left neighbour.
    differences = pixels.copy()
    differences[:, 1:] -= pixels[:, :-1]
    strip = zlib.compress(differences.astype(f"<u{photo.bits // 8}").tobytes())
    folder = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    exif = Image.Exif()
    if photo.exif:
        exif.load(EXIF_PREFIX + photo.exif)
    for tag in DESCRIPTIONS:
        if tag in exif:
            folder[tag] = exif[tag]
    for tag in SUB_FOLDERS:
        if sub_folder := exif.get_ifd(tag):
            folder.tagtype[tag] = 4
            folder[tag] = sub_folder
    for tag, value in {
        256: width,
        257: height,
        258: (photo.bits,) * channels,
        259: 8,  # deflate
        262: 1 if photo.grey else 2,  # black is zero, or RGB
        273: 0,  # the place of the strip; Pillow adds the length of the folder
        277: channels,
        278: height,
        279: len(strip),
        284: 1,
        317: 2,
    }.items():
        folder[tag] = value
    if photo.alpha is not None:
        folder[338] = (2,)  # not multiplied with the colours
    if photo.dpi:
        folder[282], folder[283] = photo.dpi
        folder[296] = 2
    if photo.icc:
        folder.tagtype[34675] = 7
        folder[34675] = photo.icc
    folder.tagtype[RECORD_TAG] = 2
    folder[RECORD_TAG] = record
    folder.save(stream)
    stream.write(strip)
