"""Distances between pictures, and pictures of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MISSING = -1.0
"""In place of an LPIPS that cannot be computed here."""
_ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
_MOST_PIXELS = 4e6
"""For LPIPS, as its features are large."""
_AMPLIFICATION = 4
_LABELS = {"lq": "degraded", "image": "restored", "reference": "clean"}
_HEIGHT = 512


def lpips(image: Tensor, reference: Tensor) -> float | None:
    """LPIPS on AlexNet (arXiv 1801.03924), as `training.evaluate` has it; None without the package
    `lpips` or AlexNet's weights.

    Nothing is downloaded: the weights are those of torchvision in the torch hub's cache. None, too,
    for pictures of less than 32 px, and for those whose features would not fit into memory.
    """
    height, width = image.shape[-2:]
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET_FILE
    if min(height, width) < 32:
        return None
    if not weights.is_file():
        logging.info("Measure Restoration: no LPIPS, %s is missing.", weights)
        return None
    if height * width > _MOST_PIXELS:
        logging.info("Measure Restoration: no LPIPS, %d x %d px are too large.", width, height)
        return None
    try:
        network = _lpips()
    except ImportError:
        logging.info("Measure Restoration: no LPIPS, the package lpips is not installed.")
        return None
    with torch.inference_mode():
        return float(network(image * 2 - 1, reference * 2 - 1))


@cache
def _lpips() -> Any:
    import lpips as package

    return package.LPIPS(net="alex", verbose=False).eval()


def side_by_side(photos: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Tensor:
    """Degraded (if there is one), restored and clean, (H, W, 3) in [0, 1], with their PSNR."""
    cells = []
    for name in ("lq", "image", "reference"):
        if name in photos:
            key = {"lq": "psnr_lq", "image": "psnr"}.get(name, "")
            value = figures.get(key)
            cells.append(_cell(photos[name], _LABELS[name], value))
    return torch.cat(cells, dim=1)


def difference_picture(photos: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Tensor:
    """The absolute difference of restored and clean, amplified, (H, W, 3) in [0, 1]."""
    difference = (photos["image"] - photos["reference"]).abs() * _AMPLIFICATION
    return _cell(difference, f"difference x {_AMPLIFICATION}", figures.get("psnr"))


def _cell(photo: Tensor, label: str, value: float | None) -> Tensor:
    pixels = (photo[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    picture = Image.fromarray(pixels)
    scale = _HEIGHT / picture.height
    if scale < 1:
        picture = picture.resize((max(1, round(picture.width * scale)), _HEIGHT))
    text = label if value is None else f"{label}  {value:.2f} dB"
    size = max(9, min(18, picture.width // 14))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    draw.text((4, 3), text, "white", font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
