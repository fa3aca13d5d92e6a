"""Photos in, degraded batches out: batch number n is a function of (seed, n) alone.

What is drawn and cut on the host (`RestorationBatches.__getitem__`, in data processes) travels as
uint8; what is computed per pixel (`finish`) runs on the device where the batch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from copy import copy
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from diff_restorer.degradations import (
    KINDS,
    PHYSICAL_ORDER,
    degrade,
    draw_mix,
    random_look,
    sample_severity,
)
from diff_restorer.photo_statistics import photo_statistics

from .interruption import leave_group
from .pairs import PairedPhotos
from .parts import cut_clean, cut_pair
from .photos import fingerprint

Batch = dict[str, Tensor]

PER_CROP = frozenset({"part", "gt", "lq", "latent", "noise", "clean", "hint"})
"""What a batch holds a row of for each crop; of the rest it is one for each part."""
UNKNOWN_SEVERITY = -1.0
"""In `severities`, of the kind of a pair."""
PICTURES = frozenset({"gt", "lq", "clip_view", "native_view", "tone", "statistics"})
"""What a batch may hold beside its labels; a program names those that it reads."""


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
    return (image * 255).clamp_(0, 255).round_().div_(255)


@dataclass(frozen=True)
class Mixing:
    """How often several degradations meet in one photo; by default never."""

    chain: float = 0.0
    """Share of degraded photos with two or more kinds, each at any severity, see `draw_mix`."""
    low_res: float = 0.0
    """Share of degraded photos that also lose resolution; its label is `blur` unless `low_res` is
    one of the types, which views of 192 px tell from blur in two photos of three."""
    second_order: float = 0.0
    """Share of them that also pass Real-ESRGAN's second-order chain, which no label tells."""


class Drawn(NamedTuple):
    """A part of a photo and what is decided of it."""

    clean: Tensor
    """(3, S, S) uint8."""
    lq: Tensor | None
    """The degraded half of a pair, (3, S, S) uint8."""
    levels: dict[str, float]
    """Severity of each kind."""
    look: bool = False
    """Whether it gets another look first."""


class Item(NamedTuple):
    """A batch before it is degraded, as it travels: P parts of side S, B crops."""

    clean: Tensor
    """(P, 3, S, S) uint8."""
    look_rows: Tensor
    """Parts that get another look before they are degraded, (L,) int64."""
    pair_rows: Tensor
    """Parts that come degraded, (Q,) int64."""
    pair_lq: Tensor
    """Their degraded halves, (Q, 3, S, S) uint8."""
    groups: Sequence[tuple[str, Tensor, Tensor]]
    """Each kind, the parts that get it (G,) and its severities there (G,), in physical order. The
    severities stay on the host, where the parameters of degradations are drawn."""
    labels: Batch
    """What the batch says of parts and crops; see `RestorationBatches.finish`."""
    corners: Tensor
    """Top and left of each crop in its part, (2, B) int64."""
    view_corners: Tensor
    """Likewise of the window of each part that P_D is read from, (2, P)."""
    seed: int
    """Of all that is drawn while degrading."""


