"""Pack the best photos for a machine without them: `python -m training.pack --help`.

A pack is an uncompressed tar of photos, best first, which `--data.photos` reads as any shard.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.degradations.compression import LUMINANCE_TABLE
from diff_restorer.files import written_whole

from .checkpoints import require_space
from .config import run_program
from .photos import UNREADABLE, PhotoFile, list_photos

log = logging.getLogger(__name__)

LARGE = 2.4e6
"""Pixels above which a photo is reduced, by `REDUCTION` or more, to `REDUCED` pixels or fewer."""
REDUCED, REDUCTION = 1.6e6, 1.5
REDUCED_QUALITY = 95
WEBP_QUALITY = 90
"""What is taken for the quality of a file that does not tell it."""

JPEG_START = b"\xff\xd8"


@dataclass(frozen=True)
class Config:
    """Choose photos by their worth = quality x sharpness x size, until the pack is full.

    Quality is JPEG's, read from the quantisation table, above 50 (50 counts 0, 100 and files
    without loss 1; below `least_quality` a photo is left out). Sharpness is how much of the finest
    octave there is against the next (1 where they are even, as in most good photos; less where a
    photo was enlarged or is soft). Size is the root of the megapixels, at most 1.

    Photos are packed as they are, byte for byte; only those of more than 2.4 megapixels are reduced
    by 1.5 or more, which takes JPEG's blocks and a camera's interpolation away, and written in
    quality 95, 4:4:4, without their metadata.
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """Folders, text lists, CSV manifests or tar shards."""
    megabytes: float = 24.0
    """Largest size of the pack, in units of 2^20 bytes."""
    out: Path = Path("photos.pack")
    """File to write."""
    least_quality: int = 85
    """JPEG quality below which a photo is left out, unless it is reduced."""
    source_quality: str = ""
    """Column of the CSV manifests with the JPEG quality that a photo had before it came here; where
    it is lower than the file's own, it counts."""
    least_side: int = 192
    """Photos with a shorter side are left out: training would have to enlarge them."""


@dataclass(frozen=True)
class Candidate:
    """A photo that may be packed."""

    file: PhotoFile
    size: int
    """Bytes in the pack."""
    quality: int
    sharpness: float
    pixels: int
    """When packed."""

    @property
    def worth(self) -> float:
        """What the best photos have most of, see `Config`."""
        share = max(0.0, (self.quality - 50) / 50)
        return share * min(1.0, self.sharpness) * math.sqrt(min(1.0, self.pixels / 1e6))


