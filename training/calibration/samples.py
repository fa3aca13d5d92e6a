"""Near-clean looks and degraded photos that abstention is calibrated on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from diff_restorer.degradations import degrade_chain

from ..data import seeded, to_8_bit
from ..evaluation.suites import LOOKS


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
    """Every one of `suites.LOOKS` of a clean photo (1, 3, H, W) in [0, 1]."""
    for name, (look, is_reference) in LOOKS.items():
        image = to_8_bit(look(photo, generator))
        yield Sample(name, (), image, image if is_reference else photo)


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
        image = to_8_bit(degrade_chain(some, photo, severity, generator))
        yield Sample(" + ".join(some), some, image, photo)
