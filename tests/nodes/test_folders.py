"""Photos of a folder, one for each run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

NODE = "DiffRestorerFolderPhoto"


@pytest.fixture
def folder(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the host's input folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    made = tmp_path / "deep/photos"
    made.mkdir(parents=True)
    return made


def test_names_count_and_order(folder: Path, run: Any) -> None:
    for index, name in enumerate(("b.png", "A.png", "c.d.png")):
        Image.new("RGB", (4 + index, 3)).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    found = [run(NODE, folder="deep/photos", index=index) for index in range(3)]
    assert [each[1] for each in found] == ["A", "b", "c.d"]
    assert [each[2] for each in found] == ["1 of 3: A.png", "2 of 3: b.png", "3 of 3: c.d.png"]
    assert [each[3] for each in found] == [3, 3, 3]
    assert [tuple(each[0].shape) for each in found] == [(1, 3, w, 3) for w in (5, 4, 6)]
    with pytest.raises(ValueError, match="index: 3, but deep/photos holds 3 photos"):
        run(NODE, folder="deep/photos", index=3)


def test_photos_come_upright_with_depth_and_transparency(folder: Path, run: Any) -> None:
    turned = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(folder / "1.png", exif=exif)
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(folder / "2.png")
    grey = np.array([[0, 65535], [13107, 26214]], dtype=np.uint16)
    Image.fromarray(grey).save(folder / "3.png")
    photos = [run(NODE, folder="deep/photos", index=index)[0] for index in range(3)]
    expected = np.rot90(np.asarray(turned), -1).astype(np.float32) / 255
    assert torch.equal(photos[0][0], torch.from_numpy(expected.copy()))
    assert torch.allclose(photos[1][0, 0, 0], torch.tensor([1.0, 0.0, 0.0, 0.2]))
    assert torch.allclose(photos[2][0, ..., 1], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))


def test_damaged_photos_are_named(folder: Path, run: Any) -> None:
    Image.new("RGB", (40, 30)).save(folder / "1.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    (folder / "2.png").write_bytes(b"<html>")
    for index, reason in enumerate(("[Tt]runcated", "unknown format")):
        with pytest.raises(
            ValueError, match=rf"^folder: .*{index + 1}\.\w+ is not .* \(.*{reason}"
        ):
            run(NODE, folder="deep/photos", index=index)


def test_other_folders_are_refused(folder: Path, run: Any) -> None:
    for name in ("..", "deep/../..", "/", "photos"):
        with pytest.raises(ValueError, match=r"folder: there is no .* Found there: deep, deep/ph"):
            run(NODE, folder=name, index=0)
    with pytest.raises(ValueError, match="folder: there are no photos in"):
        run(NODE, folder="deep/photos", index=0)


def test_a_changed_photo_is_loaded_again(folder: Path, pack: ModuleType) -> None:
    stamp = pack.nodes.folders.DiffRestorerFolderPhoto.fingerprint_inputs
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    first = stamp("deep/photos", 0)
    assert first == stamp("deep/photos", 0)
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    changed = stamp("deep/photos", 0)
    assert changed != first
    Image.new("RGB", (4, 4)).save(folder / "b.png")
    assert stamp("deep/photos", 0) != changed, "the count is another one"
    assert stamp("elsewhere", 0) == stamp(None, 0) == "unknown"
