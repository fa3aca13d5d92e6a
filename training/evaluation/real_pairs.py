"""Test sets of real pairs: photos with a clean partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..layouts import find_pairs, kind_of
from ..photos import UNREADABLE, PhotoFile, ShardMember, is_photo
from .pictures import to_image, to_picture
from .testsets import REAL, Case, Cases, keep, read_upright

Pictures = tuple[PhotoFile, PhotoFile]
"""LQ and GT."""


def real(pairs: Path, cache: Path, limit: int) -> Cases:
    """Sets of pairs: `<pairs>/<set>/{lq,gt}/<same name>`, or one set in a published layout.

    A folder without such sets is read as training's `--data.pairs` are (GoPro, LOL, ...), as one
    set per kind. An LQ that is smaller than its GT by a whole factor (super-resolution) is enlarged
    by bicubic interpolation. Both are kept as PNG in `cache`, upright, of the first `limit` pairs
    of each set (0: all). Raises ValueError where there is no set.
    """
    made = Cases()
    folders = sorted(path.parent for path in pairs.glob("*/lq"))
    named = {(folder.name, kind_of(folder.name)): paired(folder, made.failed) for folder in folders}
    for (name, kind), files in (named or _published_sets(pairs)).items():
        some = dict(list(files.items())[: limit or None])
        made.add(from_pairs(REAL + name, kind, some, cache))
    return made


def paired(folder: Path, failed: dict[str, str]) -> dict[str, Pictures]:
    """Name of the photo -> its files, of `<folder>/{lq,gt}`; misfits go into `failed`."""
    partners = {path.stem: path for path in (folder / "gt").glob("*") if is_photo(path.name)}
    files: dict[str, Pictures] = {}
    for path in sorted(p for p in (folder / "lq").glob("*") if is_photo(p.name)):
        if path.stem in partners:
            files[path.stem] = path, partners[path.stem]
        else:
            failed[str(path)] = f"{folder / 'gt'} has no photo of this name"
    return files


def from_pairs(name: str, kind: str | None, files: Mapping[str, Pictures], cache: Path) -> Cases:
    """One set of real pairs, kept as PNG in `cache`; name of the photo -> its files."""
    made = Cases()
    for stem, sources in files.items():
        try:
            both = _as_pair(*map(read_upright, sources))
        except UNREADABLE as error:
            made.failed[str(sources[0])] = str(error)
            continue
        lq, gt = (cache / name / role / f"{stem}.png" for role in ("lq", "gt"))
        for image, target in zip(both, (lq, gt), strict=True):
            keep(image, target)
        made.cases.append(Case(name, stem, kind, gt, lq, decided_on=True))
    return made


def _published_sets(pairs: Path) -> dict[tuple[str, str | None], dict[str, Pictures]]:
    """Likewise, of one published layout; photos of one name get the folders above it in front."""
    sets: dict[tuple[str, str | None], dict[str, Pictures]] = {}
    every = find_pairs(pairs)
    names = Counter(Path(pair.lq.name).stem for pair in every)
    for pair in every:
        path = Path(pair.lq.name) if isinstance(pair.lq, ShardMember) else pair.lq
        inside = path.relative_to(pairs) if path.is_relative_to(pairs) else path
        parts = inside.with_suffix("").parts if names[path.stem] > 1 else (path.stem,)
        files = sets.setdefault((f"{pairs.resolve().name}_{pair.kind}", pair.kind), {})
        files["_".join(parts)] = pair.lq, pair.gt
    return sets


def _as_pair(lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """Brings LQ to the size of GT; raises ValueError where the sizes do not belong together, or
    both are the same picture."""
    if lq.shape != gt.shape:
        factors = {g / q for g, q in zip(gt.shape[-2:], lq.shape[-2:], strict=True)}
        if len(factors) != 1 or not (factor := factors.pop()).is_integer() or factor < 2:
            sizes = " and ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in (lq, gt))
            raise ValueError(f"LQ and GT do not match: {sizes} px")
        size = (gt.shape[-1], gt.shape[-2])
        lq = to_image(to_picture(lq).resize(size, Image.Resampling.BICUBIC))
    if torch.equal(lq, gt):
        raise ValueError("LQ and GT are the same picture")
    return lq, gt
