"""What is read from a whole photo once, so that all its tiles agree on it."""

from __future__ import annotations

import torch
from torch import Tensor

from .local import LocalPooled
from .shrinkage import opponent

NOISE_LEVELS = 3
_QUANTILES = 16
STATISTICS = 3 * _QUANTILES + NOISE_LEVELS
"""Numbers for each photo, of which the last are noise levels."""
_ROWS = 128
"""Rows and columns of a photo that its quantiles are read from: of large ones as many to twice as
many, of small ones all."""
_SQUARES = 256
"""Likewise of squares that its noise is read from."""


def photo_statistics(photo: Tensor) -> Tensor:
    """Tone and noise of whole photos.

    Args:
        photo: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 51): of `tone_quantiles` 48, and of `noise_levels` 3.
    """
    return torch.cat([tone_quantiles(photo), noise_levels(photo)], dim=1)


def local_statistics(photo: Tensor, places: LocalPooled) -> Tensor:
    """(B, R, K, 51): the tone of whole photos, on which all places agree, and the noise of each
    tile, which may be on one side alone."""
    tone = tone_quantiles(photo)[:, None, None]
    noise = places.of_parts(photo, noise_levels)
    return torch.cat([tone.expand(*noise.shape[:-1], -1), noise], dim=-1)


def tone_quantiles(photo: Tensor) -> Tensor:
    """Where black, white and what lies between are in each channel.

    Returns:
        (B, 48) in [0, 1], in steps of 1/255: 16 quantiles of R, of G and of B, from 0.5 to 99.5 %.
    """
    rows, columns = (max(1, side // _ROWS) for side in photo.shape[-2:])
    pixels = photo[..., ::rows, ::columns].float().flatten(2).nan_to_num().clamp(0, 1)
    # Counting the levels takes a tenth of the time of sorting the pixels.
    counts = pixels.new_zeros(*pixels.shape[:2], 256)
    counts.scatter_add_(2, (pixels * 255).round().long(), torch.ones_like(pixels))
    share = torch.linspace(0.005, 0.995, _QUANTILES, device=photo.device)
    places = (share * (pixels.shape[2] - 1)).round() + 0.5
    wanted = places.expand(*pixels.shape[:2], -1).contiguous()
    return torch.searchsorted(counts.cumsum(dim=2), wanted).flatten(1) / 255


def noise_levels(photo: Tensor) -> Tensor:
    """Standard deviation of the noise in each of the `opponent` colours, if it is white.

    Returns:
        (B, 3) in units of [0, 1].

    Source: Donoho and Johnstone 1994, https://doi.org/10.1093/biomet/81.3.425: the median of the
    finest wavelet coefficients, in which a photo itself has little. The wavelet is Haar's.
    """
    rows, columns = (2 * max(1, side // 2 // _SQUARES) for side in photo.shape[-2:])
    height, width = (side // 2 * 2 for side in photo.shape[-2:])
    pixels = photo[..., :height, :width].float().nan_to_num()
    (a, b), (c, d) = (
        [pixels[..., down::rows, right::columns] for right in (0, 1)] for down in (0, 1)
    )
    finest = opponent((a - b - c + d) / 2)
    return finest.flatten(2).abs().median(dim=2).values / 0.6745
