"""The contact sheet shows what training learns from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.photos import picture
from training.contact_sheet import SheetConfig, contact_sheet


def test_rows_are_kinds_and_columns_severities(tmp_path: Path) -> None:
    photo = picture("coffee").resize((90, 60))
    photo.save(tmp_path / "photo.png")
    config = SheetConfig(
        tmp_path / "photo.png", tmp_path / "sheet.png", ("clean", "haze+noise"), (0.2, 0.9)
    )
    drawn = np.asarray(contact_sheet(config)).astype(float)
    margin, bottom = (drawn.shape[1] - 2 * 90) // 3, len(drawn) // 2
    cells = [
        row[bottom - margin - 60 : bottom - margin, left : left + 90]
        for row in np.split(drawn, 2)
        for left in (margin, 90 + 2 * margin)
    ]
    errors = [np.abs(cell - np.asarray(photo)).mean() for cell in cells]
    assert errors[0] == errors[1] == 0
    assert 3 < errors[2] < errors[3]


def test_a_faulty_photo_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no photo")
    with pytest.raises(ValueError, match=r"--photo: .*bad\.png cannot be read"):
        contact_sheet(SheetConfig(tmp_path / "bad.png", tmp_path / "sheet.png"))
    Image.new("RGB", (30, 30)).save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=r"unknown \['fog'\]; known are noise"):
        contact_sheet(SheetConfig(tmp_path / "good.png", tmp_path / "sheet.png", ("rain+fog",)))
