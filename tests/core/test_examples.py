"""What `make serve` gives to try shows what each template is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tools import examples
from tools.photo import read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input")
    examples.write_examples(path, 256)
    return path


def test_the_large_page_needs_tiles_that_differ(folder: Path) -> None:
    """Two megapixels as served; only its left and its right are damaged, each in its own way."""
    width, height = examples.LARGE_SIDES
    assert 1.9e6 < width * height < 2.1e6
    with Image.open(folder / examples.LARGE) as opened:
        page = np.asarray(opened, np.float32)
    assert page.shape == (height // 2, width // 2, 3)
    third = page.shape[1] // 3
    photo = read(examples.sample_of("raindrop").photo).picture
    middle = ImageOps.fit(photo, (third, page.shape[0] // 2))
    assert np.array_equal(page[page.shape[0] // 2 :, third : 2 * third], np.asarray(middle))
    left, right = (
        np.abs(np.diff(each, axis=1)).mean() for each in (page[:, :third], page[:, -third:])
    )
    assert left > 2 * np.abs(np.diff(page[:, third : 2 * third], axis=1)).mean()
    assert left != pytest.approx(right, rel=0.1)


def test_frames_make_a_film(folder: Path) -> None:
    pictures = [Image.open(path) for path in sorted((folder / examples.FRAMES).iterdir())]
    assert len(pictures) == examples.FRAME_COUNT
    (size,) = {picture.size for picture in pictures}
    assert [side % 2 for side in size] == [0, 0]
    assert len({picture.tobytes() for picture in pictures}) == examples.FRAME_COUNT


def test_examples_stay_as_the_user_left_them(folder: Path) -> None:
    names = ("example.png", examples.LARGE, f"{examples.FRAMES}/00.png")
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    examples.write_examples(folder, 256)
    for name in names:
        with Image.open(folder / name) as kept:
            assert kept.size == (8, 8)
