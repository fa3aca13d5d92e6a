"""Blur kernels, one per sample: (B, K, K), each summing to one; made on the host."""

import math

import torch
from torch import Tensor

from .draw import Draw
from .filters import splat

_SIZE = 41
_PATH_POINTS = 96


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, device=device) - size // 2.0
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def _unit_sum(kernels: Tensor) -> Tensor:
    return kernels / kernels.sum((1, 2), keepdim=True)


def _bessel_j1(values: Tensor) -> Tensor:
    return torch.special.bessel_j1(values)  # pyright: ignore


def gaussian_kernels(
    sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, shape: Tensor | None = None, size: int = _SIZE
) -> Tensor:
    """Gaussian kernels, turned by `angle` (radians).

    Args:
        sigma_x, sigma_y, angle: (B,), pixels.
        shape: (B,); 1 is a Gaussian; smaller has a sharper peak, larger a flatter top
            (generalised Gaussian).
        size: side of the kernel, odd.
    """
    x, y = _grid(size, angle.device)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = (x * cos + y * sin) / sigma_x[:, None, None]
    across = (y * cos - x * sin) / sigma_y[:, None, None]
    squared = along**2 + across**2
    if shape is not None:
        squared = squared ** shape[:, None, None]
    return _unit_sum(torch.exp(-0.5 * squared))


def disk_kernels(radius: Tensor) -> Tensor:
    """Disks of defocus; radius (B,) in pixels."""
    x, y = _grid(_SIZE, radius.device)
    return _unit_sum((radius[:, None, None] + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1))


def sinc_kernels(cutoff: Tensor, size: int) -> Tensor:
    """Ideal circular low-pass filters, which ring; cutoff (B,) in radians per pixel, up to pi.

    Source: Wang et al., "Real-ESRGAN" (2021), equation 8.
    """
    x, y = _grid(size, cutoff.device)
    distance = (x**2 + y**2).sqrt().clamp(1e-3)
    frequency = cutoff[:, None, None]
    bessel = _bessel_j1(frequency * distance)
    return _unit_sum(frequency / (2 * math.pi * distance) * bessel)


def motion_kernels(draw: Draw, length: Tensor) -> Tensor:
    """The path of a shaking camera: a bent line with uneven speed; length (B,) in pixels."""
    steps = torch.linspace(-0.5, 0.5, _PATH_POINTS)[None]
    bend = draw.uniform(-2.0, 2.0)[:, None] * draw.chance(0.6)[:, None]
    angle = draw.uniform(0, math.pi)[:, None] + bend * steps
    speed = 1 + 0.6 * torch.sin(2 * math.pi * (steps + draw.rand(draw.batch, 1)))
    x = (angle.cos() * speed).cumsum(1) / _PATH_POINTS
    y = (angle.sin() * speed).cumsum(1) / _PATH_POINTS
    centre = _SIZE // 2
    x = (x - x.mean(1, keepdim=True)) * length[:, None] + centre
    y = (y - y.mean(1, keepdim=True)) * length[:, None] + centre
    return _unit_sum(splat(x, y, torch.ones_like(x), _SIZE, _SIZE)[:, 0])
