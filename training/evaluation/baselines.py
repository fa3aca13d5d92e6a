"""Restoration without a trained network: classical methods that are told the kind of damage.

Every baseline is a pure function of one photo, (H, W, 3) float32 in [0, 1], to the same. They know
the kind, never its severity, the clean photo or the noise level: what they need they estimate.
Nothing here imports torch, so that worker processes start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import color, exposure, restoration

from . import smoothing
from .smoothing import (
    Pixels,
    gaussian,
    guided,
    guided_by,
    luma,
    median,
    nl_means,
    per_channel,
    sliding_dct,
    total_variation,
)

Baseline = Callable[[Pixels], Pixels]

# Sharpening


def gaussian_psf(sigma: float) -> Pixels:
    """Normalised Gaussian kernel; sigma in pixels."""
    reach = int(3 * sigma + 0.5)
    axis = np.arange(-reach, reach + 1, dtype=np.float32)
    line = np.exp(-(axis**2) / (2 * sigma**2))
    return np.outer(line, line) / line.sum() ** 2


def disk_psf(radius: float) -> Pixels:
    """Normalised disk, the kernel of defocus; radius in pixels."""
    reach = int(radius + 1)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return disk / disk.sum()


def richardson_lucy(photo: Pixels, psf: Pixels, steps: int = 8) -> Pixels:
    """Richardson-Lucy with an assumed kernel, mirrored at the edges so that they ring less.

    Sources: Richardson (1972), Lucy (1974).
    """
    pad = min(24, *(side - 1 for side in photo.shape[:2]))
    padded = np.pad(photo, ((pad, pad), (pad, pad), (0, 0)), "reflect")

    def sharpen(channel: Pixels) -> Pixels:
        return restoration.richardson_lucy(channel, psf, steps, clip=False, filter_epsilon=1e-3)

    return per_channel(sharpen, padded)[pad:-pad, pad:-pad]


def unsharp(photo: Pixels, sigma: float = 2.0, amount: float = 0.5) -> Pixels:
    """Unsharp mask: adds what a Gaussian of `sigma` pixels takes away."""
    return photo + amount * (photo - gaussian(photo, sigma))


# Light and colour


def stretch(photo: Pixels, low: float = 0.5, high: float = 99.5) -> Pixels:
    """Spreads the range between two percentiles of each channel over [0, 1]."""
    darkest, lightest = np.percentile(photo, (low, high), axis=(0, 1))
    return ((photo - darkest) / (lightest - darkest).clip(1e-3)).astype(np.float32)


def stretch_and_denoise(photo: Pixels) -> Pixels:
    """`stretch`, then `sliding_dct`."""
    return sliding_dct(stretch(photo).clip(0, 1), least=0.02)


def equalize(photo: Pixels) -> Pixels:
    """Histogram equalisation of the HSV value."""
    hsv = color.rgb2hsv(photo)
    hsv[..., 2] = exposure.equalize_hist(hsv[..., 2])
    return color.hsv2rgb(hsv)


# Haze


def dark_channel(photo: Pixels, omega: float = 0.95, window: int = 11) -> Pixels:
    """Dark-channel prior. Source: He, Sun and Tang (2009), with a guided filter (2010)."""
    dark = ndimage.minimum_filter(photo.min(-1), window)
    haziest = dark >= np.quantile(dark, 0.999)
    air = photo[haziest].mean(0).clip(0.1, 1)
    veil = ndimage.minimum_filter((photo / air).min(-1), window)
    transmission = guided_by(luma(photo), 1 - omega * veil, 20, 1e-3).clip(0.1, 1)[..., None]
    return (photo - air) / transmission + air


# Rain, snow, drops


def opening(photo: Pixels, height: int, width: int) -> Pixels:
    """Morphological opening of each channel: takes away what is bright and smaller."""
    return ndimage.grey_opening(photo, (height, width, 1))


def darker_median(photo: Pixels, height: int, width: int) -> Pixels:
    """The median where it is darker than the photo: takes away bright spots and streaks only."""
    return np.minimum(photo, median(photo, height, width))


def inpaint_bright(photo: Pixels, window: int, threshold: float = 0.2) -> Pixels:
    """Fills bright spots smaller than `window` from around them.

    Source: normalised convolution, Knutsson and Westin (1993).
    """
    bright = luma(photo)
    spots = bright - ndimage.grey_opening(bright, (window, window)) > threshold
    known = 1 - ndimage.binary_dilation(spots).astype(np.float32)[..., None]
    filled = gaussian(photo * known, window / 2) / gaussian(known, window / 2).clip(1e-3)
    return known * photo + (1 - known) * filled


BASELINES: Mapping[str, Baseline] = {
    "sliding DCT": sliding_dct,
    "sliding DCT, strong": partial(sliding_dct, least=0.04),
    "guided filter": guided,
    "NL means": nl_means,
    "total variation": total_variation,
    "Richardson-Lucy, Gaussian kernel": partial(richardson_lucy, psf=gaussian_psf(1.5)),
    "Richardson-Lucy, disk kernel": partial(richardson_lucy, psf=disk_psf(3.0)),
    "unsharp mask": unsharp,
    "histogram stretch": stretch,
    "histogram stretch + sliding DCT": stretch_and_denoise,
    "histogram equalisation": equalize,
    "dark channel": dark_channel,
    "opening 1x5": partial(opening, height=1, width=5),
    "darker median 9": partial(darker_median, height=9, width=9),
    "bright spots inpainted": partial(inpaint_bright, window=9),
}
"""Every baseline under its name in the tables: those that won a row of the published tables."""

COMPETITORS: Mapping[str, tuple[str, ...]] = {
    "noise": ("sliding DCT", "guided filter"),
    "blur": ("Richardson-Lucy, Gaussian kernel", "unsharp mask"),
    "jpeg": ("total variation", "guided filter", "sliding DCT, strong"),
    "low_light": ("histogram stretch + sliding DCT", "histogram equalisation"),
    "haze": ("dark channel",),
    "rain": ("opening 1x5", "bright spots inpainted"),
    "snow": ("darker median 9",),
    "raindrop": ("guided filter", "NL means", "histogram stretch"),
    "low_res": ("Richardson-Lucy, disk kernel",),
}
"""Kind -> the baselines that compete for it; `clean` has none: who is told it leaves it alone."""


def sources() -> tuple[Path, Path]:
    """The files that hold all baselines: their scores are kept as long as these are the same."""
    return Path(__file__), Path(smoothing.__file__)


def apply(name: str, photo: Pixels) -> Pixels:
    """Applies the baseline `name` to a photo; the result is finite, float32 and in [0, 1]."""
    result = np.nan_to_num(BASELINES[name](photo), nan=0.0, posinf=1.0, neginf=0.0)
    return result.clip(0, 1).astype(np.float32)
