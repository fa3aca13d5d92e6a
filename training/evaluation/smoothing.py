"""Classical filters that smooth, and what all classical methods share.

Every filter is a pure function of one photo, (H, W, 3) float32 in [0, 1], to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage import restoration

Pixels = NDArray[np.floating[Any]]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def luma(photo: Pixels) -> Pixels:
    """Brightness (H, W), as BT.601 weighs the channels."""
    return photo @ LUMA


def per_channel(function: Callable[[Any], Any], photo: Pixels) -> Pixels:
    """The function of (H, W) on each channel."""
    return np.stack([function(photo[..., channel]) for channel in range(3)], axis=-1)


def to_8_bit(photo: Pixels) -> NDArray[np.uint8]:
    """Levels 0 to 255."""
    return (photo * 255).round().clip(0, 255).astype(np.uint8)


def noise_sigma(photo: Pixels) -> float:
    """Standard deviation of white noise: median of the diagonal Haar details.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage" (1994).
    """
    even = photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2]
    details = (even[::2, ::2] - even[1::2, ::2] - even[::2, 1::2] + even[1::2, 1::2]) / 2
    return float(np.median(np.abs(details)) / 0.6745)


def gaussian(photo: Pixels, sigma: float) -> Pixels:
    """Gaussian filter; sigma in pixels."""
    return ndimage.gaussian_filter(photo, (sigma, sigma, 0))


def median(photo: Pixels, height: int, width: int) -> Pixels:
    """Median of each channel over a window of height x width pixels."""
    return ndimage.median_filter(photo, (height, width, 1))


def guided(photo: Pixels, radius: int = 3, least: float = 1e-3) -> Pixels:
    """Guided filter of the photo by itself, with the noise's variance as its threshold.

    Source: He, Sun and Tang, "Guided image filtering" (2010).
    """
    return guided_by(luma(photo), photo, radius, max(least, noise_sigma(photo) ** 2))


def guided_by(guide: Pixels, source: Pixels, radius: int, epsilon: float) -> Pixels:
    def box(values: Pixels) -> Pixels:
        return ndimage.uniform_filter(values, 2 * radius + 1, axes=(0, 1))

    guide = guide.reshape(*guide.shape[:2], *(1,) * (source.ndim - 2))
    mean_guide, mean_source = box(guide), box(source)
    slope = box(guide * source) - mean_guide * mean_source
    slope = slope / (box(guide * guide) - mean_guide**2 + epsilon)
    return box(slope) * guide + box(mean_source - slope * mean_guide)


def nl_means(photo: Pixels, least: float = 0.02) -> Pixels:
    """Non-local means. Source: Buades, Coll and Morel (2005), as in scikit-image (fast mode)."""
    sigma = max(least, noise_sigma(photo))
    return restoration.denoise_nl_means(
        photo, patch_size=5, patch_distance=5, h=0.6 * sigma, sigma=sigma, channel_axis=-1
    )


def total_variation(photo: Pixels, strength: float = 1.0, least: float = 0.03) -> Pixels:
    """Total variation. Source: Chambolle (2004), as in scikit-image."""
    weight = max(least, strength * noise_sigma(photo))
    return restoration.denoise_tv_chambolle(photo, weight, max_num_iter=60, channel_axis=-1)


def sliding_dct(photo: Pixels, least: float = 0.01, block: int = 16, stride: int = 4) -> Pixels:
    """Thresholds overlapping blocks in the DCT domain (rows, columns, colours), then Wiener.

    Sources: Yu and Sapiro, "DCT image denoising" (2011); the second, empirical Wiener step with
    the first result as its oracle is that of Dabov et al., "BM3D" (2007), without its grouping.
    """
    sigma = max(least, noise_sigma(photo))
    edge = ((block, 2 * block), (block, 2 * block), (0, 0))
    noisy = np.pad(photo, edge, "reflect")
    estimate = _shrink_blocks(noisy, None, sigma, block, stride)
    estimate = _shrink_blocks(noisy, estimate, sigma, block, stride)
    return estimate[block : block + photo.shape[0], block : block + photo.shape[1]]


def _shrink_blocks(
    noisy: Pixels, oracle: Pixels | None, sigma: float, block: int, stride: int
) -> Pixels:
    total, weight = np.zeros_like(noisy), np.zeros_like(noisy)
    rows, columns = ((side - block) // block for side in noisy.shape[:2])

    def blocks(image: Pixels, top: int, left: int) -> Pixels:
        window = image[top : top + rows * block, left : left + columns * block]
        return window.reshape(rows, block, columns, block, 3)

    def transform(image: Pixels) -> Pixels:
        return np.asarray(fft.dctn(image, axes=(1, 3, 4), norm="ortho"))

    for top in range(0, block, stride):
        for left in range(0, block, stride):
            spectrum = transform(blocks(noisy, top, left))
            if oracle is None:
                gain = (np.abs(spectrum) > 2.7 * sigma).astype(np.float32)
            else:
                power = transform(blocks(oracle, top, left)) ** 2
                gain = power / (power + sigma**2)
            gain[:, :1, :, :1, :1] = 1
            trust = 1 / np.square(gain).sum((1, 3, 4), keepdims=True)
            mended = fft.idctn(gain * spectrum, axes=(1, 3, 4), norm="ortho")
            blocks(total, top, left)[:] += trust * mended
            blocks(weight, top, left)[:] += trust
    return total / weight.clip(1e-12)
