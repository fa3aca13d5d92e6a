"""Restoration without a trained network: classical methods that are told the kind of damage.

Every baseline is a pure function of one photo, (H, W, 3) float32 in [0, 1], to the same. They know
the kind, never its severity, the clean photo or the noise level: what they need they estimate.
Nothing here imports torch, so that worker processes start at once.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import color, exposure, restoration

from . import smoothing
from .smoothing import (
    Photo,
    bicubic_down_up,
    bilateral,
    gaussian,
    guided,
    guided_by,
    local_wiener,
    luma,
    median,
    nl_means,
    per_channel,
    sliding_dct,
    to_8_bit,
    total_variation,
)

Baseline = Callable[[Photo], Photo]

# Sharpening


def _gaussian_psf(sigma: float) -> Photo:
    reach = int(3 * sigma + 0.5)
    axis = np.arange(-reach, reach + 1, dtype=np.float32)
    line = np.exp(-(axis**2) / (2 * sigma**2))
    return np.outer(line, line) / line.sum() ** 2


def _disk_psf(radius: float) -> Photo:
    reach = int(radius + 1)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return disk / disk.sum()


def _deconvolve(photo: Photo, psf: Photo, function: Callable[[Photo, Photo], Any]) -> Photo:
    """Applies a deconvolution per channel, with mirrored edges so that the border rings less."""
    pad = min(24, *(side - 1 for side in photo.shape[:2]))
    padded = np.pad(photo, ((pad, pad), (pad, pad), (0, 0)), "reflect")
    sharp = per_channel(lambda channel: function(channel, psf), padded)
    return sharp[pad:-pad, pad:-pad]


def wiener(photo: Photo, psf: Photo, balance: float = 0.1) -> Photo:
    """Wiener deconvolution with an assumed kernel. Source: Orieux et al. (2010), scikit-image."""
    return _deconvolve(
        photo, psf, lambda channel, kernel: restoration.wiener(channel, kernel, balance, clip=False)
    )


def richardson_lucy(photo: Photo, psf: Photo, steps: int = 8) -> Photo:
    """Richardson-Lucy with an assumed kernel. Sources: Richardson (1972), Lucy (1974)."""
    return _deconvolve(
        photo,
        psf,
        lambda channel, kernel: restoration.richardson_lucy(
            channel, kernel, steps, clip=False, filter_epsilon=1e-3
        ),
    )


def unsharp(photo: Photo, sigma: float = 2.0, amount: float = 0.5) -> Photo:
    """Unsharp mask: adds what a Gaussian of `sigma` pixels takes away."""
    return photo + amount * (photo - gaussian(photo, sigma))


# JPEG


def respin_jpeg(photo: Photo, quality: int = 10) -> Photo:
    """Averages the photo compressed again at shifted block grids.

    Source: Nosratinia, "Denoising of JPEG images by re-application of JPEG" (2001).
    """
    height, width = photo.shape[:2]
    padded = np.pad(photo, ((8, 8), (8, 8), (0, 0)), "reflect")
    total = np.zeros_like(photo)
    shifts = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
    for y, x in shifts:
        with io.BytesIO() as stream:
            Image.fromarray(to_8_bit(padded[y:, x:])).save(stream, "JPEG", quality=quality)
            again = np.asarray(Image.open(stream), np.float32) / 255
        total += again[8 - y : 8 - y + height, 8 - x : 8 - x + width]
    return total / len(shifts)


# Light and colour


def auto_gamma(photo: Photo, mean: float = 0.42) -> Photo:
    """The gamma curve that brings the mean luma near `mean`."""
    found = float(luma(photo).mean().clip(1e-3, 1 - 1e-3))
    return photo ** np.float32(np.log(mean) / np.log(found))


def auto_exposure(photo: Photo, mean: float = 0.2) -> Photo:
    """Gain in linear light that brings its mean to `mean`, and a grey-world white balance.

    Source: Buchsbaum, "A spatial processor model for object colour perception" (1980).
    """
    linear = photo**2.2
    gain = mean / linear.mean((0, 1)).clip(1e-5)
    return (linear * gain).clip(0, 1) ** np.float32(1 / 2.2)


def stretch(photo: Photo, low: float = 0.5, high: float = 99.5) -> Photo:
    """Spreads the range between two percentiles of each channel over [0, 1]."""
    darkest, lightest = np.percentile(photo, (low, high), axis=(0, 1))
    return ((photo - darkest) / (lightest - darkest).clip(1e-3)).astype(np.float32)


def stretch_and_denoise(photo: Photo) -> Photo:
    """`stretch`, then `sliding_dct`."""
    return sliding_dct(stretch(photo).clip(0, 1), least=0.02)


def equalize(photo: Photo) -> Photo:
    """Histogram equalisation of the HSV value."""
    return _on_value(photo, exposure.equalize_hist)


def clahe(photo: Photo) -> Photo:
    """Contrast-limited adaptive equalisation. Source: Zuiderveld (1994), as in scikit-image."""
    return _on_value(photo, partial(exposure.equalize_adapthist, clip_limit=0.01))


def _on_value(photo: Photo, function: Callable[[Any], Any]) -> Photo:
    hsv = color.rgb2hsv(photo)
    hsv[..., 2] = function(hsv[..., 2])
    return color.hsv2rgb(hsv)


def lime(photo: Photo) -> Photo:
    """Divides by the illumination: the brightest channel, smoothed along edges.

    Source: Guo, Li and Ling, "LIME" (2017), with a guided filter as its solver.
    """
    brightest = photo.max(-1)
    light = guided_by(brightest, brightest, 12, 1e-3).clip(0.01, 1) ** np.float32(0.8)
    return photo / light[..., None]


def retinex(photo: Photo) -> Photo:
    """Multi-scale retinex, stretched. Source: Jobson, Rahman and Woodell (1997)."""
    logs = np.log(photo + 0.01)
    scales = [np.log(gaussian(photo, sigma) + 0.01) for sigma in (8.0, 32.0, 80.0)]
    return stretch(logs - sum(scales) / len(scales), 1, 99)


# Haze


def dark_channel(photo: Photo, omega: float = 0.95, window: int = 11) -> Photo:
    """Dark-channel prior. Source: He, Sun and Tang (2009), with a guided filter (2010)."""
    dark = ndimage.minimum_filter(photo.min(-1), window)
    haziest = dark >= np.quantile(dark, 0.999)
    air = photo[haziest].mean(0).clip(0.1, 1)
    veil = ndimage.minimum_filter((photo / air).min(-1), window)
    transmission = guided_by(luma(photo), 1 - omega * veil, 20, 1e-3).clip(0.1, 1)[..., None]
    return (photo - air) / transmission + air


def color_attenuation(photo: Photo) -> Photo:
    """Colour attenuation prior. Source: Zhu, Mai and Shao (2015), with their fitted weights."""
    hsv = color.rgb2hsv(photo).astype(np.float32)
    depth = 0.121779 + 0.959710 * hsv[..., 2] - 0.780245 * hsv[..., 1]
    depth = ndimage.minimum_filter(depth, 11)
    depth = guided_by(luma(photo), depth, 20, 1e-3)
    air = photo[depth >= np.quantile(depth, 0.999)].mean(0)
    return (photo - air) / np.exp(-depth).clip(0.1, 0.9)[..., None] + air


# Rain, snow, drops


def opening(photo: Photo, height: int, width: int) -> Photo:
    """Morphological opening of each channel: takes away what is bright and smaller."""
    return ndimage.grey_opening(photo, (height, width, 1))


def darker_median(photo: Photo, height: int, width: int) -> Photo:
    """The median where it is darker than the photo: takes away bright spots and streaks only."""
    return np.minimum(photo, median(photo, height, width))


def inpaint_bright(photo: Photo, window: int, threshold: float = 0.2) -> Photo:
    """Fills bright spots smaller than `window` from around them.

    Source: normalised convolution, Knutsson and Westin (1993).
    """
    bright = luma(photo)
    spots = bright - ndimage.grey_opening(bright, (window, window)) > threshold
    known = 1 - ndimage.binary_dilation(spots).astype(np.float32)[..., None]
    filled = gaussian(photo * known, window / 2) / gaussian(known, window / 2).clip(1e-3)
    return known * photo + (1 - known) * filled


BASELINES: Mapping[str, Baseline] = {
    "bicubic x1/2": bicubic_down_up,
    "Gaussian 1 px": partial(gaussian, sigma=1.0),
    "median 3": partial(median, height=3, width=3),
    "median 5": partial(median, height=5, width=5),
    "median 1x7": partial(median, height=1, width=7),
    "bilateral": bilateral,
    "guided filter": guided,
    "NL means": nl_means,
    "total variation": total_variation,
    "local Wiener": local_wiener,
    "sliding DCT": sliding_dct,
    "sliding DCT, strong": partial(sliding_dct, least=0.04),
    "Wiener, Gaussian kernel": partial(wiener, psf=_gaussian_psf(1.5)),
    "Wiener, disk kernel": partial(wiener, psf=_disk_psf(3.0)),
    "Richardson-Lucy, Gaussian kernel": partial(richardson_lucy, psf=_gaussian_psf(1.5)),
    "Richardson-Lucy, disk kernel": partial(richardson_lucy, psf=_disk_psf(3.0)),
    "unsharp mask": unsharp,
    "JPEG re-applied": respin_jpeg,
    "auto gamma": auto_gamma,
    "auto exposure + grey world": auto_exposure,
    "histogram stretch": stretch,
    "histogram stretch + sliding DCT": stretch_and_denoise,
    "histogram equalisation": equalize,
    "CLAHE": clahe,
    "LIME": lime,
    "retinex": retinex,
    "dark channel": dark_channel,
    "dark channel, half": partial(dark_channel, omega=0.6),
    "colour attenuation": color_attenuation,
    "opening 5": partial(opening, height=5, width=5),
    "opening 1x5": partial(opening, height=1, width=5),
    "darker median 1x7": partial(darker_median, height=1, width=7),
    "darker median 9": partial(darker_median, height=9, width=9),
    "bright spots inpainted": partial(inpaint_bright, window=9),
    "large bright spots inpainted": partial(inpaint_bright, window=25),
}
"""Every baseline under its name in the tables."""

_DEBLUR = (
    "Wiener, Gaussian kernel", "Wiener, disk kernel", "Richardson-Lucy, Gaussian kernel",
    "Richardson-Lucy, disk kernel", "unsharp mask",
)  # fmt: skip
COMPETITORS: Mapping[str, tuple[str, ...]] = {
    "noise": (
        "bicubic x1/2", "Gaussian 1 px", "median 5", "bilateral", "guided filter", "NL means",
        "total variation", "local Wiener", "sliding DCT",
    ),
    "blur": _DEBLUR,
    "jpeg": (
        "bicubic x1/2", "Gaussian 1 px", "bilateral", "guided filter", "NL means",
        "total variation", "sliding DCT", "sliding DCT, strong", "JPEG re-applied",
    ),
    "low_light": (
        "auto gamma", "auto exposure + grey world", "histogram stretch",
        "histogram stretch + sliding DCT", "histogram equalisation", "CLAHE", "LIME", "retinex",
    ),
    "haze": (
        "dark channel", "dark channel, half", "colour attenuation", "histogram stretch",
        "histogram equalisation", "CLAHE", "auto exposure + grey world", "retinex",
    ),
    "rain": (
        "median 3", "median 1x7", "darker median 1x7", "opening 1x5", "bilateral", "guided filter",
        "NL means", "total variation", "bright spots inpainted", "histogram stretch",
    ),
    "snow": (
        "median 5", "darker median 9", "opening 5", "bilateral", "guided filter", "NL means",
        "total variation", "bright spots inpainted", "large bright spots inpainted",
        "histogram stretch",
    ),
    "raindrop": (
        "median 5", "bicubic x1/2", "guided filter", "NL means", "total variation",
        "darker median 9", "bright spots inpainted", "large bright spots inpainted",
        "histogram stretch",
    ),
    "low_res": (*_DEBLUR, "sliding DCT"),
}  # fmt: skip
"""Kind -> the baselines that compete for it; `clean` has none: who is told it leaves it alone."""


def sources() -> tuple[Path, Path]:
    """The files that hold all baselines: their scores are kept as long as these are the same."""
    return Path(__file__), Path(smoothing.__file__)


def restore(name: str, photo: Photo) -> Photo:
    """Applies the baseline `name` to a photo; the result is finite, float32 and in [0, 1]."""
    result = np.nan_to_num(BASELINES[name](photo), nan=0.0, posinf=1.0, neginf=0.0)
    return result.clip(0, 1).astype(np.float32)
