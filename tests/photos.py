"""Photos that come with scikit-image, as the tests take them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from skimage import data
from torch import Tensor


def picture(name: str) -> Image.Image:
    """Such as `astronaut`."""
    return Image.fromarray(getattr(data, name)())


def photo(name: str) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255


def seeded(seed: int = 0) -> torch.Generator:
    """By which a degradation is repeated."""
    return torch.Generator().manual_seed(seed)


def write(folder: Path, names: tuple[str, ...], size: tuple[int, int]) -> Path:
    """PNG files of that width and height in a folder, which is returned."""
    folder.mkdir(exist_ok=True)
    for name in names:
        picture(name).resize(size).save(folder / f"{name}.png")
    return folder
