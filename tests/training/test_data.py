"""Photos and samples: what is read, what is left out, and that a sample is (seed, index)."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diff_restorer.degradations import KINDS
from training.data import CleanPhotos, RestorationSamples, StepSampler, clip_view

NAMES = ("astronaut", "chelsea", "coffee")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small photos, one of them in a subfolder."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for name, sub in zip(NAMES, (".", ".", "more"), strict=True):
        picture = Image.fromarray(getattr(data, name)())
        picture.resize((150, 100)).save(root / sub / f"{name}.png")
    return root


def make(folder: Path, **changes: object) -> RestorationSamples:
    settings = {"crop": 64, "clip_size": 48, "seed": 0} | changes
    return RestorationSamples(CleanPhotos(folder), **settings)  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_a_list_and_a_manifest_name_the_same_photos(folder: Path, tmp_path: Path) -> None:
    relative = ["astronaut.png", "chelsea.png", "more/coffee.png"]
    text, manifest = folder / "list.txt", folder / "manifest.csv"
    text.write_text("# three photos\n\n" + "\n".join(relative))
    rows = [f"{path},train" for path in relative] + ["missing.png,test"]
    manifest.write_text("path,part\n" + "\n".join(rows))
    expected = CleanPhotos(folder).paths
    assert [path.stem for path in expected] == list(NAMES)
    assert CleanPhotos(text).paths == CleanPhotos(str(manifest)).paths == expected
    assert CleanPhotos(folder)[2].shape == (3, 100, 150)
    assert CleanPhotos(folder)[2].dtype == torch.uint8


def test_unreadable_files_are_named_counted_and_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = (folder / "chelsea.png").read_bytes()
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("this is no photo")
    (tmp_path / "empty.jpg").touch()
    photos = CleanPhotos(tmp_path)
    assert [path.name for path in photos.paths] == ["good.png"]
    for name in ("cut.png", "text.jpg", "empty.jpg"):
        assert name in caplog.text
    assert "left out 3 unreadable of 4 files" in caplog.text


def test_a_source_without_photos_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"found no photo in {tmp_path}; give a folder with"):
        CleanPhotos(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a folder, a text list"):
        CleanPhotos(tmp_path / "nowhere")
    (tmp_path / "list.csv").write_text("file\na.png")
    with pytest.raises(ValueError, match=r"columns \['file'\]; a manifest needs `path`"):
        CleanPhotos(tmp_path / "list.csv")
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(ValueError, match=r"none of the 1 files of .* can be read"):
        CleanPhotos(tmp_path)


def test_a_sample_has_the_promised_shapes_and_ranges(folder: Path) -> None:
    samples = make(folder)
    seen = set()
    for index in range(40):
        sample = samples[index]
        assert sample["gt"].shape == sample["lq"].shape == (3, 64, 64)
        assert sample["clip_view"].shape == (3, 48, 48)
        assert sample["label"].dtype == torch.int64
        for key in ("gt", "lq", "clip_view"):
            levels = sample[key] * 255
            assert sample[key].dtype == torch.float32
            assert torch.equal(levels.round().clamp(0, 255) / 255, sample[key])
        assert 0 <= sample["severity"] < 1
        seen.add(int(sample["label"]))
    assert seen == set(range(len(KINDS)))


def test_clean_samples_are_aligned(folder: Path) -> None:
    samples = make(folder, kinds=("clean",))
    assert all(torch.equal(samples[i]["gt"], samples[i]["lq"]) for i in range(12))


def test_degraded_samples_are_aligned(folder: Path) -> None:
    samples = make(folder, kinds=("noise",))
    for index in range(12):
        gt, lq = samples[index]["gt"], samples[index]["lq"]
        here = (gt - lq).square().mean()
        assert all(here < (gt.roll(4, axis) - lq).square().mean() for axis in (1, 2))


def test_a_sample_depends_on_seed_and_index_alone(folder: Path) -> None:
    first, second = make(folder), make(folder)
    later = first[7]
    for index in (3, 0, 7):
        assert same(first[index], second[index])
    assert same(second[7], later)
    assert not same(first[7], first[8])
    assert not same(first[7], make(folder, seed=1)[7])


def test_every_photo_comes_once_per_epoch() -> None:
    photos = [torch.full((3, 80, 80), value, dtype=torch.uint8) for value in range(0, 250, 25)]
    samples = RestorationSamples(photos, crop=64, clip_size=32, seed=0, kinds=("clean",))
    orders = [
        [int(samples[e * 10 + i]["gt"][0, 0, 0] * 255 + 0.5) for i in range(10)] for e in (0, 1)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 250, 25))
    assert orders[0] != orders[1]


def test_a_photo_smaller_than_the_crop_is_enlarged(folder: Path) -> None:
    sample = make(folder, crop=192, kinds=("clean",))[0]
    assert sample["gt"].shape == (3, 192, 192)
    # Mirroring at the border would repeat itself.
    assert not torch.equal(sample["gt"], sample["gt"].flip(-1))


def test_the_number_of_workers_does_not_matter(folder: Path) -> None:
    samples = make(folder)

    def batches(workers: int) -> list[dict[str, Tensor]]:
        sampler = StepSampler(3, start_step=2, batch_size=3)
        loader = DataLoader(samples, batch_sampler=sampler, num_workers=workers)
        return list(islice(loader, 3))

    for plain, parallel in zip(batches(0), batches(2), strict=True):
        assert same(plain, parallel)


def test_the_sampler_resumes_exactly() -> None:
    straight = list(islice(StepSampler(5, batch_size=4), 10))
    assert list(islice(StepSampler(5, start_step=6, batch_size=4), 4)) == straight[6:]
    assert next(iter(StepSampler(6, batch_size=4))) != straight[0]


def test_ranks_share_what_one_rank_with_a_larger_batch_sees() -> None:
    whole = islice(StepSampler(5, batch_size=6), 4)
    ranks = [islice(StepSampler(5, batch_size=3, rank=r, world_size=2), 4) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == list(whole)
    with pytest.raises(ValueError, match="rank 2, world_size 2"):
        StepSampler(5, batch_size=3, rank=2, world_size=2)


def test_clip_view_squashes_the_whole_picture() -> None:
    image = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    view = clip_view(image, 32)
    expected = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
    assert (view - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(clip_view(view, 32), view)
