"""Parts of photos, all of one size: what a batch is degraded and cropped from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SHARP = 1024
"""Long side, pixels, to which half of the larger photos are reduced: there pixels are sharp."""
MOST_REDUCED = 0.6


def cut_clean(photo: Tensor, side: int, generator: torch.Generator, softer: bool = False) -> Tensor:
    """A random part of a clean photo, mirrored or not and mildly reduced.

    Half of the photos are reduced no further than to a long side of `SHARP`, the others by any
    factor between `MOST_REDUCED` of that and none; so parts show much of a scene and little of it,
    sharp pixels and a camera's own. A photo smaller than the part is enlarged just enough.

    Args:
        photo: (3, H, W) uint8.
        side: Of the part, pixels.
        generator: Source of all draws.
        softer: Take a part 1 to 2.5 times smaller instead and enlarge it, as the pixels of many
            cameras are softer than those of reduced photos.

    Returns:
        (3, side, side) uint8.
    """
    short, long = sorted(photo.shape[1:])
    sharp = min(1.0, SHARP / long)
    reduced, place = torch.rand(2, generator=generator).tolist()
    factor = sharp if reduced < 0.5 else (MOST_REDUCED * sharp) ** place
    if softer:
        factor = 1 + 1.5 * place
    return cut([photo], side, max(factor, side / short), generator)[0]


def cut_pair(
    lq: Tensor, gt: Tensor, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same random part of both halves of a pair, mirrored or not.

    It is not reduced, which would hide noise and JPEG blocks; a photo smaller than the part is
    enlarged just enough.

    Args:
        lq: Degraded photo, (3, H, W) uint8.
        gt: Clean photo, likewise.
        side: Of the part, pixels.
        generator: Source of all draws.

    Returns:
        Both, (3, side, side) uint8.
    """
    degraded, clean = cut([lq, gt], side, max(1.0, side / min(gt.shape[1:])), generator)
    return degraded, clean


def cut(
    photos: Sequence[Tensor], side: int, factor: float, generator: torch.Generator
) -> list[Tensor]:
    """The same window of aligned photos, (3, H, W) uint8, scaled by `factor` to `side` pixels."""
    window = [min(full, round(side / factor)) for full in photos[0].shape[1:]]
    top, left = (
        int(torch.randint(full - own + 1, (), generator=generator))
        for full, own in zip(photos[0].shape[1:], window, strict=True)
    )
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    parts: list[Tensor] = []
    for photo in photos:
        part = photo[:, top : top + window[0], left : left + window[1]]
        part = part.flip(-1) if mirrored else part
        if window != [side, side]:
            # In whole numbers, which is several times faster than through floats.
            part = F.interpolate(part[None], (side, side), mode="bicubic", antialias=True)[0]
        parts.append(part)
    return parts
