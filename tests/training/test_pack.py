"""Packs: the best photos first, as they are, in a file that training reads or refuses."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

from tests.photos import picture
from training.pack import Config, jpeg_quality, main, sharpness
from training.photos import CleanPhotos, list_photos


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return picture("astronaut")


@pytest.fixture
def folder(photo: Image.Image, tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    made.mkdir()
    photo.save(made / "a_good.jpg", quality=95)
    photo.save(made / "b_lossless.png")
    photo.save(made / "c_coarse.jpg", quality=70)
    photo.filter(ImageFilter.GaussianBlur(2)).save(made / "d_soft.jpg", quality=95)
    photo.resize((150, 150)).save(made / "e_small.png")
    (made / "f_broken.jpg").write_bytes(b"\xff\xd8 no photo")
    return made


def members(pack: Path) -> dict[str, bytes]:
    with tarfile.open(pack) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # pyright: ignore


def test_good_photos_come_first_and_as_they_are(folder: Path, tmp_path: Path) -> None:
    pack = main(Config((folder,), out=tmp_path / "photos.pack"))
    assert members(pack) == {
        "00000.png": (folder / "b_lossless.png").read_bytes(),
        "00001.jpg": (folder / "a_good.jpg").read_bytes(),
        "00002.jpg": (folder / "d_soft.jpg").read_bytes(),
    }
    photos = CleanPhotos(pack)
    assert len(photos) == 3
    assert torch.equal(photos[0], torch.from_numpy(data.astronaut()).permute(2, 0, 1))


def test_a_pack_is_no_larger_than_asked_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    png = (folder / "b_lossless.png").stat().st_size
    room = (png + 20_000) / 2**20  # no room for the good JPEG beside it
    first = main(Config((folder,), room, tmp_path / "a.pack"))
    assert first.stat().st_size <= room * 2**20
    assert list(members(first)) == ["00000.png"]
    second = main(Config((folder,), room, tmp_path / "b.pack"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ValueError, match=r"of 6 photos 3 are good enough .* none fits into"):
        main(Config((folder,), 0.01, tmp_path / "c.pack"))
    assert not (tmp_path / "c.pack").exists()


def test_large_photos_are_reduced_and_lose_their_blocks(photo: Image.Image, tmp_path: Path) -> None:
    photo.resize((1800, 1800), Image.Resampling.LANCZOS).save(tmp_path / "large.jpg", quality=80)
    pack = main(Config((tmp_path,), out=tmp_path / "photos.pack"))
    (name, content), *_ = members(pack).items()
    with Image.open(io.BytesIO(content)) as found:
        assert name == "00000.jpg"
        assert found.size == (1200, 1200)
        assert jpeg_quality(found) == 95
        assert found.layer[0][1:3] == (1, 1)  # pyright: ignore  # no reduced colour


def test_a_manifest_tells_what_a_photo_was_before(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "photos.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "was"])
        rows.writerows([["photos/a_good.jpg", 60], ["photos/d_soft.jpg", ""]])
    pack = main(Config((manifest,), out=tmp_path / "photos.pack", source_quality="was"))
    assert list(members(pack).values()) == [(folder / "d_soft.jpg").read_bytes()]
    with pytest.raises(ValueError, match=r"has no column 'is', but path, was"):
        main(Config((manifest,), out=tmp_path / "photos.pack", source_quality="is"))


@pytest.mark.parametrize("kept", [100, 300_000, 600 * 512, -1])
def test_a_pack_that_is_cut_off_is_named(folder: Path, tmp_path: Path, kept: int) -> None:
    """Also between two blocks of the tar, or at the last byte."""
    pack = main(Config((folder,), out=tmp_path / "photos.pack"))
    content = pack.read_bytes()
    assert len(content) > 500_000
    pack.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"photos\.pack is no whole, uncompressed tar .* again"):
        list_photos(pack)


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 92, 100])
def test_quality_is_read_from_the_tables(photo: Image.Image, quality: int) -> None:
    written = io.BytesIO()
    photo.save(written, "JPEG", quality=quality)
    with Image.open(written) as found:
        assert jpeg_quality(found) == quality
    assert jpeg_quality(photo) == 100


def test_sharpness_tells_enlarged_photos_whatever_their_contrast(photo: Image.Image) -> None:
    def grey(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("L")))

    enlarged = photo.resize((256, 256)).resize((512, 512), Image.Resampling.BICUBIC)
    own = sharpness(grey(photo))
    assert sharpness(grey(enlarged)) < 0.6 * own
    assert sharpness(0.2 * grey(photo).float() + 100) == pytest.approx(own, rel=1e-3)
