"""Paired photos, degraded and clean, of any number of sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diff_restorer.degradations import ALL_KINDS, KINDS

from .layouts import LAYOUTS, Pair, find_pairs
from .photos import CleanPhotos, PhotoFile, PhotoStore, photo_size

log = logging.getLogger(__name__)


def parse_source(given: Path | str) -> tuple[Path, str | None, str | None]:
    """Splits `PATH`, `KIND=PATH` or `LAYOUT=PATH` into path, layout and kind.

    Raises:
        ValueError: What stands before `=` is neither a kind nor a layout.
    """
    name, equals, path = str(given).partition("=")
    if not equals or Path(given).exists():
        return Path(given), None, None
    if name in ALL_KINDS:
        return Path(path), None, name
    if name in LAYOUTS:
        return Path(path), name, None
    raise ValueError(
        f"pairs: {given}: {name!r} is neither a kind ({', '.join(ALL_KINDS)}) nor a layout "
        f"({', '.join(LAYOUTS)})"
    )


class PairedPhotos(Sequence[tuple[Tensor, Tensor]]):
    """Pairs (degraded, clean), each (3, H, W) uint8, of any number of sets.

    Decoded at once as far as the store has room, else when drawn. A pair is checked when it is
    read: both halves decode, have one size and differ; others are named in a warning and left out.

    Raises:
        ValueError: A source has no pair of the wanted kinds, or none of its pairs is usable.
    """

    def __init__(
        self,
        sources: Sequence[Path | str],
        store: PhotoStore | None = None,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        """Opens sets.

        Args:
            sources: `PATH` each (a folder or a tar shard, see `find_pairs`), or `KIND=PATH` or
                `LAYOUT=PATH` where the path alone does not say it.
            store: Where decoded photos are kept.
            kinds: Pairs of other kinds are left out.
        """
        self._store = store or PhotoStore()
        self.pairs: list[Pair] = []
        for given in sources:
            path, layout, kind = parse_source(given)
            listed = find_pairs(path, layout, kind)
            wanted = [pair for pair in listed if pair.kind in kinds]
            if len(wanted) < len(listed):
                others = ", ".join(sorted({pair.kind for pair in listed} - set(kinds)))
                reason = (
                    f"pairs: {len(listed) - len(wanted)} pairs of {path} are of the kind {others}, "
                    f"which is not trained ({', '.join(kinds)}); KIND={path} gives them another"
                )
                if not wanted:
                    raise ValueError(reason)
                log.warning("%s; left out", reason)
            self.pairs += self._store.usable("pairs", wanted, self._read, _decoded_bytes)

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        lq, gt = self._store.read(pair.lq), self._store.read(pair.gt)
        _compare_sizes((lq.shape[2], lq.shape[1]), (gt.shape[2], gt.shape[1]))
        if torch.equal(lq, gt):
            raise ValueError("both halves have the same content")
        return lq, gt

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._store.draw("pairs", self.pairs, index, self._read)

    def _subset(self, pairs: Sequence[Pair]) -> PairedPhotos:
        chosen = object.__new__(PairedPhotos)
        chosen.pairs, chosen._store = list(pairs), self._store
        return chosen

    def by_kind(self) -> dict[str, PairedPhotos]:
        """The pairs of each kind, sharing their memory."""
        kinds = dict.fromkeys(pair.kind for pair in self.pairs)
        return {kind: self._subset([p for p in self.pairs if p.kind == kind]) for kind in kinds}

    def split(self, every: int) -> tuple[PairedPhotos, PairedPhotos]:
        """The pairs for training and those of every n-th clean photo of each kind.

        All pairs of a clean photo go to one side. A kind with one clean photo is trained on.
        """
        held_out: set[tuple[str, PhotoFile]] = set()
        for kind, pairs in self.by_kind().items():
            clean = list(dict.fromkeys(pair.gt for pair in pairs.pairs))
            if len(clean) > 1:
                held_out |= {(kind, gt) for gt in clean[::every]}
        kept = [pair for pair in self.pairs if (pair.kind, pair.gt) not in held_out]
        return self._subset(kept), self._subset(
            [pair for pair in self.pairs if (pair.kind, pair.gt) in held_out]
        )

    def clean(self) -> CleanPhotos:
        """The clean halves, each once."""
        return CleanPhotos.of(list(dict.fromkeys(pair.gt for pair in self.pairs)), self._store)


def _decoded_bytes(pair: Pair) -> int:
    size = photo_size(pair.lq)
    _compare_sizes(size, photo_size(pair.gt))
    return 2 * 3 * size[0] * size[1]


def _compare_sizes(lq: tuple[int, int], gt: tuple[int, int]) -> None:
    if lq != gt:
        raise ValueError(
            f"the degraded photo has {lq[0]} x {lq[1]} pixels and the clean one {gt[0]} x {gt[1]}"
        )
