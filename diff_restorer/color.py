"""Giving a picture the colours of another: three ways to mend the tints that diffusion brings."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from torch import Tensor
from torch.nn import functional as F

Method = Literal["wavelet", "adain", "lab"]
METHODS: tuple[str, ...] = get_args(Method)

_DILATIONS = (1, 2, 4, 8, 16)
_REACH = sum(_DILATIONS)
_BAND = 512


def match_colors(
    image: Tensor, reference: Tensor, method: str = "wavelet", strength: float = 1.0
) -> Tensor:
    """Colours of `reference`, all else of `image`.

    Args:
        image: (B, 3, H, W) in [0, 1].
        reference: Likewise, of the same size.
        method: `wavelet`: what is coarser than about 30 pixels comes from the reference, place by
            place (StableSR, arXiv 2305.07015). `adain`: mean and standard deviation of each channel
            do, for the whole picture (arXiv 1703.06868). `lab`: likewise, but of the colour axes of
            CIELAB alone (Reinhard et al., "Color transfer between images", 2001), so that
            brightness stays.
        strength: 0 changes nothing, 1 is the method.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: An unknown method, or sizes that differ.
    """
    if image.shape != reference.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(image.shape)}"
        raise ValueError(f"reference: its shape must be that of the image, found {shapes}")
    if method == "wavelet":
        matched = image + _by_bands(reference - image)
    elif method == "adain":
        matched = _with_statistics_of(reference, image)
    elif method == "lab":
        ours, theirs = rgb_to_lab(image), rgb_to_lab(reference)
        tint = _with_statistics_of(theirs[:, 1:], ours[:, 1:])
        matched = lab_to_rgb(torch.cat([ours[:, :1], tint], dim=1))
    else:
        raise ValueError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    return torch.lerp(image, matched.clamp(0, 1), strength)


def _by_bands(value: Tensor) -> Tensor:
    """`_coarse` in bands of rows, which see their surroundings: the same with less memory."""
    height = value.shape[-2]
    coarse = torch.empty_like(value)
    for top in range(0, height, _BAND):
        bottom = min(height, top + _BAND)
        start, end = max(0, top - _REACH), min(height, bottom + _REACH)
        band = _coarse(value[..., start:end, :])
        coarse[..., top:bottom, :] = band[..., top - start : bottom - start, :]
    return coarse


def _coarse(value: Tensor) -> Tensor:
    """What is left after five levels of the a-trous wavelet, edges repeated."""
    kernel = value.new_tensor([0.25, 0.5, 0.25])
    channels = value.shape[1]
    for dilation in _DILATIONS:
        for shape, pad in (((1, 3), (1, 1, 0, 0)), ((3, 1), (0, 0, 1, 1))):
            weight = kernel.view(1, 1, *shape).expand(channels, -1, -1, -1)
            padded = F.pad(value, [side * dilation for side in pad], mode="replicate")
            value = F.conv2d(padded, weight, dilation=dilation, groups=channels)
    return value


def _with_statistics_of(reference: Tensor, value: Tensor) -> Tensor:
    mean, spread = _statistics(value)
    wanted_mean, wanted_spread = _statistics(reference)
    return (value - mean) / spread * wanted_spread + wanted_mean


def _statistics(value: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(value, dim=(2, 3), correction=0, keepdim=True)
    return mean, (variance + 1e-8).sqrt()
