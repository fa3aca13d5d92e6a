"""Filters shared by the degradations: per-sample kernels, FFT convolution, splatting."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_FIXED_POINT = 2**16


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolves each image with its own kernel; edges are mirrored.

    Args:
        image: (B, C, H, W).
        kernel: (B, K, K), K odd, each summing to one.

    Returns:
        (B, C, H, W).
    """
    height, width = image.shape[-2:]
    size = kernel.shape[-1]
    pad = size // 2
    mode = "reflect" if min(height, width) > pad else "replicate"
    padded = F.pad(image, (pad, pad, pad, pad), mode=mode)
    # Round sizes are transformed faster, and few of them keep the plans of the FFT cached.
    shape = (-(-padded.shape[-2] // 32) * 32, -(-padded.shape[-1] // 32) * 32)
    spectrum = _to_spectrum(padded, shape) * _to_spectrum(kernel, shape)[:, None]
    window = (..., slice(size - 1, size - 1 + height), slice(size - 1, size - 1 + width))
    return _from_spectrum(spectrum, shape)[window]


def _to_spectrum(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(values, s=shape)  # pyright: ignore


def _from_spectrum(spectrum: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.fft.irfft2(spectrum, s=shape)  # pyright: ignore


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with one sigma (pixels) for the batch; edges are replicated.

    Adds shifted copies: a convolution is compiled anew for every size on a CPU, which costs more.
    """
    radius = max(1, round(3 * sigma))
    taps = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    for axis, pad in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        padded, length = F.pad(image, pad, mode="replicate"), image.shape[axis]
        image = torch.zeros_like(image)
        for start, tap in enumerate(taps):
            image.add_(padded.narrow(axis, start, length), alpha=tap / sum(taps))
    return image


def box_blur(image: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1) square that shrinks at the edges."""
    size = 2 * radius + 1
    return F.avg_pool2d(image, size, stride=1, padding=radius, count_include_pad=False)


def guided_filter(guide: Tensor, target: Tensor, radius: int, epsilon: float) -> Tensor:
    """Smooths `target` so that its edges follow those of `guide`; both (B, 1, H, W).

    Source: He, Sun, Tang, "Guided Image Filtering" (2010), equations 5, 6 and 8.
    """
    mean_guide = box_blur(guide, radius)
    mean_target = box_blur(target, radius)
    covariance = box_blur(guide * target, radius) - mean_guide * mean_target
    variance = box_blur(guide * guide, radius) - mean_guide * mean_guide
    slope = covariance / (variance + epsilon)
    offset = mean_target - slope * mean_guide
    return box_blur(slope, radius) * guide + box_blur(offset, radius)


def add_pixels(column: Tensor, row: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    """Adds values to the pixels of an empty picture.

    Sums in fixed point, so that the result does not depend on the order of the additions and is
    the same on every run on a GPU too.

    Args:
        column, row: (B, N) int64; places outside the picture are dropped.
        value: (B, N), below 2^14 in sum at any pixel.

    Returns:
        (B, 1, H, W).
    """
    canvas = torch.zeros(column.shape[0], height * width, dtype=torch.int32, device=value.device)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    canvas.scatter_add_(1, index, (value * inside * _FIXED_POINT).round().int())
    return canvas.view(-1, 1, height, width).float() / _FIXED_POINT


def splat(x: Tensor, y: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Adds weighted points (B, N) at fractional places to an empty picture, bilinearly."""
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    column, row = left.long(), top.long()
    upper, lower = weight * (1 - bottom_share), weight * bottom_share
    return add_pixels(
        torch.cat((column, column + 1, column, column + 1), 1),
        torch.cat((row, row, row + 1, row + 1), 1),
        torch.cat(
            (
                upper * (1 - right_share),
                upper * right_share,
                lower * (1 - right_share),
                lower * right_share,
            ),
            1,
        ),
        height,
        width,
    )
