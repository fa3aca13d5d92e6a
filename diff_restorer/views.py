"""What the vision encoder is shown of a photo."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WHOLE, NATIVE = "whole", "native"
"""The photo squashed to the encoder's size, as SSP-IR by the same authors does it, or windows of it
at their own resolution, which keep noise and JPEG blocks visible (ours)."""
MOST_VIEWS = 3
"""Windows along each side at most: what a vision encoder is given of a photo has to end."""


def native_views(image: Tensor, size: int) -> Tensor:
    """Windows of photos, not resized: squashing averages noise and JPEG blocks away.

    They are spread evenly from edge to edge and cover photos of up to `MOST_VIEWS` times `size`: a
    raindrop may be anywhere.

    Args:
        image: (B, H, W, C).
        size: Side of what the vision encoder sees, in pixels.

    Returns:
        (B, V, min(H, size), min(W, size), C) with V from 1 to `MOST_VIEWS` squared.
    """
    rows, columns = (_starts(side, size) for side in image.shape[1:3])
    windows = [image[:, y : y + size, x : x + size] for y in rows for x in columns]
    return torch.stack(windows, dim=1)


def _starts(side: int, size: int) -> list[int]:
    count = min(MOST_VIEWS, math.ceil(side / size))
    return [round(index * (side - size) / max(1, count - 1)) for index in range(count)]
