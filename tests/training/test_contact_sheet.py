"""The contact sheet shows what training learns from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from training.contact_sheet import SheetConfig, contact_sheet


def test_rows_are_kinds_and_columns_severities(tmp_path: Path) -> None:
    photo = Image.fromarray(data.coffee()).resize((90, 60))
    photo.save(tmp_path / "photo.png")
    config = SheetConfig(
        tmp_path / "photo.png", tmp_path / "sheet.png", ("clean", "haze+noise"), (0.2, 0.9)
    )
    sheet = np.asarray(contact_sheet(config)).astype(float)
    left, header = sheet.shape[1] - 2 * 90, sheet.shape[0] // 2 - 60
    cells = [
        sheet[row + header : row + header + 60, column : column + 90]
        for row in (0, header + 60)
        for column in (left, left + 90)
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
