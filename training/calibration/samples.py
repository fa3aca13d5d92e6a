"""Near-clean looks and degraded photos that abstention is calibrated on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.degradations import add_gaussian_noise, degrade_chain, jpeg_codec

from ..data import seeded

LOOKS = ("clean", "grey", "flatter", "darker", "softened", "sigma 5", "q 80")
"""What people's photos are like that hardly need restoring."""
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Sample:
    """One photo to restore, and what it should become."""

    name: str
    """A look, or its kinds joined by ` + `."""
    kinds: tuple[str, ...]
    """What it suffers from; none of near-clean looks."""
    lq: Tensor
    """(1, 3, H, W) in [0, 1], in steps of 1/255 as a file."""
    gt: Tensor
    """Likewise."""


def near_clean(photo: Tensor, generator: torch.Generator) -> Iterator[Sample]:
    """Every look of a clean photo (1, 3, H, W) in [0, 1].

    Tone is a matter of taste: what is grey, flatter or darker should stay so.
    """
    grey = (photo * photo.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    toned = {
        "clean": photo,
        "grey": grey.expand_as(photo),
        "flatter": photo.mean() + 0.8 * (photo - photo.mean()),
        "darker": 0.8 * photo,
    }
    damaged = {
        "softened": _softened(photo),
        "sigma 5": add_gaussian_noise(photo, torch.tensor([5 / 255]), generator),
        "q 80": jpeg_codec(photo, torch.tensor([80.0])),
    }
    for name, image in toned.items():
        yield Sample(name, (), _as_file(image), _as_file(image))
    for name, image in damaged.items():
        yield Sample(name, (), _as_file(image), photo)


def degraded(photo: Tensor, kinds: Sequence[str], place: int, seed: int) -> Iterator[Sample]:
    """Every kind by itself, and as many mixes of two, of a clean photo (1, 3, H, W) in [0, 1].

    Severities are spread evenly over [0, 1] from photo to photo, mixes over all pairs.

    Args:
        place: Number of the photo.
        seed: Seed of severities and degradations.
    """
    pairs = list(combinations(kinds, 2))
    mixes = [pairs[(place * len(kinds) + index) * 11 % len(pairs)] for index in range(len(kinds))]
    for index, some in enumerate([*((kind,) for kind in kinds), *mixes[: len(kinds) // 2]]):
        generator = seeded(seed, place, zlib.crc32(" ".join(some).encode()))
        severity = (0.618034 * (place * 12 + index) + 0.1 * seed) % 1.0  # golden ratio: no gaps
        yield Sample(
            " + ".join(some), some, _as_file(degrade_chain(some, photo, severity, generator)), photo
        )


def _softened(photo: Tensor) -> Tensor:
    """As a lens that is a little out of focus: Gaussian, sigma 0.7 px."""
    places = torch.arange(-3, 4)
    weight = torch.exp(-(places**2) / (2 * 0.7**2))
    kernel = (weight / weight.sum()).expand(3, 1, 1, -1)
    rows = F.conv2d(F.pad(photo, (3, 3, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(F.pad(rows, (0, 0, 3, 3), mode="reflect"), kernel.mT, groups=3)


def _as_file(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255
