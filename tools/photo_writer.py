"""Writes photos as PNG or TIFF of 8 or 16 bits, with a record of what they were made from.

Pillow writes no 16-bit colour, so the files are put together here.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, TiffImagePlugin

from tools.client import DAMAGED
from tools.photo import (
    DESCRIPTIONS,
    EXIF_PREFIX,
    SUB_FOLDERS,
    Photo,
    PhotoError,
    Pixels,
)

RECORD_KEY = "diff-restorer"
RECORD_TAG = 65000
"""The private TIFF tag of the record."""
PART_PREFIX = ".diff-restorer-part-"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
UMASK = os.umask(0o077)
os.umask(UMASK)
BAND = 64
"""Rows that are filtered and compressed at once."""


class OutputError(PhotoError):
    """No result can be written any more: the disk is full or read-only."""


def write(path: Path, photo: Photo, record: Mapping[str, Any]) -> None:
    """Writes a photo as TIFF (``.tif``) or PNG; the file is complete or not there.

    Args:
        path: The file; one of that name is replaced.
        photo: What to write.
        record: JSON for `read_record`, kept inside the file.

    Raises:
        PhotoError: The file cannot be written.
        OutputError: Nor can any other.
    """
    note = json.dumps(record)
    try:
        with whole(path) as stream:
            (_write_tiff if path.suffix == ".tif" else _write_png)(stream, photo, note)
    except OSError as error:
        kind = OutputError if error.errno in NO_SPACE else PhotoError
        raise kind(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears complete or not at all, whoever else writes one of that name.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=PART_PREFIX, dir=path.parent)
    try:
        with open(number, "wb") as stream:
            yield cast("BinaryIO", stream)
            stream.flush()
            os.fsync(number)
        os.chmod(name, 0o666 & ~UMASK)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


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
    def chunk(name: bytes, data: bytes) -> None:
        stream.write(struct.pack(">I", len(data)) + name + data)
        stream.write(struct.pack(">I", zlib.crc32(name + data)))

    pixels = _channels(photo)
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    stream.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, photo.bits, color_type, 0, 0, 0))
    if photo.icc:
        chunk(b"iCCP", b"ICC profile\x00\x00" + zlib.compress(photo.icc))
    if photo.dpi:
        per_metre = [round(value / 0.0254) for value in photo.dpi]
        chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1))
    if photo.exif:
        chunk(b"eXIf", photo.exif)
    chunk(b"tEXt", f"{RECORD_KEY}\x00{record}".encode("latin-1"))
    rows = pixels.astype(f">u{photo.bits // 8}").view(np.uint8).reshape(height, -1)
    packer = zlib.compressobj(6)
    for top in range(0, height, BAND):
        band = _filter(rows, top, min(top + BAND, height), channels * photo.bits // 8)
        chunk(b"IDAT", packer.compress(band.tobytes()))
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def _filter(rows: Pixels, top: int, bottom: int, step: int) -> Pixels:
    """Rows of bytes as differences to PNG's Paeth predictor (PNG specification, 9.4)."""
    band = np.zeros((bottom - top + 1, rows.shape[1] + step), np.int16)
    band[1:, step:] = rows[top:bottom]
    if top:
        band[0, step:] = rows[top - 1]
    left, up, corner = band[1:, :-step], band[:-1, step:], band[:-1, :-step]
    from_left, from_up = np.abs(up - corner), np.abs(left - corner)
    from_corner = np.abs(left + up - 2 * corner)
    best = np.where(from_up <= from_corner, up, corner)
    best = np.where((from_left <= from_up) & (from_left <= from_corner), left, best)
    filtered = np.full((bottom - top, rows.shape[1] + 1), 4, np.uint8)
    filtered[:, 1:] = (band[1:, step:] - best).astype(np.uint8)
    return filtered


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
