"""Black and white of a restored photo, set once for all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .control import zero_init
from .photo_statistics import QUANTILES, tone_quantiles

_PLACES = (0, 3, 8, 12, QUANTILES - 1)
"""Of the quantiles of a channel, those that are looked at."""
INPUTS = 2 * 3 * len(_PLACES)
"""Numbers that are read of a degraded and a restored photo."""
GAIN, OFFSET = 1.5, 0.5
"""Largest change: of the logarithm of contrast, and of what is middle grey."""


class Grade(nn.Module):
    """Contrast and brightness of each channel, from where black, white and what lies between are in
    the degraded and in the restored photo.

    A latent's tone tends to the middle; where black and white points are is what stretching a
    histogram goes by, and it needs the whole photo.
    """

    def __init__(
        self, kinds: int, width: int, linear: Callable[[int, int], Any] = nn.Linear
    ) -> None:
        """Starts without any change.

        Args:
            kinds: Shares of kinds of damage that it is told.
            width: Of what is hidden.
            linear: Makes linear layers.
        """
        super().__init__()
        self.first = linear(kinds + INPUTS, width)
        self.second = linear(width, width)
        self.last = zero_init(linear(width, 6))

    def forward(self, seen: Tensor) -> Tensor:
        """(B, 6): the logarithm of contrast, and the new middle grey, of R, G and B."""
        h = nn.functional.silu(self.first(seen))
        gain, offset = self.last(nn.functional.silu(self.second(h))).tanh().chunk(2, dim=-1)
        return torch.cat([GAIN * gain, OFFSET * offset], dim=-1)


def grade_input(photo: Tensor, restored: Tensor, shares: Tensor) -> Tensor:
    """What `Grade` reads, (B, kinds + 30).

    Args:
        photo: Degraded photos, (B, 3, H, W) in [0, 1].
        restored: Likewise.
        shares: Of the kinds of damage, (B, kinds).
    """
    tones = (tone_quantiles(value).view(len(value), 3, -1) for value in (photo, restored))
    some = (4 * tone[..., _PLACES].flatten(1).to(shares) - 2 for tone in tones)
    return torch.cat([shares, *some], dim=1)


def with_grade(image: Tensor, grade: Tensor, strength: Tensor) -> Tensor:
    """Photos with another contrast and brightness.

    Args:
        image: (B, 3, H, W) in [0, 1].
        grade: From `Grade`, (B, 6).
        strength: How much of them, (B, 1) in [0, 1]; at 0 nothing changes, bit for bit.
    """
    change = (strength * grade).to(image)[..., None, None]
    gain, offset = change.chunk(2, dim=1)
    graded = (image - 0.5) * gain.exp() + 0.5 + offset
    return torch.where((change != 0).any(dim=1, keepdim=True), graded, image)
