"""Clean photos in, degraded training samples out; every sample is a function of (seed, index)."""

import csv
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from diff_restorer.degradations import KINDS, degrade, sample_severity

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def list_photos(source: Path) -> list[Path]:
    """Photo files named by a folder, a text list or a CSV manifest, in a fixed order.

    Args:
        source: A folder (searched recursively), a text file with one path per line (`#` starts a
            comment), or a CSV file with a column `path` and, optionally, a column `part` of which
            the rows `train` are taken. Paths are relative to the list's folder.

    Raises:
        ValueError: The source does not exist, has no `path` column, or names no photo.
    """
    if source.is_dir():
        found = [p for p in source.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file()]
        accepted = f"a folder with photos ({', '.join(sorted(PHOTO_SUFFIXES))})"
    elif not source.is_file():
        raise ValueError(
            f"photos: {source} does not exist; give a folder, a text list or a CSV manifest"
        )
    elif source.suffix.lower() == ".csv":
        with source.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise ValueError(
                    f"photos: {source} has the columns {reader.fieldnames}; a manifest needs `path`"
                )
            rows = [row for row in reader if row.get("part", "train") == "train"]
        found = [source.parent / row["path"] for row in rows]
        accepted = "a CSV manifest with rows (of part `train`, where it has that column)"
    else:
        lines = (line.strip() for line in source.read_text(encoding="utf-8").splitlines())
        found = [source.parent / line for line in lines if line and not line.startswith("#")]
        accepted = "a text list with one path per line"
    if not found:
        raise ValueError(f"photos: found no photo in {source}; give {accepted}")
    return sorted(found)


