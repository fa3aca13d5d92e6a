"""The measure of legibility, on text of known colours."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.browser.contrast import contrast_of


@pytest.mark.parametrize(
    ("ground", "text", "least", "most"),
    [
        ("#000000", "#ffffff", 15.0, 21.0),
        ("#777777", "#ffffff", 3.5, 4.5),  # 4.48 by the definition
        ("#8a7a20", "#9a9a9a", 1.0, 2.0),  # grey on mustard
    ],
)
def test_contrast_of_text(
    tmp_path: Path, ground: str, text: str, least: float, most: float
) -> None:
    picture = Image.new("RGB", (380, 130), ground)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(9)
    for row in range(8):
        draw.text(
            (6, 4 + 15 * row), "Choose a photo and run. The results are in output.", text, font
        )
    picture.save(tmp_path / "note.png")
    assert least <= contrast_of(tmp_path / "note.png") <= most
