"""Parts of `training.calibrate`: near-clean and degraded photos, and thresholds of abstention from
photos that were restored with and without their P_D."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from diff_restorer.abstention import CLEAN, Abstention
from diff_restorer.degradations import degrade_chain

from .data import seeded, to_8_bit
from .evaluation.suites import LOOKS

CEILING = 40.0
"""dB: what is nearer to the clean photo than this is as good as the photo."""
GRID = (0.5, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 1.0)
"""Candidates for thresholds; finer where softmax is sure, as its mistakes lie there, too. None is
below a half: what is rather not there is not acted on."""
SWEEPS = 4
CARE = 0.1
"""dB of utility that the highest thresholds of a kind are worth over the lowest: a few hundred
photos do not show every photo that is taken for something it is not."""


@dataclass(frozen=True)
class Row:
    """One photo, restored twice."""

    photo: str
    name: str
    """See `Sample`."""
    kinds: tuple[str, ...]
    """What it suffers from; none if it is nearly clean."""
    probabilities: tuple[float, ...]
    """(N,), of the classifier."""
    lq: float
    """PSNR of the photo to what it should become, in dB; likewise:"""
    read: float
    """of the restoration by its P_D as read,"""
    clean: float
    """and by the prototype of clean photos."""


@dataclass(frozen=True)
class Gains:
    """All rows as tensors, (R,) each, but for the probabilities."""

    probabilities: Tensor
    """(R, N)."""
    read: Tensor
    """dB over the degraded photo, both clipped at `CEILING`; by P_D as read."""
    clean: Tensor
    """Likewise, by the prototype of clean photos."""
    near_clean: Tensor
    """Whether the photo hardly needed restoring."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Gains:
        psnr = torch.tensor([(row.lq, row.read, row.clean) for row in rows]).clamp(max=CEILING)
        lq, read, clean = psnr.unbind(dim=1)
        near_clean = torch.tensor([not row.kinds for row in rows])
        probabilities = torch.tensor([row.probabilities for row in rows])
        return cls(probabilities, read - lq, clean - lq, near_clean)

    def under(self, trust: Tensor) -> Tensor:
        """dB over the degraded photo at `trust` (R,), taken as linear between the two."""
        return torch.lerp(self.clean, self.read, trust)

    def utility(self, trust: Tensor, loss: float) -> float:
        """Mean gain, a lost dB counting `loss` times; both sorts of photos weigh alike."""
        gain = self.under(trust)
        worth = torch.where(gain < 0, loss * gain, gain)
        halves = (worth[self.near_clean], worth[~self.near_clean])
        return float(sum(half.mean() for half in halves))


def fit(gains: Gains, start: Abstention, loss: float) -> Abstention:
    """The thresholds of greatest utility from `start` on, kind after kind, until none improves it;
    of those that are alike the most careful. So many gained dB as `loss` make up for a lost one."""

    def worth(abstention: Abstention) -> float:
        care = sum(sum(bounds) / 2 for bounds in abstention.thresholds.values())
        return gains.utility(abstention.trust(gains.probabilities), loss) + CARE * care

    best, fitted = worth(start), start
    for _ in range(SWEEPS):
        before = best
        for kind in start.thresholds:
            for changed in _changes(fitted, kind):
                if (value := worth(changed)) > best + 1e-4:
                    best, fitted = value, changed
        if best == before:
            break
    return fitted


def _changes(abstention: Abstention, kind: str) -> Iterator[Abstention]:
    for bounds in combinations(GRID, 2):
        yield replace(abstention, thresholds={**abstention.thresholds, kind: bounds})


def start_for(types: tuple[str, ...], exclusive: bool) -> Abstention:
    """Thresholds that `fit` begins with."""
    damages = [name for name in types if name != CLEAN]
    return Abstention(
        types=types, exclusive=exclusive, thresholds=dict.fromkeys(damages, (0.6, 0.9))
    )


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

    Severities are spread evenly over [0, 1] from photo to photo, of which it is number `place`, and
    mixes over all pairs.
    """
    pairs = list(combinations(kinds, 2))
    mixes = [pairs[(place * len(kinds) + index) * 11 % len(pairs)] for index in range(len(kinds))]
    for index, some in enumerate([*((kind,) for kind in kinds), *mixes[: len(kinds) // 2]]):
        generator = seeded(seed, place, zlib.crc32(" ".join(some).encode()))
        severity = (0.618034 * (place * 12 + index) + 0.1 * seed) % 1.0  # golden ratio: no gaps
        image = to_8_bit(degrade_chain(some, photo, severity, generator))
        yield Sample(" + ".join(some), some, image, photo)
