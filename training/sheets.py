"""Side-by-side validation pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

CAPTION_HEIGHT = 14


def save_sheet(path: Path, columns: dict[str, Tensor], captions: Sequence[str] = ()) -> None:
    """Draw one row per sample and one named column per tensor.

    Args:
        path: PNG or JPEG file to write.
        columns: Name -> (B, 3, H, W) in [0, 1]; values outside are clamped.
        captions: One text per row, drawn at its left edge.
    """
    names = list(columns)
    rows = torch.cat([columns[name].detach().float().cpu().clamp(0, 1) for name in names], dim=3)
    count, _, height, width = rows.shape
    sheet = Image.new("RGB", (width, CAPTION_HEIGHT + count * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(names):
        draw.text((index * width // len(names) + 4, 1), name, fill="black")
    for row in range(count):
        pixels = (rows[row] * 255).round().byte().permute(1, 2, 0).numpy()
        top = CAPTION_HEIGHT + row * height
        sheet.paste(Image.fromarray(pixels), (0, top))
        if row < len(captions):
            draw.text(
                (4, top + 2), captions[row], fill="yellow", stroke_width=1, stroke_fill="black"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=92)