def main(config: Config) -> Path:
    """Choose, and write the pack.

    Raises:
        ValueError: There is no photo, or none is good enough or fits.
        DiskError: There is too little room for the pack.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    qualities = _source_qualities(config)
    files = sorted({file for source in config.photos for file in list_photos(source)}, key=str)

    def look(file: PhotoFile) -> Candidate | None:
        try:
            return _candidate(file, qualities.get(str(file), 100), config)
        except UNREADABLE as error:
            log.warning("left out %s: %s", file, error)
            return None

    with ThreadPoolExecutor() as pool:
        candidates = [candidate for candidate in pool.map(look, files) if candidate is not None]
    candidates.sort(key=lambda candidate: -candidate.worth)
    chosen = list(_fitting(candidates, round(config.megabytes * 2**20)))
    if not chosen:
        raise ValueError(
            f"{', '.join(map(str, config.photos))}: of {len(files)} photos {len(candidates)} are "
            f"good enough (quality {config.least_quality}, {config.least_side} pixels) and none "
            f"fits into --megabytes {config.megabytes:g}; give more photos or a larger pack"
        )
    _write(config.out, chosen)
    log.info(
        "%s: %.1f MiB, %d of %d photos, %.0f megapixels, JPEG quality %d to %d, worth %.2f to %.2f",
        *(config.out, config.out.stat().st_size / 2**20, len(chosen), len(files)),
        sum(candidate.pixels for candidate in chosen) / 1e6,
        *(side(c.quality for c in chosen) for side in (min, max)),
        *(chosen[-1].worth, chosen[0].worth),
    )
    return config.out


def jpeg_quality(picture: Image.Image) -> int:
    """libjpeg's quality that comes nearest to a picture's luminance table; 100 where it has none.

    Source: jpeg_quality_scaling of libjpeg.
    """
    tables: dict[int, Sequence[int]] = getattr(picture, "quantization", None) or {}
    if not tables:
        return 100
    own = sum(tables[0])

    def total(quality: int) -> int:
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        return sum(min(255, max(1, (entry * scale + 50) // 100)) for entry in LUMINANCE_TABLE)

    return min(range(1, 101), key=lambda quality: abs(total(quality) - own))


def sharpness(grey: Tensor) -> float:
    """Root mean square of the finest octave over that of the next.

    Args:
        grey: (H, W), any range.
    """
    grey = grey[None, None].float()
    finest, next_one = _octave(grey), _octave(F.avg_pool2d(grey, 2))
    return float(finest / next_one.clamp_min(1e-6))


def _octave(grey: Tensor) -> Tensor:
    """What is lost by halving and doubling again."""
    back = F.interpolate(F.avg_pool2d(grey, 2), size=grey.shape[-2:], mode="bilinear")
    return (grey - back).square().mean().sqrt()


def _candidate(file: PhotoFile, known: int, config: Config) -> Candidate | None:
    """The photo as it would be packed; None where it is not good enough."""
    with file.open("rb") as stream, Image.open(stream) as picture:
        reduced = picture.width * picture.height > LARGE
        own = WEBP_QUALITY if picture.format == "WEBP" else jpeg_quality(picture)
    quality = REDUCED_QUALITY if reduced else min(known, own)
    if quality < config.least_quality:
        return None
    content = packed(file)
    with Image.open(io.BytesIO(content)) as picture:
        grey = torch.from_numpy(np.array(picture.convert("L")))
    if min(grey.shape) < config.least_side:
        return None
    return Candidate(file, len(content), quality, sharpness(grey), grey.numel())


def packed(file: PhotoFile) -> bytes:
    """What a pack holds of a photo."""
    with file.open("rb") as stream:
        content = stream.read()
    with Image.open(io.BytesIO(content)) as picture:
        if picture.width * picture.height <= LARGE:
            return content
        upright: Any = ImageOps.exif_transpose(picture).convert("RGB")
    factor = max(REDUCTION, math.sqrt(upright.width * upright.height / REDUCED))
    sides = [round(side / factor) for side in upright.size]
    written = io.BytesIO()
    upright.resize(sides, Image.Resampling.LANCZOS).save(
        written, "JPEG", quality=REDUCED_QUALITY, subsampling=0, optimize=True
    )
    return written.getvalue()


def _source_qualities(config: Config) -> dict[str, int]:
    """Photo -> quality of its source, from the manifests."""
    qualities: dict[str, int] = {}
    for source in config.photos:
        if not config.source_quality or source.suffix.lower() != ".csv":
            continue
        with source.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if config.source_quality not in row:
                    raise ValueError(
                        f"--source-quality: {source} has no column {config.source_quality!r}, "
                        f"but {', '.join(row)}"
                    )
                if value := row[config.source_quality]:
                    qualities[str(source.parent / row["path"])] = int(float(value))
    return qualities


def _fitting(ranked: Sequence[Candidate], room: int) -> Iterator[Candidate]:
    """The first that fit, in their order; smaller ones after one that does not."""
    room -= tarfile.RECORDSIZE  # the end mark, filled up
    for candidate in ranked:
        needed = tarfile.BLOCKSIZE * (1 + math.ceil(candidate.size / tarfile.BLOCKSIZE))
        if needed <= room:
            room -= needed
            yield candidate


def _write(out: Path, chosen: Sequence[Candidate]) -> None:
    """Nothing in it tells of a disk or a date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(candidate.size for candidate in chosen) + 2**20, "its photos")
    with (
        written_whole(out) as part,
        tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for place, candidate in enumerate(chosen):
            content = packed(candidate.file)
            suffix = PurePosixPath(candidate.file.name).suffix.lower()
            if content.startswith(JPEG_START):  # a reduced PNG is one now
                suffix = ".jpg"
            member = tarfile.TarInfo(f"{place:05d}{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_program(main, Config, __doc__)
