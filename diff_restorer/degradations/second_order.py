"""The second-order chain of Real-ESRGAN: what happens to a photo that is shared twice."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .compression import compress_jpeg
from .draw import Draw
from .filters import convolve
from .kernels import gaussian_kernels, sinc_kernels
from .resampling import rescale

_KERNEL = 21
_SINC_SHARE = 0.1


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
    at severity 1; lower severities draw from the milder part of each range. Different: the samples
    of a call share one size on the way, that of the least reduced, and the order of the last steps.
    """
    draw = Draw(image, generator)
    size = (draw.height, draw.width)
    degraded = _jpeg(_round(image, size, _FIRST, severity, draw), _FIRST, severity, draw)
    degraded = _round(degraded, size, _SECOND, severity, draw)
    ringing = draw.chance(0.8 * severity)
    kernel = sinc_kernels(draw.uniform(math.pi / 3, math.pi), _KERNEL)
    resized_last = bool(draw.rand() < 0.5)
    if resized_last:
        degraded = _jpeg(degraded, _SECOND, severity, draw)
    degraded = F.interpolate(degraded, size, mode="bicubic").clamp(0, 1)
    degraded = _convolve(degraded, kernel, ringing, draw).clamp(0, 1)
    return degraded if resized_last else _jpeg(degraded, _SECOND, severity, draw)


def _round(
    image: Tensor, size: tuple[int, int], ranges: _Round, severity: Tensor, draw: Draw
) -> Tensor:
    """Blur, resize (relative to the photo's `size`) and noise."""
    blurred = draw.chance(ranges.blur_probability)
    image = _convolve(image, _kernel(draw, ranges, severity), blurred, draw)
    place = draw.rand()
    enlarge = bool(draw.rand() < 0.25)
    end = torch.tensor(ranges.scale[int(enlarge)]) ** severity
    factor = 1 + place * (end - 1)
    shared = [max(1, round(side * float(factor.max()))) for side in size]
    image = _resize(image, factor * size[0] / image.shape[-2], (shared[0], shared[1]), draw)
    return _noise(image, ranges, severity, draw)


def _convolve(image: Tensor, kernel: Tensor, chosen: Tensor, draw: Draw) -> Tensor:
    """Convolves the chosen samples, (B,) booleans on the host, each with its kernel."""
    place = chosen.nonzero()[:, 0]
    if not len(place):
        return image
    index = draw.send(place)
    return image.index_copy(0, index, convolve(image[index], draw.send(kernel[place])))


def _kernel(draw: Draw, ranges: _Round, severity: Tensor) -> Tensor:
    """A Gaussian, generalised or plateau kernel, round or long, or now and then a sinc filter."""
    low, high = ranges.sigma
    high = low + severity * (high - low)
    sigma_x, sigma_y = draw.uniform(low, high), draw.uniform(low, high)
    round_kernel = draw.chance(0.55)
    sigma_y = torch.where(round_kernel, sigma_x, sigma_y)
    shape = torch.where(draw.chance(0.7), 1.0, draw.uniform(0.5, 2.0))
    angle = draw.uniform(0, math.pi)
    sinc = sinc_kernels(draw.uniform(math.pi * (1 - 2 / 3 * severity), math.pi), _KERNEL)
    gauss = gaussian_kernels(sigma_x, sigma_y, angle, shape, _KERNEL)
    return torch.where(draw.chance(_SINC_SHARE)[:, None, None], sinc, gauss)


def _resize(image: Tensor, factor: Tensor, size: tuple[int, int], draw: Draw) -> Tensor:
    """By area (here: bilinear with antialias), bilinear or bicubic, the last two with aliasing."""
    mode = draw.choice(1, 1, 1)
    return rescale(image, factor, size, draw, mode == 2, mode == 0).clamp(0, 1)


def _noise(image: Tensor, ranges: _Round, severity: Tensor, draw: Draw) -> Tensor:
    grey, photons = draw.per_sample(draw.chance(0.4)), draw.per_sample(draw.chance(0.5))

    def strength(low: float, high: float) -> Tensor:
        return draw.per_sample(draw.uniform(low, low + severity * (high - low)))

    # Variance `strength^2 * brightness / 255`, as a Poisson number of photons has.
    brightness = torch.where(grey, image.mean(1, keepdim=True), image)
    poisson = strength(*ranges.poisson) * brightness.sqrt() / 16
    sigma = torch.where(photons, poisson, strength(*ranges.noise) / 255)
    white = draw.noise(*image.shape)
    return (image + sigma * torch.where(grey, white[:, :1], white)).clamp(0, 1)


def _jpeg(image: Tensor, ranges: _Round, severity: Tensor, draw: Draw) -> Tensor:
    low, high = ranges.quality
    quality = draw.uniform(high + severity * (low - high), high)
    return compress_jpeg(image, quality, torch.ones(draw.batch).bool())
