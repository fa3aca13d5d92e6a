"""The second-order chain of Real-ESRGAN: what happens to a photo that is shared twice."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .codec import jpeg_codec
from .draw import Draw, per_sample
from .filters import convolve
from .kernels import gaussian_kernels, sinc_kernels

_KERNEL = 21
_SINC_SHARE = 0.1
_FILTERS = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class _Round:
    """Ranges of one round at severity 1."""

    blur_probability: float
    sigma: tuple[float, float]
    scale: tuple[float, float]
    noise: tuple[float, float]
    """Sigma of Gaussian noise, in units of 1/255."""
    poisson: tuple[float, float]
    quality: tuple[float, float] = (30, 95)


_FIRST = _Round(1.0, sigma=(0.2, 3), scale=(0.15, 1.5), noise=(1, 30), poisson=(0.05, 3))
_SECOND = _Round(0.8, sigma=(0.2, 1.5), scale=(0.3, 1.2), noise=(1, 25), poisson=(0.05, 2.5))


def second_order(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, resize, noise and JPEG, twice, with ringing at the end; back at the size of the photo.

    Source: Wang et al., "Real-ESRGAN" (2021), with the ranges of its `train_realesrnet_x4plus.yml`
    at severity 1; lower severities draw from the milder part of each range. Every sample has its
    own size on the way, so samples are made one by one.
    """
    samples = [
        _one(image[index : index + 1], float(level), generator)
        for index, level in enumerate(severity)
    ]
    return torch.cat(samples)


def _one(image: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    size = (image.shape[-2], image.shape[-1])
    degraded = _round(image, size, _FIRST, severity, generator)
    degraded = _jpeg(degraded, _FIRST, severity, generator)
    degraded = _round(degraded, size, _SECOND, severity, generator)
    draw = Draw(degraded, generator)
    ringing = draw.chance(0.8 * severity)
    kernel = sinc_kernels(draw.uniform(math.pi / 3, math.pi), _KERNEL)
    if draw.chance(0.5):
        degraded = _jpeg(degraded, _SECOND, severity, generator)
        degraded = _resize(degraded, size, draw)
        return convolve(degraded, kernel).clamp(0, 1) if ringing else degraded
    degraded = _resize(degraded, size, draw)
    degraded = convolve(degraded, kernel).clamp(0, 1) if ringing else degraded
    return _jpeg(degraded, _SECOND, severity, generator)


def _round(
    image: Tensor,
    size: tuple[int, int],
    ranges: _Round,
    severity: float,
    generator: torch.Generator,
) -> Tensor:
    """Blur, resize (relative to the photo's `size`) and noise."""
    draw = Draw(image, generator)
    if draw.chance(ranges.blur_probability):
        image = convolve(image, _kernel(draw, ranges, severity))
    smallest, largest = (limit**severity for limit in ranges.scale)
    enlarge = bool(draw.chance(0.25))
    factor = float(draw.uniform(1, largest) if enlarge else draw.uniform(smallest, 1))
    image = _resize(image, (round(size[0] * factor), round(size[1] * factor)), draw)
    return _noise(image, ranges, severity, generator)


def _kernel(draw: Draw, ranges: _Round, severity: float) -> Tensor:
    """A Gaussian, generalised or plateau kernel, round or long, or now and then a sinc filter."""
    low, high = ranges.sigma
    high = low + severity * (high - low)
    sigma_x, sigma_y = draw.uniform(low, high), draw.uniform(low, high)
    round_kernel = draw.chance(0.55)
    sigma_y = torch.where(round_kernel, sigma_x, sigma_y)
    shape = torch.where(draw.chance(0.7), 1.0, draw.uniform(0.5, 2.0))
    angle = draw.uniform(0, math.pi)
    cutoff = draw.uniform(math.pi * (1 - 2 / 3 * severity), math.pi)
    if draw.chance(_SINC_SHARE):
        return sinc_kernels(cutoff, _KERNEL)
    return gaussian_kernels(sigma_x, sigma_y, angle, shape, _KERNEL)


def _resize(image: Tensor, size: tuple[int, int], draw: Draw) -> Tensor:
    mode = _FILTERS[int(draw.choice(1, 1, 1))]
    size = (max(1, size[0]), max(1, size[1]))
    return F.interpolate(image, size=size, mode=mode).clamp(0, 1)


def _noise(image: Tensor, ranges: _Round, severity: float, generator: torch.Generator) -> Tensor:
    draw = Draw(image, generator)
    grey, photons = bool(draw.chance(0.4)), bool(draw.chance(0.5))
    low, high = ranges.poisson if photons else ranges.noise
    strength = draw.uniform(low, low + severity * (high - low))
    if photons:
        # Variance `strength^2 * brightness / 255`, as a Poisson number of photons has.
        sigma = per_sample(strength) * (image.mean(1, keepdim=True) if grey else image).sqrt() / 16
    else:
        sigma = per_sample(strength) / 255
    white = draw.randn(1, 1 if grey else 3, draw.height, draw.width)
    return (image + sigma * white).clamp(0, 1)


def _jpeg(image: Tensor, ranges: _Round, severity: float, generator: torch.Generator) -> Tensor:
    low, high = ranges.quality
    return jpeg_codec(image, Draw(image, generator).uniform(high + severity * (low - high), high))
