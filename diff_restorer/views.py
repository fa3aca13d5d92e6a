"""What the vision encoder is shown of a photo."""

from __future__ import annotations

from torch import Tensor

WHOLE, NATIVE = "whole", "native"
"""The photo squashed to the encoder's size (paper), or a piece of it at its own resolution."""


def native_view(image: Tensor, size: int) -> Tensor:
    """The centre of photos, not resized: squashing averages noise and JPEG blocks away.

    Args:
        image: (B, H, W, C).
        size: Side of what the vision encoder sees, in pixels.

    Returns:
        (B, min(H, size), min(W, size), C), a view of `image`.
    """
    height, width = image.shape[1:3]
    top, left = max(0, height - size) // 2, max(0, width - size) // 2
    return image[:, top : top + size, left : left + size]
