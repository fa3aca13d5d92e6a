"""Photos and samples: what is read, what is left out, and that a sample is (seed, index)."""

import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diff_restorer.degradations import KINDS
from training.common import DataConfig, open_data
from training.data import Mixing, RestorationSamples, StepSampler, clip_view
from training.models import Sizes
from training.photos import CleanPhotos, PhotoStore, photo_size, read_photo
from training.train_decoder import DecoderSamples

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
    assert [Path(str(path)).stem for path in expected] == list(NAMES)
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
    assert "left out 3 unusable of 4" in caplog.text


def test_a_source_without_photos_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"found no photo in {tmp_path}; give a folder with"):
        CleanPhotos(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a folder, a text list"):
        CleanPhotos(tmp_path / "nowhere")
    (tmp_path / "list.csv").write_text("file\na.png")
    with pytest.raises(ValueError, match=r"columns \['file'\]; a manifest needs `path`"):
        CleanPhotos(tmp_path / "list.csv")
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(ValueError, match=r"none of the 1 is usable; the first, .*bad\.jpg: "):
        CleanPhotos(tmp_path)


def add_to_tar(shard: Path, **files: bytes) -> None:
    """Appends files; a double underscore in a name stands for a dot."""
    with tarfile.open(shard, "a") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"some/{name.replace('__', '.')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_hold_photos_at_random_access(folder: Path, tmp_path: Path) -> None:
    images = [Path(str(file)).read_bytes() for file in CleanPhotos(folder).paths]
    add_to_tar(tmp_path / "b.tar", z__png=images[2], z__json=b"{}", pair__lq__png=images[0])
    add_to_tar(tmp_path / "a.tar", x__png=images[0], y__png=images[1])
    shards = CleanPhotos(tmp_path)
    names = [str(file).removeprefix(str(tmp_path)) for file in shards.paths]
    assert names == ["/a.tar:some/x.png", "/a.tar:some/y.png", "/b.tar:some/z.png"]
    loose = make(folder)
    packed = RestorationSamples(shards, crop=64, clip_size=48, seed=0)
    assert all(same(loose[index], packed[index]) for index in (5, 0, 3))
    assert len(CleanPhotos(tmp_path / "a.tar")) == 2


def test_a_faulty_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"bad\.tar is no whole, uncompressed tar"):
        CleanPhotos(tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"no photo in .*empty\.tar; give a tar shard with"):
        CleanPhotos(tmp_path / "empty.tar")


@pytest.mark.parametrize("limit_mb", [0, 1])
def test_a_small_store_gives_the_same_photos(folder: Path, limit_mb: int, tmp_path: Path) -> None:
    for number in range(12):  # 12 x 150 x 1000 x 3 bytes do not fit into 1 MB
        picture = Image.open(folder / "chelsea.png").resize((1000, 150))
        picture.rotate(number).save(tmp_path / f"{number:02}.png")
    small, large = CleanPhotos(tmp_path, PhotoStore(limit_mb)), CleanPhotos(tmp_path)
    assert small.paths == large.paths
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
    assert large[3] is large[3]  # kept
    kept = sum(small[index] is small[index] for index in range(12))
    assert 0 < kept < 12 if limit_mb else kept == 0


def test_a_photo_that_breaks_later_gives_way_to_the_next(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes((folder / "chelsea.png").read_bytes())
    photos = CleanPhotos(tmp_path, PhotoStore(0))
    (tmp_path / "a.png").write_bytes(b"overwritten")
    assert torch.equal(photos[0], photos[1])
    assert torch.equal(photos[0], photos[1])
    assert caplog.text.count("left out") == 1
    assert "a.png" in caplog.text
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="none of 2 is usable any more"):
        photos[0]


