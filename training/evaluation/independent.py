"""Degradations that others wrote, for judging only: nothing here is ever used in training.

Two optional packages, each used where it is installed: `albumentations` (MIT) and
`imagecorruptions` (Apache-2.0; Michaelis et al., arXiv 1907.07484, after Hendrycks and Dietterich,
arXiv 1807.01697), whose `gaussian_blur` does not run with today's scikit-image and whose
`motion_blur` moves the photo: these two are not used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import seeded
from .pictures import digest, file_digest
from .testsets import MissingPackageError, Recipe

Package = Literal["albumentations", "imagecorruptions"]
Levels = NDArray[np.uint8]
"""(H, W, 3), 0 to 255."""
_SMALLEST = 32


@dataclass(frozen=True)
class Corruption:
    """One degradation of a package."""

    package: Package
    steps: Mapping[str, Mapping[str, Any]]
    """Name in the package -> settings; from ranges the package draws by itself."""


def _a(**steps: Mapping[str, Any]) -> Corruption:
    return Corruption("albumentations", steps)


def _i(name: str, *severities: int) -> tuple[Corruption, ...]:
    return tuple(
        Corruption("imagecorruptions", {name: {"severity": level}}) for level in severities
    )


CORRUPTIONS: Mapping[str, tuple[Corruption, ...]] = {
    "noise": (
        _a(GaussNoise={"std_range": (0.06, 0.2)}),
        _a(ShotNoise={"scale_range": (0.02, 0.1)}),
        _a(ISONoise={"color_shift": (0.01, 0.05), "intensity": (0.3, 0.8)}),
        *_i("gaussian_noise", 1, 2),
        *_i("shot_noise", 1, 2),
    ),
    "blur": (
        _a(Defocus={"radius": (2, 4)}),
        _a(GaussianBlur={"blur_limit": 0, "sigma_limit": (1.0, 2.5)}),
        _a(MotionBlur={"blur_limit": (7, 17), "allow_shifted": False, "direction_range": (0, 0)}),
        *_i("defocus_blur", 1),
    ),
    "jpeg": (
        _a(ImageCompression={"quality_range": (8, 40)}),
        *_i("jpeg_compression", 1, 3, 5),
    ),
    "low_light": (
        _a(
            RandomGamma={"gamma_limit": (130, 180)},
            RandomBrightnessContrast={"brightness_limit": (0, 0), "contrast_limit": (-0.7, -0.4)},
            ISONoise={"color_shift": (0.01, 0.03), "intensity": (0.02, 0.1)},
        ),
        _a(
            RandomBrightnessContrast={"brightness_limit": (0, 0), "contrast_limit": (-0.85, -0.7)},
            ShotNoise={"scale_range": (0.001, 0.004)},
        ),
    ),
    "haze": (
        _a(RandomFog={"alpha_coef": 0.08, "fog_coef_range": (0.3, 0.7)}),
        *_i("fog", 1, 2),
    ),
    "rain": (
        _a(RandomRain={}),
        _a(RandomRain={"rain_type": "drizzle", "blur_value": 3, "brightness_coefficient": 0.9}),
    ),
    "snow": (_a(RandomSnow={"method": "texture"}), *_i("snow", 1, 2)),
    "raindrop": (
        _a(Spatter={"mode": "rain"}),
        _a(Spatter={"mode": "rain", "intensity": (0.3, 0.6)}),
        *_i("spatter", 2, 3),
    ),
}  # fmt: skip
"""Our kind -> what others take for it; a photo gets one, drawn by seed, kind and name."""


def open_package(package: Package) -> Any:
    """Imports an optional package; raises MissingPackageError where it is not installed, or does
    not run here."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for newer versions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        reason = f"not available: {error}; pip install {package}"
        raise MissingPackageError(package, reason) from error


def apply(corruption: Corruption, photo: Levels, seed: int) -> Levels:
    """Degrades a photo (H, W, 3), sides of 32 px and more; a function of the arguments and the
    package's version.

    Raises MissingPackageError where that is not installed, and ValueError for a smaller photo.
    """
    if min(photo.shape[:2]) < _SMALLEST:
        size = f"{photo.shape[1]} x {photo.shape[0]}"
        raise ValueError(f"others' degradations need {_SMALLEST} px on each side, found {size}")
    package = open_package(corruption.package)
    if corruption.package == "albumentations":
        parts = [getattr(package, name)(**more, p=1) for name, more in corruption.steps.items()]
        return package.Compose(parts, seed=seed)(image=photo)["image"]
    before = np.random.get_state()  # it draws from NumPy's global generator
    np.random.seed(seed)
    numpy: Any = np
    if renamed := not hasattr(np, "float_"):
        numpy.float_ = np.float64  # the name of NumPy 1, which `fog` asks for
    try:
        for name, settings in corruption.steps.items():
            photo = package.corrupt(photo, corruption_name=name, **settings)
    finally:
        np.random.set_state(before)
        if renamed:
            del numpy.float_
    return photo


def draw(kind: str, name: str, seed: int) -> tuple[Corruption, int]:
    """The corruption that a photo gets, and its seed: a function of the arguments."""
    generator = seeded(seed, zlib.crc32(f"independent/{kind}".encode()), zlib.crc32(name.encode()))
    corruption, own_seed = torch.randint(2**31, (2,), generator=generator).tolist()
    return CORRUPTIONS[kind][corruption % len(CORRUPTIONS[kind])], own_seed


def degrade_as_others(kind: str, image: Tensor, name: str, seed: int) -> tuple[Tensor, None]:
    """Degrades (1, 3, H, W) in [0, 1] by one of `CORRUPTIONS[kind]`, without a severity."""
    photo = (image[0].permute(1, 2, 0) * 255).round().byte().contiguous().numpy()
    corruption, own_seed = draw(kind, name, seed)
    degraded = apply(corruption, photo, own_seed)
    return torch.from_numpy(degraded.copy()).permute(2, 0, 1)[None].float() / 255, None


def versions() -> dict[str, str | None]:
    """Package -> installed version, None where it is not."""
    known: dict[str, str | None] = {}
    for package in ("albumentations", "imagecorruptions"):
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = None
    return known


def recipes() -> list[Recipe]:
    """One test set for each kind."""
    code = digest(file_digest(Path(__file__)), str(versions()))
    return [
        Recipe(f"independent/{kind}", kind, partial(degrade_as_others, kind), code)
        for kind in CORRUPTIONS
    ]
