"""Draws kinds x severities of one photo, to see with one's own eyes what training learns from.

Run: python -m training.contact_sheet --photo photo.jpg --out sheet.png [--kinds rain haze+noise]
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diff_restorer.degradations import ALL_KINDS, degrade_chain
from diff_restorer.similarity import psnr
from tools import sheet

from .config import exit_after
from .evaluation.pictures import to_picture
from .photos import UNREADABLE, read_photo


@dataclass(frozen=True)
class SheetConfig:
    """Settings of the contact sheet."""

    photo: Path
    """Photo to degrade."""
    out: Path
    """PNG or JPEG file to write."""
    kinds: tuple[str, ...] = ALL_KINDS
    """Rows of the sheet; `haze+noise` is a chain of two."""
    severities: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Columns of the sheet."""
    side: int = 320
    """Long side of each picture, pixels."""
    seed: int = 0
    """Seed; every cell has its own random numbers."""


def contact_sheet(config: SheetConfig) -> Image.Image:
    """Returns the labelled sheet; each cell names its severity and its PSNR against the photo.

    Raises:
        ValueError: The photo cannot be read, or a kind is unknown.
    """
    try:
        photo = to_picture(read_photo(config.photo) / 255)
    except UNREADABLE as error:
        raise ValueError(f"--photo: {config.photo} cannot be read: {error}") from error
    photo.thumbnail((config.side, config.side), Image.Resampling.LANCZOS)
    image = pil_to_tensor(photo)[None].float() / 255
    rows = []
    for row, kind in enumerate(config.kinds):
        cells = []
        for column, severity in enumerate(config.severities):
            generator = torch.Generator().manual_seed(config.seed + 1000 * row + column)
            degraded = degrade_chain(kind.split("+"), image, severity, generator)
            distance = float(psnr(degraded, image))
            label = f"{severity:.2f}   " + (f"{distance:.1f} dB" if distance < 80 else "identical")
            cells.append((label, to_picture(degraded[0])))
        rows.append(sheet.row(kind.replace("+", " + "), cells))
    return sheet.stack(rows)


def main(config: SheetConfig) -> None:
    contact_sheet(config).save(config.out)


if __name__ == "__main__":
    exit_after(lambda: main(tyro.cli(SheetConfig, description=__doc__)))
