"""The pack's own socket types and what travels through them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ..diff_restorer import LocalPooled
from ..diff_restorer.abstention import CLEAN, Abstention
from ..diff_restorer.checkpoint import ONE_KIND

if TYPE_CHECKING:
    from .host_models import DiffRestorer

CATEGORY = "restoration/diff-restorer"

RESTORATION = (
    "restore", "restore photo", "photo restoration", "old photo", "enhance", "denoise",
    "remove noise", "deblur", "sharpen", "dehaze", "derain", "remove rain", "remove snow",
    "jpeg artifacts", "low light",
)  # fmt: skip
"""What people type who look for a restoration."""


def found_by(*words: str) -> dict[str, Any]:
    """Arguments of a schema: other words to find a node by, where the host knows such."""
    known = "search_aliases" in io.Schema.__dataclass_fields__  # not in 0.3.75
    return {"search_aliases": list(words)} if known else {}


PRESENT = 0.5
"""Probability from which on a kind is there, where any number of kinds may be."""

ACTS = 0.1
"""Trust from which on a restoration changes what can be seen."""

DiffRestorerSocket = io.Custom("DIFF_RESTORER")
"""Carries a `nodes.host_models.DiffRestorer`."""

DegradationSocket = io.Custom("DEGRADATION")
"""Carries a `Degradation`."""


@dataclass(frozen=True, eq=False)
class Degradation:
    """What the Prompt Processor reads from a batch of photos about their damage."""

    tokens: Tensor
    """P_D, (B, T, C): cross-attention context of the control module."""
    pooled: Tensor
    """Mean of P_D over tokens, (B, C): modulates the aware decoder."""
    probabilities: Tensor
    """(B, N) in [0, 1]; of a classifier of single kinds they add up to 1."""
    types: tuple[str, ...]
    """Names of the N types."""
    prototypes: Tensor
    """(N, C): pooled P_D of each type, averaged over the training photos."""
    restorer: DiffRestorer
    """The file that read it."""
    image: Tensor
    """The photos that it was read from, as they came: with their transparency."""
    local: LocalPooled | None = None
    """Pooled P_D of each place, where Tiled Diffusion has looked at parts of the photos."""
    classification: str = ONE_KIND
    """Whether probabilities exclude each other, see `CheckpointInfo`."""
    abstention: Abstention | None = None
    """By which P_D was drawn towards that of clean photos; None if it is as it was read."""
    scale: float = 1.0
    """What Edit Degradation has made of pooled P_D as it was read: scale * P_D + shift."""
    shift: Tensor | float = 0.0
    """(C,) or 0."""

    def edited(self, scale: float, shift: Tensor) -> Degradation:
        """With scale * P_D + shift, a number and (C,), in place of pooled P_D, of photos and their
        parts; tokens go with it."""
        pooled, local = scale * self.pooled + shift, self.local
        if local is not None:
            local = replace(local, tiles=scale * local.tiles + shift[:, None, None])
        return replace(
            self,
            tokens=self.tokens + (pooled - self.pooled)[:, None],
            pooled=pooled,
            local=local,
            scale=scale * self.scale,
            shift=scale * self.shift + shift,
        )

    def repeated(self, batch: int) -> Degradation:
        """That of one photo for a batch of them."""
        if self.batch == batch:
            return self
        tokens, pooled, probabilities = (
            value.expand(batch, *value.shape[1:])
            for value in (self.tokens, self.pooled, self.probabilities)
        )
        return replace(self, tokens=tokens, pooled=pooled, probabilities=probabilities)

    def get_ram_usage(self) -> int:
        """Bytes that go with it; newer hosts clear their cache by it."""
        own = [self.tokens, self.pooled, self.probabilities, self.prototypes, self.image]
        if self.local is not None:
            own.append(self.local.tiles)
        return self.restorer.get_ram_usage() + sum(tensor.nbytes for tensor in own)

    @property
    def batch(self) -> int:
        """Number of photos, B."""
        return self.tokens.shape[0]

    def as_dicts(self) -> list[dict[str, float]]:
        """Per photo: type -> probability, most probable first."""
        rows = (zip(self.types, row.tolist(), strict=True) for row in self.probabilities)
        return [dict(sorted(row, key=lambda entry: -entry[1])) for row in rows]

    def as_json(self) -> str:
        """`as_dicts`, of one photo its object alone."""
        rows = self.as_dicts()
        return json.dumps(rows[0] if len(rows) == 1 else rows)

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """Per photo: what it suffers from, most probable first; `clean` where it is nothing.

        Of kinds that exclude each other the first one, else all with evidence enough: `PRESENT`,
        or half way between the thresholds of the file.
        """
        rows = [tuple(row) for row in self.as_dicts()]
        if self.classification == ONE_KIND:
            return [row[:1] for row in rows]
        if self.abstention is None:
            there = self.probabilities >= PRESENT
        else:
            there = self.abstention.belief(self.probabilities) >= PRESENT
        kinds: list[tuple[str, ...]] = []
        for row, evident in zip(rows, there.tolist(), strict=True):
            names = dict(zip(self.types, evident, strict=True))
            kinds.append(tuple(name for name in row if names[name] and name != CLEAN) or (CLEAN,))
        return kinds

    @property
    def degraded(self) -> list[bool]:
        """Per photo: whether a restoration takes it for anything but clean."""
        if self.abstention is not None:
            return (self.abstention.trust(self.probabilities) >= ACTS).tolist()
        return [CLEAN not in self.types or names != (CLEAN,) for names in self.kinds]