class Batches(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int:
        """Samples of one epoch."""
        ...

    def __getitem__(self, number: int) -> Any:
        """The item of any batch number from 0, a function of that number alone."""
        ...

    def sized(self, batch_size: int) -> Batches:
        """The same with another number of samples in each batch."""
        ...

    def finish(self, item: Any, device: torch.device) -> Batch:
        """The batch of an item, on that device."""
        ...


class Finished(Dataset[Batch]):
    """Batches that are finished where they are drawn: in the data processes of a CPU."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        return self.batches.finish(self.batches[number], torch.device("cpu"))


def load(
    batches: Batches, numbers: Iterable[int], device: torch.device, workers: int = 0
) -> Iterator[Batch]:
    """The batches of these numbers on a device, in order.

    On a CPU data processes do all the work; beside a GPU they draw and cut, and the rest happens on
    the device.

    Args:
        batches: What draws and finishes them.
        numbers: Of the batches; may be endless.
        device: Where they are needed.
        workers: Data processes; 0 is this process alone.
    """
    here = device.type == "cpu"
    loader: DataLoader[Any] = DataLoader(
        Finished(batches) if here else cast(Dataset[Any], batches),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=not here,
        worker_init_fn=leave_group,
    )
    for item in loader:
        yield item if here else batches.finish(item, device)


class RestorationBatches(Dataset[Item]):
    """Endless batches of aligned crops from parts of photos, each part degraded once.

    Without pairs, each run of `len(photos)` parts visits every photo once.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        *,
        crop: int,
        clip_size: int,
        seed: int,
        batch_size: int = 1,
        part: int = 320,
        crops_per_part: int = 1,
        reads: Set[str] = PICTURES,
        kinds: Sequence[str] = KINDS,
        mixing: Mixing | None = None,
        pairs: PairedPhotos | None = None,
        pair_share: float = 0.5,
        looks: float = 0.0,
        softer: float = 0.0,
        oversample: Sequence[str] = (),
    ) -> None:
        """Makes batches of photos and pairs.

        Args:
            photos: Clean photos, (3, H, W) uint8 each; at least one.
            crop: Side of `gt` and `lq`, pixels.
            clip_size: Side of `clip_view` and `native_view`, pixels.
            seed: Another seed gives other batches.
            batch_size: Crops in a batch.
            part: Side of the parts of photos that are degraded, pixels; at least `crop` is taken.
            crops_per_part: Crops cut from each, at most.
            reads: Which of `PICTURES` are made.
            kinds: Degradations, drawn uniformly unless `oversample` is given; `label` is the place
                in this list.
            mixing: How often clean photos get several degradations at once.
            pairs: Degraded and clean photos.
            pair_share: Share of the parts of a kind that are pairs, where there are pairs of it;
                the others are degraded on the fly.
            looks: Share of clean photos that get a `random_look` before they are degraded.
            softer: Share of clean photos whose pixels are softened, see `cut_clean`; not those for
                `blur` and `low_res`.
            oversample: Kinds to draw more often; each mention adds a kind's own share once more,
                but not to mixes, whose kinds are drawn together.

        Raises:
            ValueError: There is no photo, or `oversample` or `reads` name what there is not.
        """
        if not photos:
            raise ValueError("photos: a sample needs a clean photo, found none")
        if unknown := set(oversample) - set(kinds):
            raise ValueError(f"oversample: unknown {sorted(unknown)}; known are {tuple(kinds)}")
        if unknown := reads - PICTURES:
            raise ValueError(f"reads: unknown {sorted(unknown)}; known are {sorted(PICTURES)}")
        self.photos, self.crop, self.clip_size = photos, crop, clip_size
        self.seed, self.kinds, self.oversample = seed, tuple(kinds), tuple(oversample)
        self.batch_size, self.crops_per_part, self.reads = batch_size, crops_per_part, reads
        self.part = max(part, crop)
        self.mixing = mixing or Mixing()
        self.pairs = pairs.by_kind() if pairs else {}
        self.pair_share, self.looks, self.softer = pair_share, looks, softer

    def __len__(self) -> int:
        """Samples of one epoch: as many as there are photos or pairs, whichever are more."""
        return max(len(self.photos), sum(map(len, self.pairs.values())))

    def sized(self, batch_size: int) -> RestorationBatches:
        """The same photos and settings in batches of another size."""
        other = copy(self)
        other.batch_size = batch_size
        return other

    def with_seed(self, seed: int) -> RestorationBatches:
        """The batches that another seed gives of the same photos."""
        other = copy(self)
        other.seed = seed
        return other

    def origin(self) -> dict[str, Any]:
        """What its batches are a function of, as JSON values; of the photos names and sizes."""
        return {
            "seed": self.seed,
            "photos": len(self.photos),
            "files": fingerprint(getattr(self.photos, "paths", ())),
            "pairs": {kind: len(pairs) for kind, pairs in self.pairs.items()},
            "pair files": fingerprint(
                file
                for pairs in self.pairs.values()
                for pair in pairs.pairs
                for file in (pair.lq, pair.gt)
            ),
            "pair_share": self.pair_share,
            "kinds": list(self.kinds),
            "mixing": asdict(self.mixing),
            "batch_size": self.batch_size,
            "part": self.part,
            "crops_per_part": self.crops_per_part,
            "crop": self.crop,
            "clip_size": self.clip_size,
            "looks": self.looks,
            "softer": self.softer,
            "oversample": list(self.oversample),
        }

    def __getitem__(self, number: int) -> Item:
        """Draws batch `number` and cuts its parts from the photos."""
        generator = seeded(self.seed, 1, number)
        parts = -(-self.batch_size // self.crops_per_part)
        drawn = [self._draw(number * parts + row, None, generator) for row in range(parts)]
        return self._item(drawn, self.batch_size, generator)

    def fixed(self, size: int, at_once: int = 16) -> Batch:
        """A batch of one crop per part, the kinds in turn, whatever the share of each.

        Args:
            size: Crops.
            at_once: How many are degraded together, which bounds the memory.
        """
        chunks: list[Batch] = []
        for first in range(0, size, at_once):
            generator = seeded(self.seed, 4, first)
            places = range(first, min(size, first + at_once))
            wanted = [self.kinds[place % len(self.kinds)] for place in places]
            drawn = [self._draw(*both, generator) for both in zip(places, wanted, strict=True)]
            item = self._item(drawn, len(drawn), generator)
            chunks.append(self.finish(item, torch.device("cpu")))
        whole = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
        return whole | {"part": torch.arange(size)}

    @torch.no_grad()
    def finish(self, item: Item, device: torch.device) -> Batch:
        """Degrades and cuts on `device`, without waiting for it.

        Returns:
            What `reads` names of these, aligned and in steps of 1/255:

            `gt`, `lq`: (B, 3, crop, crop) float32 in [0, 1];
            `clip_view`: (P, 3, clip_size, clip_size), the whole degraded part squashed;
            `native_view`: likewise, a window of it that is not resized where it is large enough;
            `tone`: (P, 6) float32, how much brighter the clean part is than the degraded one in R,
            G and B, and how much higher its standard deviation is;
            `statistics`: (P, 51) float32, `photo_statistics` of the whole degraded part;

            and always: `part`: (B,) int64, the part of each crop; `kinds`: (P, N) float32, 1 for
            each kind in the part (`clean` where there is none); `severities`: (P, N) in [0, 1], 0
            for kinds that are not there and for `clean`, `UNKNOWN_SEVERITY` for a pair's kind;
            `label`: (P,) int64, the kind of the highest severity.
        """
        generator = torch.Generator().manual_seed(item.seed)
        clean = to_device(item.clean, device).float() / 255
        if len(item.look_rows):
            places = to_device(item.look_rows, device)
            clean[places] = to_8_bit(random_look(clean[places], generator, share=1.0))
        degraded = clean.clone()
        for kind, rows, severity in item.groups:
            places = to_device(rows, device)
            degraded[places] = degrade(kind, degraded[places], severity, generator)
        degraded = to_8_bit(degraded)
        if len(item.pair_rows):
            ready = to_device(item.pair_lq, device).float() / 255
            degraded[to_device(item.pair_rows, device)] = ready
        labels = {key: to_device(value, device) for key, value in item.labels.items()}
        return labels | self._cut(clean, degraded, labels["part"], item)

    def _cut(self, clean: Tensor, degraded: Tensor, part: Tensor, item: Item) -> Batch:
        """What `reads` names of both parts, (P, 3, S, S)."""
        corners, near = (to_device(c, part.device) for c in (item.corners, item.view_corners))
        side, every = min(self.clip_size, self.part), torch.arange(len(clean), device=part.device)
        make: dict[str, Callable[[], Tensor]] = {
            "gt": lambda: windows(clean, self.crop, part, corners),
            "lq": lambda: windows(degraded, self.crop, part, corners),
            "clip_view": lambda: clip_view(degraded, self.clip_size),
            "native_view": lambda: clip_view(windows(degraded, side, every, near), self.clip_size),
            "tone": lambda: _tone(clean) - _tone(degraded),
            "statistics": lambda: photo_statistics(degraded),
        }
        return {key: make[key]() for key in sorted(self.reads)}

    def _draw(self, index: int, kind: str | None, generator: torch.Generator) -> Drawn:
        """Part `index` of the endless row of parts, of any kind where none is given."""
        kind = kind or self._draw_kind(generator)
        paired = self.pairs.get(kind)
        if paired and _chance(self.pair_share, generator):
            lq, gt = paired[int(torch.randint(len(paired), (), generator=generator))]
            lq, gt = cut_pair(lq, gt, self.part, generator)
            return Drawn(gt, lq, {kind: UNKNOWN_SEVERITY})
        epoch, place = divmod(index, len(self.photos))
        order = torch.randperm(len(self.photos), generator=seeded(self.seed, 0, epoch))
        levels = self._draw_levels(kind, generator)
        softer = not levels.keys() & {"blur", "low_res"} and _chance(self.softer, generator)
        part = cut_clean(self.photos[int(order[place])], self.part, generator, softer)
        return Drawn(part, None, levels, _chance(self.looks, generator))

    def _draw_kind(self, generator: torch.Generator) -> str:
        drawn = self.kinds + self.oversample
        return drawn[int(torch.randint(len(drawn), (), generator=generator))]

    def _draw_levels(self, kind: str, generator: torch.Generator) -> dict[str, float]:
        """The kinds of a part, `kind` alone or a mix, with their severities."""
        if kind == "clean":
            return {"clean": 0.0}
        chain = _chance(self.mixing.chain, generator)
        low_res = ("low_res",) if self.mixing.low_res and "low_res" not in self.kinds else ()
        kinds = list(draw_mix(self.kinds + low_res, generator)) if chain else [kind]
        for extra in ("low_res", "second_order"):
            if _chance(getattr(self.mixing, extra), generator) and extra not in kinds:
                kinds.append(extra)
        return {kind: sample_severity(generator) for kind in kinds}

    def _item(self, drawn: Sequence[Drawn], batch_size: int, generator: torch.Generator) -> Item:
        """Puts parts together: what is done to each, and where its crops are."""
        pairs = [row for row, part in enumerate(drawn) if part.lq is not None]
        degraded = [part.lq for part in drawn if part.lq is not None]
        groups: list[tuple[str, Tensor, Tensor]] = []
        for kind in PHYSICAL_ORDER:
            level = {r: p.levels[kind] for r, p in enumerate(drawn) if kind in p.levels}
            rows = [row for row in level if row not in pairs]
            if rows and kind != "clean":
                severity = torch.tensor([level[row] for row in rows])
                groups.append((kind, torch.tensor(rows), severity))
        places = self.part - self.crop + 1, max(1, self.part - self.clip_size + 1)
        return Item(
            clean=torch.stack([part.clean for part in drawn]),
            look_rows=torch.tensor([r for r, p in enumerate(drawn) if p.look], dtype=torch.int64),
            pair_rows=torch.tensor(pairs, dtype=torch.int64),
            pair_lq=torch.stack(degraded) if degraded else drawn[0].clean.new_empty(0),
            groups=groups,
            labels=self._labels(drawn, batch_size),
            corners=torch.randint(places[0], (2, batch_size), generator=generator),
            view_corners=torch.randint(places[1], (2, len(drawn)), generator=generator),
            seed=int(torch.randint(2**31, (), generator=generator)),
        )

    def _named(self, levels: dict[str, float]) -> dict[str, float]:
        """Severities by the names that the classifier has: lost resolution is a kind of blur."""
        if "low_res" in self.kinds or "low_res" not in levels:
            return levels
        return levels | {"blur": max(levels.get("blur", 0.0), levels["low_res"])}

    def _labels(self, drawn: Sequence[Drawn], batch_size: int) -> Batch:
        seen = [self._named(part.levels) for part in drawn]
        named = [[levels.get(kind) for kind in self.kinds] for levels in seen]
        rank = torch.tensor([[-2.0 if level is None else level for level in row] for row in named])
        return {
            "part": torch.arange(batch_size) * len(drawn) // batch_size,
            "kinds": torch.tensor([[float(level is not None) for level in row] for row in named]),
            "severities": torch.tensor([[level or 0.0 for level in row] for row in named]),
            "label": rank.argmax(dim=1),
        }


def split(batch: Batch, pieces: int) -> Iterator[Batch]:
    """A batch in `pieces` of nearly the same size; at most as many as it has crops.

    A part whose crops come into two pieces is in both.
    """
    if pieces == 1:  # asks nothing of the device
        yield batch
        return
    size = len(batch["part"])
    for piece in range(pieces):
        crops = slice(piece * size // pieces, (piece + 1) * size // pieces)
        part = batch["part"][crops]
        parts = slice(int(part[0]), int(part[-1]) + 1)
        some = {k: value[crops if k in PER_CROP else parts] for k, value in batch.items()}
        yield some | {"part": part - parts.start}


def windows(photo: Tensor, side: int, rows: Tensor, corners: Tensor) -> Tensor:
    """Cuts squares at places that the device knows.

    Args:
        photo: (P, 3, H, W).
        side: Of the squares, pixels.
        rows: Photo of each, (B,).
        corners: Top and left of each, (2, B).

    Returns:
        (B, 3, side, side).
    """
    every = photo.unfold(2, side, 1).unfold(3, side, 1)
    return every[rows, :, corners[0], corners[1]]


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Moved without waiting, where its memory is pinned."""
    return value.to(device, non_blocking=True)


def _tone(image: Tensor) -> Tensor:
    """Mean and standard deviation of each channel, (P, 6)."""
    spread, mean = torch.std_mean(image.flatten(2), dim=2)
    return torch.cat([mean, spread], dim=1)


def _chance(share: float, generator: torch.Generator) -> bool:
    return share > 0 and bool(torch.rand((), generator=generator) < share)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by a row of whole numbers."""
    # torch keeps 32 bits of a CPU seed, so the numbers are hashed, not packed.
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def sampling_noise(seed: int, number: int) -> torch.Generator:
    """Of the noise that latents for batch `number` are sampled from."""
    return seeded(seed, 2, number)


class BatchNumbers(Sampler[int]):
    """Endless numbers of the batches of one process: every `world_size`-th from its rank on.

    Starting at batch N of each process therefore continues exactly where a run stopped, and W
    processes see what one sees that takes W batches for each of theirs.
    """

    def __init__(self, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be below world_size; found rank {rank}, world_size {world_size}"
            )
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[int]:
        return count(self.start * self.world_size + self.rank, self.world_size)