def read_photo(path: Path) -> Tensor:
    """Decodes a photo upright into (3, H, W) uint8."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


class CleanPhotos(Sequence[Tensor]):
    """Decoded photos, (3, H, W) uint8, kept in memory.

    Files that cannot be read are named in a warning and left out.

    Raises:
        ValueError: The source names no photo, or none can be read.
    """

    def __init__(self, source: Path | str) -> None:
        paths = list_photos(Path(source))
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(self._read_or_name, paths))
        kept = [
            (path, photo) for path, photo in zip(paths, decoded, strict=True) if photo is not None
        ]
        if skipped := len(paths) - len(kept):
            log.warning("photos: left out %d unreadable of %d files", skipped, len(paths))
        if not kept:
            raise ValueError(f"photos: none of the {len(paths)} files of {source} can be read")
        self.paths = [path for path, _ in kept]
        self._photos = [photo for _, photo in kept]

    @staticmethod
    def _read_or_name(path: Path) -> Tensor | None:
        try:
            return read_photo(path)
        except _UNREADABLE as error:
            log.warning("photos: left out %s: %s", path, error)
            return None

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Tensor:
        return self._photos[index]

    def subset(self, indices: Sequence[int]) -> "CleanPhotos":
        """The photos at `indices`, sharing their memory."""
        chosen = object.__new__(CleanPhotos)
        chosen.paths = [self.paths[index] for index in indices]
        chosen._photos = [self._photos[index] for index in indices]
        return chosen


def clip_view(image: Tensor, size: int) -> Tensor:
    """What the host shows to the vision encoder, before normalisation.

    Args:
        image: (B, 3, H, W) in [0, 1].
        size: side of the encoder's input, pixels.

    Returns:
        (B, 3, size, size) in [0, 1], squashed, in steps of 1/255.

    Source: `clip_preprocess` of ComfyUI with `crop=False`.
    """
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True)
    return to_8_bit(image)


def to_8_bit(image: Tensor) -> Tensor:
    """Rounds [0, 1] pixels to steps of 1/255, as saving and loading a file does."""
    return (image * 255).clamp(0, 255).round() / 255


class RestorationSamples(Dataset[dict[str, Tensor]]):
    """Endless aligned training samples: a part of a photo, degraded by one kind, and a crop of it.

    Sample `index` is a function of (seed, index) alone, for any index from 0; each run of
    `len(self)` indices visits every photo once.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        *,
        crop: int,
        clip_size: int,
        seed: int,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        """Makes samples of `photos`.

        Args:
            photos: (3, H, W) uint8 each.
            crop: Side of `gt` and `lq`, pixels.
            clip_size: Side of `clip_view`, pixels.
            seed: Another seed gives other samples.
            kinds: Degradations, drawn uniformly; `label` is the place in this list.
        """
        self.photos, self.crop, self.clip_size = photos, crop, clip_size
        self.seed, self.kinds = seed, tuple(kinds)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample.

        Returns:
            `gt`, `lq`: (3, crop, crop) float32 in [0, 1], aligned, in steps of 1/255;
            `clip_view`: (3, clip_size, clip_size), the whole degraded part squashed;
            `native_view`: likewise, a window of it that is not resized where it is large enough;
            `label`: int64; `severity`: float32 in [0, 1].
        """
        epoch, place = divmod(index, len(self.photos))
        order = torch.randperm(len(self.photos), generator=seeded(self.seed, 0, epoch))
        generator = seeded(self.seed, 1, index)
        part = self._part(self.photos[int(order[place])], generator)
        label = int(torch.randint(len(self.kinds), (), generator=generator))
        severity = sample_severity(generator)
        degraded = to_8_bit(degrade(self.kinds[label], part, severity, generator))
        top, left = (
            int(torch.randint(side - self.crop + 1, (), generator=generator))
            for side in part.shape[-2:]
        )
        window = (0, slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
        top, left = (
            int(torch.randint(max(1, side - self.clip_size + 1), (), generator=generator))
            for side in part.shape[-2:]
        )
        near = degraded[..., top : top + self.clip_size, left : left + self.clip_size]
        return {
            "gt": part[window].clone(),
            "lq": degraded[window].clone(),
            "clip_view": clip_view(degraded, self.clip_size)[0],
            "native_view": clip_view(near, self.clip_size)[0],
            "label": torch.tensor(label),
            "severity": torch.tensor(severity),
        }

    def _part(self, photo: Tensor, generator: torch.Generator) -> Tensor:
        """A random part of the photo, mirrored or not, mildly reduced; (1, 3, H, W) in [0, 1].

        Both sides are at least `crop`: a small photo is enlarged just enough. The long side is at
        most 512 or two crops where that allows it, to bound the cost of a sample.
        """
        whole = torch.rand((), generator=generator) < 0.2
        share = torch.rand(2, generator=generator) * 0.4 + 0.6
        sides = [
            side if whole else round(side * float(part))
            for side, part in zip(photo.shape[1:], share, strict=True)
        ]
        top, left = (
            int(torch.randint(full - side + 1, (), generator=generator))
            for full, side in zip(photo.shape[1:], sides, strict=True)
        )
        part = photo[None, :, top : top + sides[0], left : left + sides[1]].float() / 255
        if torch.rand((), generator=generator) < 0.5:
            part = part.flip(-1)
        reduce = torch.rand(2, generator=generator)
        factor = 1 - 0.4 * float(reduce[1]) if reduce[0] < 0.5 else 1.0
        factor = min(factor, max(512, 2 * self.crop) / max(sides))
        factor = max(factor, self.crop / min(sides))
        if factor == 1.0:
            return part
        size = [max(self.crop, round(side * factor)) for side in sides]
        return to_8_bit(F.interpolate(part, size=size, mode="bicubic", antialias=True))


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by a row of whole numbers."""
    # torch keeps 32 bits of a CPU seed, so the numbers are hashed, not packed.
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


class StepSampler(Sampler[list[int]]):
    """Endless batches of indices; the batch of a step depends on (seed, step, rank) alone.

    Starting at step N therefore continues exactly where a run stopped, and W ranks with a batch of
    B see what one rank with a batch of W * B sees.
    """

    def __init__(
        self,
        seed: int,
        *,
        start_step: int = 0,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size must be positive and rank below world_size; found batch_size "
                f"{batch_size}, rank {rank}, world_size {world_size}"
            )
        self.start_step, self.batch_size = start_step, batch_size
        self.rank, self.world_size = rank, world_size
        # Every seed walks through its own stretch of the endless row of samples.
        self.offset = int(torch.randint(2**40, (), generator=seeded(seed)))

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.start_step):
            first = self.offset + (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
