"""Suites beyond the project's own test sets: mixes of degradations, and photos to leave alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diff_restorer.degradations import add_gaussian_noise, degrade_chain, jpeg_codec

from ..data import seeded
from . import independent
from .pictures import digest, file_digest
from .real_pairs import from_pairs, paired
from .testsets import (
    SEVERITIES,
    Cases,
    CleanPhoto,
    Recipe,
    clean_photos,
    degradations_digest,
    from_recipes,
    untouched,
)

MIXES: tuple[tuple[str, ...], ...] = (
    ("low_light", "noise"),
    ("low_light", "blur", "jpeg"),
    ("haze", "noise"),
    ("blur", "jpeg"),
    ("haze", "jpeg"),
    ("rain", "haze"),
    ("blur", "noise", "jpeg"),
    ("low_res", "jpeg"),
)
"""Kinds that life puts into one photo."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of BT.601."""


def make_mix(kinds: tuple[str, ...], image: Tensor, name: str, seed: int) -> tuple[Tensor, None]:
    """Several degradations at once, each at a severity of its own, drawn as in the own sets."""
    generator = seeded(seed, zlib.crc32("+".join(kinds).encode()), zlib.crc32(name.encode()))
    low, high = SEVERITIES
    severities = low + (high - low) * torch.rand(1, len(kinds), generator=generator)
    return degrade_chain(kinds, image, severities, generator), None


# Photos to leave alone


def flatter(image: Tensor, _: torch.Generator) -> Tensor:
    """A fifth less contrast around the photo's mean."""
    mean = image.mean()
    return mean + 0.8 * (image - mean)


def grey(image: Tensor, _: torch.Generator) -> Tensor:
    """The luma in all three channels."""
    luma = (image * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return luma.expand_as(image)


LOOKS: Mapping[str, tuple[Callable[[Tensor, torch.Generator], Tensor], bool]] = {
    "clean": (lambda image, _: image, True),
    "flat": (flatter, True),
    "dark": (lambda image, _: 0.8 * image, True),
    "grey": (grey, True),
    "sigma 5": (lambda x, draw: add_gaussian_noise(x, torch.tensor([5 / 255]), draw), False),
    "q 80": (lambda image, _: jpeg_codec(image, torch.tensor([80.0])), False),
    "soft": (lambda image, _: gaussian_blur(image, [5, 5], [0.7, 0.7]), False),
}
"""Near-clean photos: how (1, 3, H, W) in [0, 1] is made into one, and whether the result is itself
what must come back (a matter of taste) or the photo that it was made from (a slight flaw).

Clean; a fifth less contrast; a fifth darker; black and white; noise of sigma 5 of 255; JPEG of
quality 80 (4:2:0); a Gaussian of sigma 0.7 px.
"""
MILD_PAIRS = "harm/real"
"""Set of real pairs whose photos are near-clean."""


def make_look(look: str, image: Tensor, name: str, seed: int) -> tuple[Tensor, None]:
    """A photo of one of `LOOKS`."""
    generator = seeded(seed, zlib.crc32(look.encode()), zlib.crc32(name.encode()))
    return LOOKS[look][0](image, generator), None


def harm(folder: Path, cache: Path, limit: int, seed: int) -> Cases:
    """Near-clean photos: every look of the clean photos of a folder that guided no decision, or the
    real pairs that hardly need restoring, where `lq` and `gt` are inside.

    Of the first `limit` photos (0: all). Raises ValueError where there is none, or two have one
    name.
    """
    place = folder.resolve().name
    if (folder / "lq").is_dir():
        made = Cases()
        files = list(paired(folder, made.failed).items())[: limit or None]
        named = {f"{place}_{stem}": pair for stem, pair in files}
        made.add(from_pairs(MILD_PAIRS, None, named, cache))
        return made
    code = digest(file_digest(Path(__file__)), degradations_digest())
    recipes = [
        Recipe(f"harm/{look}", None, partial(make_look, look), code, is_reference)
        for look, (_, is_reference) in LOOKS.items()
    ]
    photos = [
        CleanPhoto(f"{place}_{photo.name}", photo.file, photo.decided_on)
        for photo in untouched(clean_photos(folder), limit)
    ]
    return from_recipes(photos, cache, recipes, seed)


def mixes(clean: Path, cache: Path, limit: int, seed: int) -> Cases:
    """Every mix of the first photos that guided no decision; arguments as in `harm`."""
    code = digest(file_digest(Path(__file__)), degradations_digest())
    recipes = [
        Recipe(f"mixes/{'+'.join(kinds)}", None, partial(make_mix, kinds), code) for kinds in MIXES
    ]
    return from_recipes(untouched(clean_photos(clean), limit), cache, recipes, seed)


def by_others(clean: Path, cache: Path, limit: int, seed: int) -> Cases:
    """Degradations that others wrote, of such photos; arguments as in `harm`."""
    photos = untouched(clean_photos(clean), limit)
    return from_recipes(photos, cache, independent.recipes(), seed)
