"""Shrinkage of a photo's local frequencies: what noise and JPEG leave of them is small."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 8
"""Of the blocks, pixels: as JPEG's."""
THRESHOLDS = 3 * (SIDE * SIDE - 1)
"""A threshold for each frequency of each opponent colour, but for the means."""
_STEP, _EDGE = 2, 3
"""From block to block, and how far the first ones lie outside of the photo."""


def shrink(photo: Tensor, thresholds: Tensor) -> Tensor:
    """The mean of what all blocks of a photo are without their small frequencies.

    The blocks overlap, which hides their edges. Frequencies well above their threshold stay as they
    are, those well below go; the means never go. With thresholds of 0 the photo stays, bit for bit.

    Args:
        photo: (B, 3, H, W) in any units; H and W even.
        thresholds: In the same units, (B, 189, 1, 1), or (B, 189, H/2, W/2) of each place.

    Source: hard thresholding of translated DCT blocks (Yu and Sapiro 2011,
    https://doi.org/10.5201/ipol.2011.ys-dct), with a threshold that gradients pass.
    """
    photo, filters = photo.float(), _cosines(photo.device)
    limits = thresholds.float().chunk(3, dim=1)
    # Color by color, as their frequencies take 16 times the memory of the photo.
    small = [
        _small(*pair, filters) for pair in zip(opponent(photo).chunk(3, 1), limits, strict=True)
    ]
    blocks = photo.new_ones(1, 1, *(side // _STEP for side in photo.shape[-2:]))
    count = F.conv_transpose2d(blocks, torch.ones_like(filters[:1]), stride=_STEP)
    mean = (torch.cat(small, dim=1) / count)[..., _EDGE:-_EDGE, _EDGE:-_EDGE]
    return photo - opponent(mean, inverse=True)


def _small(color: Tensor, limits: Tensor, filters: Tensor) -> Tensor:
    """What of a color, (B, 1, H, W), is below its thresholds, (B, 63, 1 or H/2, 1 or W/2): the sum
    of all blocks, with `_EDGE` pixels around."""
    planes = F.conv2d(F.pad(color, (_EDGE,) * 4, mode="replicate"), filters, stride=_STEP)
    ratio = (limits.square() / (planes.square() + 1e-10)).clamp_max(100.0) ** 4
    return F.conv_transpose2d(planes * (ratio / (1 + ratio)), filters, stride=_STEP)


def opponent(photo: Tensor, *, inverse: bool = False) -> Tensor:
    """Grey, red against blue, and green against both, (B, 3, H, W), by a rotation of the colours;
    or the way back."""
    rows = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], device=photo.device)
    rotation = F.normalize(rows, dim=1)
    return torch.einsum("ck,bkhw->bchw", rotation.T if inverse else rotation, photo)


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal cosine transform of blocks without their mean, (63, 1, 8, 8)."""
    place = torch.arange(SIDE, device=device)
    rows = F.normalize(torch.cos(math.pi * (place[None] + 0.5) * place[:, None] / SIDE), dim=1)
    return torch.einsum("ui,vj->uvij", rows, rows).flatten(0, 1)[1:, None]
