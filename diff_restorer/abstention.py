"""Abstention: where damage is not evident, P_D is drawn towards that of clean photos.

A kind is believed by its odds against `clean`, or by its probability alone where kinds do not
exclude each other, from not at all at a lower threshold to fully at an upper one. Of the belief in
the most believed kind, or that the photo is anything but clean, remains what is not doubt: the
share of the damage that is put down to changes of tone whose odds against `clean` are too small. So
a photo that is surely damaged is restored, even where it is not clear by which of two kinds, unless
the tone of all of it might change for nothing.

Ours: the paper acts on whatever P_D it reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .weights import parse_json

CLEAN = "clean"
TONE = ("low_light", "haze")
"""Kinds whose removal changes the tone of a whole photo: the most harmful ones to imagine."""
HARDLY_CLEAN = (0.015, 0.025)
"""Probability of `clean` by itself up to which a photo is surely damaged, by whatever kinds, and
from which on that alone does not count. Of 154 near-clean photos the lowest has 0.027."""
AGREEMENT = (1 / 4, 1 / 3)
"""Share of a large photo's tiles that must show a change of tone before any of them may be
restored from it, and from which on each may."""


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """How sure a classifier must be, as fitted by `training.calibrate`."""

    types: tuple[str, ...]
    """Names of the N types, in the order of the probabilities."""
    exclusive: bool
    """Whether the types exclude each other (softmax), so that probabilities add up to 1."""
    thresholds: Mapping[str, tuple[float, float]]
    """Per type but `clean`: evidence in [0, 1] up to which it counts nothing, and from which on
    fully."""
    tone: tuple[str, ...] = TONE
    """Types that all of a photo must share, see `agreement`."""

    def __post_init__(self) -> None:
        if CLEAN not in self.types:
            raise ValueError(
                f"abstention: the types are {', '.join(self.types)}, without {CLEAN!r} to turn to"
            )
        if set(self.thresholds) != set(self._damages):
            raise ValueError(
                f"abstention: thresholds for {', '.join(self.thresholds)}, expected one each for "
                f"{', '.join(self._damages)}"
            )
        for name in self.tone:
            if name not in self._damages and name not in TONE:
                raise ValueError(
                    f"abstention: tone {name!r}, expected some of {', '.join(self._damages)}"
                )
        for name, (low, high) in self.thresholds.items():
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"abstention: thresholds {low} and {high} for {name!r}, expected "
                    "0 <= low < high <= 1"
                )

    @property
    def _damages(self) -> tuple[str, ...]:
        return tuple(name for name in self.types if name != CLEAN)

    def _are(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """Which types are among `names`, (N,)."""
        return torch.tensor([name in names for name in self.types], device=like.device)

    def to_json(self) -> str:
        """The entry of a file's metadata."""
        entry = {"thresholds": {k: list(v) for k, v in self.thresholds.items()}, "tone": self.tone}
        return json.dumps(entry)

    @classmethod
    def from_json(cls, text: str, types: tuple[str, ...], exclusive: bool) -> Abstention:
        """Inverse of `to_json` for the types of the same file.

        Raises:
            ValueError: It is not JSON, or does not suit the types.
        """
        try:
            entry: Any = parse_json(text)
            thresholds = {
                str(name): (float(low), float(high))
                for name, (low, high) in entry["thresholds"].items()
            }
            tone = tuple(str(name) for name in entry["tone"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"abstention: {text[:80]!r} cannot be read ({error!r})") from error
        return cls(types=types, exclusive=exclusive, thresholds=thresholds, tone=tone)

    def evidence(self, probabilities: Tensor) -> Tensor:
        """(..., N) in [0, 1]: each type against `clean` alone, as if there were no others.

        Softmax splits its mass where two kinds meet; their odds against `clean` it keeps.

        Args:
            probabilities: (..., N) in [0, 1].
        """
        if self.exclusive:
            return self._odds(probabilities)
        return probabilities.float()  # half formats cannot tell thresholds near 1 apart

    def _odds(self, probabilities: Tensor) -> Tensor:
        probabilities = probabilities.float()
        clean = probabilities[..., self.types.index(CLEAN), None]
        return probabilities / (probabilities + clean).clamp_min(1e-12)

    def belief(self, probabilities: Tensor) -> Tensor:
        """(..., N) in [0, 1]: how far the evidence lies between the thresholds; 0 for `clean`."""
        return self._between(self.evidence(probabilities))

    def _between(self, evidence: Tensor) -> Tensor:
        bounds = [self.thresholds.get(name, (2.0, 3.0)) for name in self.types]
        low, high = torch.tensor(bounds, device=evidence.device).unbind(-1)
        return ((evidence - low) / (high - low)).clamp(0, 1)

    def trust(self, probabilities: Tensor, limit: Tensor | None = None) -> Tensor:
        """(...) in [0, 1]: how far what is read from a photo is to be acted on,

            max belief * (1 - sum over tones of (1 - belief by odds) * share of the damage).

        By odds, since what is surely damaged, such as by rain, is seldom surely hazy besides; it is
        clean photos whose tone must not change.

        Args:
            probabilities: (..., N) in [0, 1].
            limit: Upper bound of the belief in each type, broadcast to it; from `agreement`.
        """
        belief, by_odds = self.belief(probabilities), self._between(self._odds(probabilities))
        if limit is not None:
            belief, by_odds = belief.minimum(limit), by_odds.minimum(limit)
        damage = probabilities.float() * self._are(self._damages, belief)
        share = damage / damage.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        doubt = (share * (1 - by_odds) * self._are(self.tone, belief)).sum(dim=-1)
        most = belief.amax(dim=-1)
        if limit is None and not self.exclusive:  # in a tile alone it might be a change of tone
            most = most.maximum(self._surely_damaged(probabilities))
        return most * (1 - doubt)

    def _surely_damaged(self, probabilities: Tensor) -> Tensor:
        """(...) in [0, 1]: 1 where kinds by themselves leave next to no chance of a clean photo,
        although none may be sure: rain or snow, haze or low light."""
        low, high = HARDLY_CLEAN
        clean = probabilities.float()[..., self.types.index(CLEAN)]
        return ((high - clean) / (high - low)).clamp(0, 1)

    def agreement(self, tiles: Tensor, photo: Tensor) -> Tensor:
        """Upper bound of the belief in each type for the tiles of large photos, (B, N).

        Noise may be in one corner; a change of tone must show in a quarter to a third of the tiles,
        or in the photo as a whole. Else a sandy beach is taken for haze and its tiles turn dark.

        Args:
            tiles: Probabilities of each tile of each photo, (tiles, B, N).
            photo: Those of the whole photos, (B, N).
        """
        first, last = AGREEMENT
        share = self.belief(tiles).mean(dim=0)
        shared = ((share - first) / (last - first)).clamp(0, 1).maximum(self.belief(photo))
        return shared.where(self._are(self.tone, shared), 1.0)


def draw(tokens: Tensor, pooled: Tensor, clean: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
    """P_D as it is where `trust` is 1, and around the prototype of clean photos where it is 0:

        P_D + (1 - trust) * (clean - mean of P_D).

    Args:
        tokens: P_D, (B, T, C).
        pooled: Its mean over tokens, (B, C).
        clean: Prototype of `clean`, (C,).
        trust: (B,) in [0, 1].

    Returns:
        Tokens and pooled; tokens keep their differences, as in Edit Degradation.
    """
    shift = (1 - trust)[:, None] * (clean - pooled)
    return tokens + shift[:, None], pooled + shift