def test_a_turned_photo_is_upright_in_its_header_too(folder: Path, tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.open(folder / "chelsea.png").save(tmp_path / "turned.jpg", exif=orientation)
    assert CleanPhotos(tmp_path)[0].shape == (3, 150, 100)
    assert photo_size(tmp_path / "turned.jpg") == (100, 150)


def test_the_tone_tells_what_the_degradation_did_to_brightness(folder: Path) -> None:
    samples = make(folder, kinds=("clean", "low_light", "haze"))
    for index in range(30):
        sample = samples[index]
        tone, kind = sample["tone"], samples.kinds[sample["label"]]
        if kind == "clean":
            assert not tone.any()
        elif kind == "low_light":
            assert (tone > 0).all()  # the clean photo is brighter and has more contrast
        else:
            assert (tone[3:] > 0).all()


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
        assert (sample["severity"] == 0) == (KINDS[sample["label"]] == "clean")
        assert sample["kinds"].tolist() == [i == sample["label"] for i in range(len(KINDS))]
        seen.add(int(sample["label"]))
    assert seen == set(range(len(KINDS)))


def test_darker_photos_are_darker_on_both_sides_but_not_under_low_light(folder: Path) -> None:
    for kind in ("clean", "noise", "low_light", "haze"):
        plain, dark = (make(folder, kinds=(kind,), darker=share) for share in (0.0, 1.0))
        if kind in ("low_light", "haze"):
            assert all(same(plain[index], dark[index]) for index in range(3))
        else:
            before, after = (sum(s[i]["gt"].mean() for i in range(9)) for s in (plain, dark))
            assert after < 0.9 * before
    sample = make(folder, kinds=("clean",), darker=1.0)[0]
    assert torch.equal(sample["gt"], sample["lq"])


def test_softer_photos_are_softer_on_both_sides_but_not_under_blur(folder: Path) -> None:
    for kind in ("clean", "noise", "blur"):
        plain, soft = (make(folder, kinds=(kind,), softer=share) for share in (0.0, 1.0))
        if kind == "blur":
            assert all(same(plain[index], soft[index]) for index in range(3))
        else:
            before, after = (
                sum(s[i]["gt"].diff(dim=2).abs().mean() for i in range(9)) for s in (plain, soft)
            )
            assert after < 0.9 * before
    sample = make(folder, kinds=("clean",), softer=1.0)[0]
    assert torch.equal(sample["gt"], sample["lq"])


def test_oversampled_kinds_are_drawn_more_often(folder: Path) -> None:
    samples = make(folder, kinds=("clean", "noise"), oversample=("clean", "clean"), crop=16)
    labels = [int(samples[index]["label"]) for index in range(200)]
    assert 0.65 < labels.count(0) / len(labels) < 0.85  # three of four
    with pytest.raises(ValueError, match=r"oversample: unknown \['fog'\]; known are"):
        make(folder, oversample=("fog",))


def test_stage_2_pairs_latents_with_the_samples_they_came_from(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "latents.safetensors"
    sampled = make(folder, seed=91)
    latents = torch.arange(2.0)[:, None, None, None].expand(2, 4, 8, 8).contiguous()
    indices = torch.tensor([10, 11])
    save_file(
        {"indices": indices, "latents": latents}, file, {"origin": json.dumps(sampled.origin())}
    )
    stage_2 = DecoderSamples(make(folder, seed=3), file, 1.0, latents.shape[1:])
    for index in range(4):
        sample = stage_2[index]
        assert sample["sampled"]
        origin = sampled[10 + int(sample["latent"][0, 0, 0])]
        assert all(torch.equal(sample[key], origin[key]) for key in origin)

    for changes, name in (({"crop": 32}, "crop"), ({"softer": 0.5}, "softer")):
        with pytest.raises(ValueError, match=f"sampled with {name} .* same --data"):
            DecoderSamples(make(folder, **changes), file, 1.0, latents.shape[1:])
    renamed = tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    (renamed / "astronaut.png").rename(renamed / "zebra.png")  # as many photos, another order
    with pytest.raises(ValueError, match=r"sampled with files .* same --data"):
        DecoderSamples(make(renamed), file, 1.0, latents.shape[1:])
    save_file({"indices": indices, "latents": latents}, file)
    with pytest.raises(ValueError, match="does not tell what its photos were"):
        DecoderSamples(make(folder), file, 1.0, latents.shape[1:])


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


MIXED = Mixing(chain=0.7, low_res=0.3, second_order=0.3)


def test_mixes_name_all_their_kinds_and_keep_kinds_uniform(folder: Path) -> None:
    samples = make(folder, mixing=Mixing(chain=0.5), crop=32, clip_size=8)
    drawn = [samples[index] for index in range(300)]
    sizes = Counter(int(sample["kinds"].sum()) for sample in drawn)
    assert sizes.keys() == {1, 2, 3}
    assert 90 < sizes[2] + sizes[3] < 180  # half of the 8/9 that are not clean
    clean = KINDS.index("clean")
    for sample in drawn:
        assert sample["kinds"].unique().tolist() == [0, 1]
        assert sample["kinds"][sample["label"]] == 1
        if sample["kinds"][clean]:
            assert sample["kinds"].sum() == 1
            assert torch.equal(sample["gt"], sample["lq"])
        assert sample["severity"] <= 1 / sample["kinds"].sum().sqrt()
    labels = Counter(int(sample["label"]) for sample in drawn)
    assert labels.keys() == set(range(len(KINDS)))
    assert max(labels.values()) < 3 * min(labels.values())


class WatchedSamples(RestorationSamples):
    """Notes the severities of the last sample."""

    def _draw_levels(self, kind: str, generator: torch.Generator) -> dict[str, float]:
        self.levels = super()._draw_levels(kind, generator)
        return self.levels


def test_the_label_of_a_mix_is_its_strongest_kind(folder: Path) -> None:
    samples = WatchedSamples(CleanPhotos(folder), crop=64, clip_size=8, seed=0, mixing=MIXED)
    extras: Counter[str] = Counter()
    for index in range(60):
        sample = samples[index]
        named = {kind: level for kind, level in samples.levels.items() if kind in KINDS}
        assert {KINDS[i] for i in sample["kinds"].nonzero().flatten()} == set(named)
        assert KINDS[sample["label"]] == max(named, key=lambda kind: named[kind])
        assert float(sample["severity"]) == pytest.approx(max(named.values()))
        assert "clean" not in named or len(samples.levels) == 1
        extras.update(samples.levels.keys() - named.keys())
    assert extras.keys() == {"low_res", "second_order"}


def test_unlabelled_damage_changes_the_photo_and_not_the_labels(folder: Path) -> None:
    plain = make(folder, kinds=("jpeg",))
    worse = make(folder, kinds=("jpeg",), mixing=Mixing(low_res=1.0))
    for index in range(4):
        a, b = plain[index], worse[index]
        assert torch.equal(a["kinds"], b["kinds"])
        assert a["label"] == b["label"] == 0
        assert not torch.equal(a["lq"], b["lq"])


def test_mixed_samples_depend_on_seed_and_index_alone(folder: Path) -> None:
    first, second = make(folder, mixing=MIXED), make(folder, mixing=MIXED)
    expected = {index: first[index] for index in range(12)}
    assert all(same(second[index], expected[index]) for index in reversed(range(12)))


def test_data_for_a_run_is_held_apart(folder: Path) -> None:
    sizes, config = Sizes(vision_image=32), DataConfig(folder, crop=32, held_out=3)
    train, validation = open_data(config, sizes, seed=0)
    assert len(train) == 2
    assert validation["kinds"].argmax(1).tolist() == list(range(9)) * 2
    mixed, again = open_data(replace(config, mixing=Mixing(chain=1.0)), sizes, seed=0)
    assert same(validation, again)  # always one kind, so that scores compare
    assert any(mixed[index]["kinds"].sum() > 1 for index in range(5))


def test_a_run_without_data_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--data.photos or --data.pairs: give clean photos"):
        open_data(DataConfig(), Sizes(), seed=0)
    with pytest.raises(ValueError, match=r"0 photos are left for training and 1 for validation"):
        open_data(DataConfig(folder / "more"), Sizes(), seed=0)


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


def test_grey_of_16_bits_keeps_its_range_and_32_bits_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        photo = read_photo(tmp_path / name)
        assert photo.dtype == torch.uint8
        assert torch.equal(photo.flatten(1), torch.arange(256, dtype=torch.uint8).expand(3, -1))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="mode F"):
        read_photo(tmp_path / "float.tif")


def test_clip_view_squashes_the_whole_picture() -> None:
    image = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    view = clip_view(image, 32)
    expected = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
    assert (view - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(clip_view(view, 32), view)
