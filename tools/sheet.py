"""Labelled side-by-side pictures for the demo."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 12
BACKGROUND = "white"
INK = "#202020"
MUTED = "#606060"

Cell = tuple[str, Image.Image]


def row(title: str, cells: Sequence[Cell]) -> Image.Image:
    """Draws pictures of one size next to each other, a title above all and a label above each."""
    width, height = cells[0][1].size
    large, small = ImageFont.load_default(22), ImageFont.load_default(17)
    top = MARGIN + 30 + 26
    sheet = Image.new(
        "RGB", (MARGIN + len(cells) * (width + MARGIN), top + height + MARGIN), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 2), title, fill=INK, font=large)
    for index, (label, picture) in enumerate(cells):
        left = MARGIN + index * (width + MARGIN)
        draw.text((left, MARGIN + 29), label, fill=MUTED, font=small)
        sheet.paste(picture, (left, top))
    return sheet


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Puts rows below each other."""
    width = max(picture.width for picture in rows)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in rows)), BACKGROUND)
    top = 0
    for picture in rows:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
