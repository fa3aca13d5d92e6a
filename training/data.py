"""Photos in, degraded training samples out; every sample is a function of (seed, index)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from diff_restorer.degradations import KINDS, degrade_chain, sample_severity

from .pairs import PairedPhotos
from .photos import fingerprint

UNKNOWN_SEVERITY = -1.0
"""`severity` of samples from pairs."""


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
    return (image * 255).clamp(0, 255).round() / 255


@dataclass(frozen=True)
class Mixing:
    """How often several degradations meet in one sample; by default never, as in the paper.

    Degradations in a mix are milder, each by the square root of their number, so that the whole is
    about as bad as one alone.
    """

    chain: float = 0.0
    """Share of samples with one or two more kinds, in their physical order."""
    low_res: float = 0.0
    """Share of samples that also lose resolution, which no label tells."""
    second_order: float = 0.0
    """Share of samples that also pass Real-ESRGAN's second-order chain, which no label tells."""


class RestorationSamples(Dataset[dict[str, Tensor]]):
    """Endless aligned training samples: a part of a photo, degraded, and a crop of it.

    Sample `index` is a function of (seed, index) alone, for any index from 0; without pairs, each
    run of `len(photos)` indices visits every photo once.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        *,
        crop: int,
        clip_size: int,
        seed: int,
        kinds: Sequence[str] = KINDS,
        mixing: Mixing | None = None,
        pairs: PairedPhotos | None = None,
        pair_share: float = 0.5,
        darker: float = 0.0,
        softer: float = 0.0,
        oversample: Sequence[str] = (),
    ) -> None:
        """Makes samples of photos and pairs.

        Args:
            photos: Clean photos, (3, H, W) uint8 each; at least one.
            crop: Side of `gt` and `lq`, pixels.
            clip_size: Side of `clip_view`, pixels.
            seed: Another seed gives other samples.
            kinds: Degradations, drawn uniformly unless `oversample` is given; `label` is the place
                in this list.
            mixing: How often clean photos get several degradations at once.
            pairs: Degraded and clean photos.
            pair_share: Share of the samples of a kind that are pairs, where there are pairs of it;
                the others are degraded on the fly.
            darker: Share of clean photos that are first exposed for up to 2 stops less, so that a
                dark photo is not always one to brighten; not those for `low_light` and `haze`.
            softer: Share of clean photos that first lose up to 2.5 times in resolution, as the
                pixels of a camera are softer than those of reduced photos; not those for `blur` and
                `low_res`.
            oversample: Kinds to draw more often; each mention adds a kind's own share once more.

        Raises:
            ValueError: There is no photo, or `oversample` names what `kinds` lacks.
        """
        if not photos:
            raise ValueError("photos: a sample needs a clean photo, found none")
        if unknown := set(oversample) - set(kinds):
            raise ValueError(f"oversample: unknown {sorted(unknown)}; known are {tuple(kinds)}")
        self.photos, self.crop, self.clip_size = photos, crop, clip_size
        self.seed, self.kinds, self.oversample = seed, tuple(kinds), tuple(oversample)
        self.mixing = mixing or Mixing()
        self.pairs = pairs.by_kind() if pairs else {}
        self.pair_share, self.darker, self.softer = pair_share, darker, softer

    def __len__(self) -> int:
        """Samples of one epoch: as many as there are photos or pairs, whichever are more."""
        return max(len(self.photos), sum(map(len, self.pairs.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample.

        Returns:
            `gt`, `lq`: (3, crop, crop) float32 in [0, 1], aligned, in steps of 1/255;
            `clip_view`: (3, clip_size, clip_size), the whole degraded part squashed;
            `native_view`: likewise, a window of it that is not resized where it is large enough;
            `kinds`: (N,) float32, 1 for each kind in the sample (`clean` where there is none);
            `label`: int64, the kind of the highest severity;
            `severity`: float32 in [0, 1], the highest, of `clean` 0; `UNKNOWN_SEVERITY` for pairs;
            `tone`: (6,) float32, how much brighter the clean part is than the degraded one in R, G
            and B, and how much higher its standard deviation is.
        """
        generator = seeded(self.seed, 1, index)
        kind = None
        if self.pairs:  # the kind comes first, as it decides on the source
            kind = self._draw_kind(generator)
            paired = self.pairs.get(kind)
            if paired and torch.rand((), generator=generator) < self.pair_share:
                lq, gt = paired[int(torch.randint(len(paired), (), generator=generator))]
                part, degraded = self._pair_part(torch.cat((gt, lq)), generator).split(3, dim=1)
                return self._sample(part, degraded, {kind: UNKNOWN_SEVERITY}, generator)
        epoch, place = divmod(index, len(self.photos))
        order = torch.randperm(len(self.photos), generator=seeded(self.seed, 0, epoch))
        part = self._part(self.photos[int(order[place])], generator)
        levels = self._draw_levels(kind or self._draw_kind(generator), generator)
        for change, share, not_for in (
            (_darker, self.darker, {"low_light", "haze"}),
            (_softer, self.softer, {"blur", "low_res"}),
        ):
            if share > 0 and not levels.keys() & not_for and _chance(share, generator):
                part = change(part, generator)
        severities = torch.tensor([list(levels.values())])
        degraded = to_8_bit(degrade_chain(tuple(levels), part, severities, generator))
        return self._sample(part, degraded, levels, generator)

    def with_seed(self, seed: int) -> RestorationSamples:
        """The samples that another seed gives of the same photos."""
        other = copy(self)
        other.seed = seed
        return other

    def origin(self) -> dict[str, Any]:
        """What its samples are a function of, as JSON values; of the photos names and sizes."""
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
            "crop": self.crop,
            "clip_size": self.clip_size,
            "darker": self.darker,
            "softer": self.softer,
            "oversample": list(self.oversample),
        }

    def _draw_kind(self, generator: torch.Generator) -> str:
        drawn = self.kinds + self.oversample
        return drawn[int(torch.randint(len(drawn), (), generator=generator))]

    def _draw_levels(self, kind: str, generator: torch.Generator) -> dict[str, float]:
        """The kinds of a sample, `kind` and what is mixed in, with their severities."""
        kinds = [kind]

        def happens(share: float) -> bool:
            return kind != "clean" and share > 0 and _chance(share, generator)

        if happens(self.mixing.chain):
            others = [other for other in self.kinds if other not in (kind, "clean")]
            more = 1 + int(torch.randint(2, (), generator=generator))
            order = torch.randperm(len(others), generator=generator)[:more]
            kinds += [others[place] for place in order.tolist()]
        for extra in ("low_res", "second_order"):
            if happens(getattr(self.mixing, extra)) and extra not in kinds:
                kinds.append(extra)
        scale = math.sqrt(len(kinds))
        levels = {kind: sample_severity(generator) / scale for kind in kinds}
        return levels if kind != "clean" else {"clean": 0.0}

    def _sample(
        self, part: Tensor, degraded: Tensor, levels: dict[str, float], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Crops both parts, (1, 3, H, W), and names their kinds."""
        top, left = (
            int(torch.randint(side - self.crop + 1, (), generator=generator))
            for side in part.shape[-2:]
        )
        window = (0, slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
        top, left = (
            int(torch.randint(max(1, side - self.clip_size + 1), (), generator=generator))
            for side in part.shape[-2:]
        )
        near = degraded[..., top : top + self.clip_size, left : left + self.clip_size]
        named = {kind: level for kind, level in levels.items() if kind in self.kinds}
        strongest = max(named, key=lambda kind: named[kind])
        return {
            "gt": part[window].clone(),
            "lq": degraded[window].clone(),
            "clip_view": clip_view(degraded, self.clip_size)[0],
            "native_view": clip_view(near, self.clip_size)[0],
            "kinds": torch.tensor([float(kind in named) for kind in self.kinds]),
            "label": torch.tensor(self.kinds.index(strongest)),
            "severity": torch.tensor(named[strongest]),
            "tone": _tone(part) - _tone(degraded),
        }

    def _pair_part(self, both: Tensor, generator: torch.Generator) -> Tensor:
        """A random part of a pair, (6, H, W) uint8, mirrored or not; (1, 6, H, W) in [0, 1].

        It is not reduced, which would hide noise and JPEG blocks, but has at most as many pixels as
        the parts of clean photos; a photo smaller than the crop is enlarged just enough.
        """
        longest = max(512, 2 * self.crop)
        shares = torch.rand(2, generator=generator) * 0.4 + 0.6
        sides = [
            min(side, max(self.crop, min(longest, round(side * float(share)))))
            for side, share in zip(both.shape[1:], shares, strict=True)
        ]
        part = _window(both, sides, generator)
        if _chance(0.5, generator):
            part = part.flip(-1)
        factor = self.crop / min(sides)
        return part if factor <= 1 else self._resized(part, factor)

    def _part(self, photo: Tensor, generator: torch.Generator) -> Tensor:
        """A random part of the photo, mirrored or not, mildly reduced; (1, 3, H, W) in [0, 1].

        Both sides are at least `crop`: a small photo is enlarged just enough. The long side is at
        most 512 or two crops where that allows it, to bound the cost of a sample.
        """
        whole = _chance(0.2, generator)
        share = torch.rand(2, generator=generator) * 0.4 + 0.6
        sides = [
            side if whole else round(side * float(part))
            for side, part in zip(photo.shape[1:], share, strict=True)
        ]
        part = _window(photo, sides, generator)
        if _chance(0.5, generator):
            part = part.flip(-1)
        reduce = torch.rand(2, generator=generator)
        factor = 1 - 0.4 * float(reduce[1]) if reduce[0] < 0.5 else 1.0
        factor = min(factor, max(512, 2 * self.crop) / max(sides))
        factor = max(factor, self.crop / min(sides))
        return part if factor == 1.0 else self._resized(part, factor)

    def _resized(self, part: Tensor, factor: float) -> Tensor:
        size = [max(self.crop, round(side * factor)) for side in part.shape[-2:]]
        return to_8_bit(F.interpolate(part, size=size, mode="bicubic", antialias=True))


def _tone(image: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of (1, 3, H, W), (6,)."""
    pixels = image[0].flatten(1)
    return torch.cat([pixels.mean(dim=1), pixels.std(dim=1)])


def _darker(part: Tensor, generator: torch.Generator) -> Tensor:
    """As exposed for up to 2 stops less, through a gamma of 2.2, in steps of 1/255."""
    stops = 2 * float(torch.rand((), generator=generator))
    return to_8_bit(part * 2 ** (-stops / 2.2))


def _softer(part: Tensor, generator: torch.Generator) -> Tensor:
    """Reduced by 1 to 2.5 and enlarged again, in steps of 1/255."""
    factor = 1 + 1.5 * float(torch.rand((), generator=generator))
    small = [round(side / factor) for side in part.shape[-2:]]
    small_part = F.interpolate(part, size=small, mode="bicubic", antialias=True)
    return to_8_bit(F.interpolate(small_part, size=part.shape[-2:], mode="bicubic"))


def _chance(share: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < share)


def _window(photo: Tensor, sides: Sequence[int], generator: torch.Generator) -> Tensor:
    """A part of these sides at a random place of (C, H, W) uint8; (1, C, h, w) in [0, 1]."""
    top, left = (
        int(torch.randint(full - side + 1, (), generator=generator))
        for full, side in zip(photo.shape[1:], sides, strict=True)
    )
    return photo[None, :, top : top + sides[0], left : left + sides[1]].float() / 255


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by a row of whole numbers."""
    # torch keeps 32 bits of a CPU seed, so the numbers are hashed, not packed.
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


class StepSampler(Sampler[list[int]]):
    """Endless batches of indices; the batch of a step depends on (seed, step, rank) alone.

    Starting at step N therefore continues exactly where a run stopped, and W ranks with a batch of
    B see what one rank with a batch of W * B sees.
    """

    def __init__(
        self,
        seed: int,
        *,
        start_step: int = 0,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size must be positive and rank below world_size; found batch_size "
                f"{batch_size}, rank {rank}, world_size {world_size}"
            )
        self.start_step, self.batch_size = start_step, batch_size
        self.rank, self.world_size = rank, world_size
        # Every seed walks through its own stretch of the endless row of samples.
        self.offset = int(torch.randint(2**40, (), generator=seeded(seed)))

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.start_step):
            first = self.offset + (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
