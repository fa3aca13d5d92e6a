"""Another tone for a photo, with the photo's own detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .photo_statistics import tone_quantiles

_EIGHTH = 8
"""Pixels of the photo along each side of a place at 1/8 size."""
_RADIUS, _FLAT = 2, 4e-4
"""Of the guided filter: places that it looks around, and what variance of pixels in [-1, 1] is as
good as none."""
_LEAST_RANGE = 0.2
"""Between black and white; what has less, such as a wall, is not hazy."""


def guided_tone(photo: Tensor, wanted: Tensor) -> Tensor:
    """What gain and offset of each place give the photo another tone, and keep its detail.

    Args:
        photo: (B, 3, H, W) in [-1, 1]; H and W multiples of 8.
        wanted: Colours in 1/8 size, (B, 3, H/8, W/8).

    Returns:
        (B, 6, H/8, W/8): `a` of R, G and B, and `b` likewise, so that a * photo + b, both resized
        to the photo, is about as bright and as contrasty as `wanted`. No change is a = 1, b = 0.

    Source: fast guided filter (He and Sun 2015, arXiv 1505.00996), the photo as its guide.
    """
    small, wanted = F.avg_pool2d(photo.float(), _EIGHTH), wanted.float()
    mean, mean_wanted = _around(small), _around(wanted)
    variance = _around(small * small) - mean * mean
    a = (_around(small * wanted) - mean * mean_wanted) / (variance.clamp_min(0) + _FLAT)
    return _around(torch.cat([a, mean_wanted - a * mean], dim=1))


def _around(value: Tensor) -> Tensor:
    """Means of the places around each."""
    side = 2 * _RADIUS + 1
    return F.avg_pool2d(value, side, stride=1, padding=_RADIUS, count_include_pad=False)


def with_tone(photo: Tensor, tone: Tensor) -> Tensor:
    """a * photo + b, of `tone` from `guided_tone`."""
    a, b = F.interpolate(tone.to(photo), size=photo.shape[-2:], mode="bilinear").chunk(2, dim=1)
    return torch.addcmul(b, photo, a)


def no_change(tone: Tensor) -> Tensor:
    """Gain 1 and offset 0, to be broadcast over the places of `tone`."""
    none = torch.zeros_like(tone[:, :, :1, :1])
    none[:, :3] = 1
    return none


def stretched(image: Tensor, share: Tensor) -> Tensor:
    """Photos with black and white in them, which haze takes away, and a restoration gives back in
    part: a linear stretch of all channels alike, from the lowest of their 0.5 % quantiles to the
    highest of their 99.5 % quantiles.

    Args:
        image: Whole photos, (B, 3, H, W) in [0, 1].
        share: How much of it, (B,) in [0, 1]; where it is 0 a photo stays as it is, bit for bit.
    """
    if not share.any():
        return image
    quantiles = tone_quantiles(image)
    low, high = quantiles.amin(dim=1), quantiles.amax(dim=1)
    gain = 1 / (high - low).clamp_min(_LEAST_RANGE)
    low, gain, share = (v.to(image)[:, None, None, None] for v in (low, gain, share))
    changed = (image + share * ((image - low) * gain - image)).clamp(0, 1)
    return torch.where(share > 0, changed, image)
