"""Test sets: photos degraded with fixed seeds, and real pairs."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import diff_restorer.degradations
from diff_restorer.degradations import (
    KINDS,
    add_gaussian_noise,
    degrade,
    jpeg_codec,
)

from ..data import seeded
from ..layouts import find_pairs, kind_of
from ..photos import UNREADABLE, PhotoFile, ShardMember, is_photo, list_photos, read_photo
from .pictures import digest, file_digest, read_note, save_picture, to_image, to_picture

log = logging.getLogger(__name__)

NOISE_SIGMA = 50
"""Standard deviation of the noise set, of 255 levels."""
JPEG_QUALITY = 10
"""Quality of the JPEG set (Pillow, chroma 4:2:0)."""
SEVERITIES = (0.25, 0.75)
"""The other kinds draw their severity uniformly from here."""
REAL = "pairs/"
"""What the names of sets of real pairs begin with."""


@dataclass(frozen=True)
class Case:
    """One photo of one test set."""

    set: str
    """A kind, or `pairs/` and the name of a folder."""
    name: str
    """Of the photo, without its suffix."""
    kind: str | None
    """What the photo suffers from; None where a folder of pairs has a name of its own."""
    gt: Path
    """The clean photo."""
    lq: Path
    """The degraded photo, of the same size."""
    severity: float | None = None
    """What `degrade` was told; None where that does not apply."""

    @property
    def id(self) -> str:
        """Unique name, fit for a relative path."""
        return f"{self.set}/{self.name}"


@dataclass
class Cases:
    """Test cases, and the files that could not become one: name -> reason."""

    cases: list[Case]
    failed: dict[str, str]


def read_upright(file: PhotoFile) -> Tensor:
    """A photo file as (1, 3, H, W) float32 in [0, 1], turned upright."""
    return read_photo(file)[None].float() / 255


def make_lq(kind: str, image: Tensor, name: str, seed: int) -> tuple[Tensor, float | None]:
    """Degrades a photo for the test set of `kind`.

    Args:
        kind: One of `KINDS`.
        image: (1, 3, H, W) in [0, 1].
        name: Of the photo; result and severity are a function of (seed, kind, name, image).
        seed: Seed of the test sets.

    Returns:
        The degraded photo and its severity, None for noise, JPEG and clean, which have no choice.
    """
    generator = seeded(seed, zlib.crc32(kind.encode()), zlib.crc32(name.encode()))
    if kind == "noise":
        return add_gaussian_noise(image, torch.tensor([NOISE_SIGMA / 255]), generator), None
    if kind == "jpeg":
        return jpeg_codec(image, torch.tensor([float(JPEG_QUALITY)])), None
    if kind == "clean":
        return image, None
    low, high = SEVERITIES
    severity = low + (high - low) * float(torch.rand((), generator=generator))
    return degrade(kind, image, severity, generator), severity


def synthetic(clean: Path, cache: Path, limit: int, seed: int) -> Cases:
    """One set per kind from clean photos, kept as PNG files in `cache`.

    Args:
        clean: A folder, text list or CSV manifest of clean photos.
        cache: Folder of the test sets; what is there and still right is used again.
        limit: Take the first photos only; 0 takes all.
        seed: Seed of the test sets.

    Raises:
        ValueError: There is no photo, or two have one name.
    """
    paths = list_photos(clean)[: limit or None]
    names = [Path(path.name).stem for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data.clean: {clean} has several photos named {', '.join(twice[:3])}")
    made = Cases([], {})
    code = file_digest(*sorted(Path(diff_restorer.degradations.__file__).parent.glob("*.py")))
    work = zip(paths, names, strict=True)
    for path, name in tqdm(work, desc="test sets", unit="photo", total=len(paths), disable=None):
        try:
            image = read_upright(path)
        except UNREADABLE as error:
            made.failed[str(path)] = f"cannot be read: {error}"
            continue
        gt = cache / "gt" / f"{name}.png"
        key = digest(to_picture(image).tobytes(), str(image.shape))
        if read_note(gt).get("key") != key:
            save_picture(gt, to_picture(image), {"key": key})
        for kind in KINDS:
            lq = cache / kind / f"{name}.png"
            wanted = digest(key, kind, str(seed), code)
            note = read_note(lq)
            if note.get("key") != wanted:
                degraded, severity = make_lq(kind, image, name, seed)
                note = {"key": wanted, "severity": severity}
                save_picture(lq, to_picture(degraded), note)
            made.cases.append(Case(kind, name, kind, gt, lq, note["severity"]))
    return made


Pictures = tuple[PhotoFile, PhotoFile]
"""LQ and GT."""


def real(pairs: Path, cache: Path, limit: int) -> Cases:
    """Sets of pairs: `<pairs>/<set>/{lq,gt}/<same name>`, or one set in a published layout.

    A folder without such sets is read as training's `--data.pairs` are (GoPro, LOL, ...), as one
    set per kind. An LQ that is smaller than its GT by a whole factor (super-resolution) is enlarged
    by bicubic interpolation. Both are kept as PNG in `cache`, upright.

    Args:
        pairs: Folder of the sets, or of the published one.
        cache: Folder for the pictures that are used.
        limit: Take the first pairs of each set only; 0 takes all.

    Raises:
        ValueError: There is no set.
    """
    made = Cases([], {})
    sets = _named_sets(pairs, made.failed) or _published_sets(pairs)
    for (name, kind), files in sets.items():
        for stem, sources in list(files.items())[: limit or None]:
            try:
                both = _as_pair(*map(read_upright, sources))
            except UNREADABLE as error:
                made.failed[str(sources[0])] = str(error)
                continue
            targets = [cache / REAL / name / role / f"{stem}.png" for role in ("lq", "gt")]
            for image, target in zip(both, targets, strict=True):
                key = digest(to_picture(image).tobytes(), str(image.shape))
                if read_note(target).get("key") != key:
                    save_picture(target, to_picture(image), {"key": key})
            made.cases.append(Case(REAL + name, stem, kind, gt=targets[1], lq=targets[0]))
    return made


def _named_sets(
    pairs: Path, failed: dict[str, str]
) -> dict[tuple[str, str | None], dict[str, Pictures]]:
    """(name of the set, kind) -> name of the photo -> its files, of `<set>/{lq,gt}`."""
    found: dict[tuple[str, str | None], dict[str, Pictures]] = {}
    for folder in sorted(path.parent for path in pairs.glob("*/lq")):
        partners = {path.stem: path for path in (folder / "gt").glob("*") if is_photo(path.name)}
        files = found.setdefault((folder.name, kind_of(folder.name)), {})
        for path in sorted(p for p in (folder / "lq").glob("*") if is_photo(p.name)):
            if path.stem in partners:
                files[path.stem] = path, partners[path.stem]
            else:
                failed[str(path)] = f"{folder / 'gt'} has no photo of this name"
    return found


def _published_sets(pairs: Path) -> dict[tuple[str, str | None], dict[str, Pictures]]:
    """Likewise, of one published layout; photos of one name get the folders above it in front."""
    found: dict[tuple[str, str | None], dict[str, Pictures]] = {}
    every = find_pairs(pairs)
    names = Counter(Path(pair.lq.name).stem for pair in every)
    for pair in every:
        path = Path(pair.lq.name) if isinstance(pair.lq, ShardMember) else pair.lq
        inside = path.relative_to(pairs) if path.is_relative_to(pairs) else path
        parts = inside.with_suffix("").parts if names[path.stem] > 1 else (path.stem,)
        files = found.setdefault((f"{pairs.resolve().name}_{pair.kind}", pair.kind), {})
        files["_".join(parts)] = pair.lq, pair.gt
    return found


def _as_pair(lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """Brings LQ to the size of GT.

    Raises:
        ValueError: The sizes do not belong together, or both are the same picture.
    """
    if lq.shape != gt.shape:
        factors = {g / q for g, q in zip(gt.shape[-2:], lq.shape[-2:], strict=True)}
        if len(factors) != 1 or not (factor := factors.pop()).is_integer() or factor < 2:
            found = " and ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in (lq, gt))
            raise ValueError(f"LQ and GT do not match: {found} px")
        size = (gt.shape[-1], gt.shape[-2])
        lq = to_image(to_picture(lq).resize(size, Image.Resampling.BICUBIC))
    if torch.equal(lq, gt):
        raise ValueError("LQ and GT are the same picture")
    return lq, gt
