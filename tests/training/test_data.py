"""Photos and batches: what is read, what is left out, and that a batch is (seed, number)."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diff_restorer.degradations import KINDS
from tests.photos import write
from training.common import DataConfig, in_batches, open_data
from training.data import (
    PICTURES,
    BatchNumbers,
    Mixing,
    RestorationBatches,
    clip_view,
    load,
)
from training.networks import Sizes
from training.parts import cut_clean
from training.photos import CleanPhotos, PhotoStore, photo_size, read_photo
from training.train_decoder import SAMPLED, DecoderBatches, read_sampled

from .toys import drawn, occurs, same, write_tar

NAMES = ("astronaut", "chelsea", "coffee")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small photos, one of them in a subfolder."""
    root = tmp_path_factory.mktemp("photos")
    write(root / "more", NAMES[2:], (150, 100))
    return write(root, NAMES[:2], (150, 100))


def make(folder: Path, **changes: object) -> RestorationBatches:
    settings = {"part": 80, "crop": 64, "clip_size": 48, "seed": 0} | changes
    return RestorationBatches(CleanPhotos(folder), **settings)  # type: ignore[arg-type]


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


def test_shards_hold_photos_at_random_access(folder: Path, tmp_path: Path) -> None:
    images = [Path(str(file)).read_bytes() for file in CleanPhotos(folder).paths]
    files = {"some/z.png": images[2], "some/z.json": b"{}", "some/pair.lq.png": images[0]}
    write_tar(tmp_path / "b.tar", files)
    write_tar(tmp_path / "a.tar", {"some/x.png": images[0], "some/y.png": images[1]})
    shards = CleanPhotos(tmp_path)
    names = [str(file).removeprefix(str(tmp_path)) for file in shards.paths]
    assert names == ["/a.tar:some/x.png", "/a.tar:some/y.png", "/b.tar:some/z.png"]
    loose = make(folder)
    packed = RestorationBatches(shards, part=80, crop=64, clip_size=48, seed=0)
    assert all(same(drawn(loose, number), drawn(packed, number)) for number in (5, 0, 3))
    assert len(CleanPhotos(tmp_path / "a.tar")) == 2


def test_a_faulty_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"bad\.tar is no whole, uncompressed tar"):
        CleanPhotos(tmp_path / "bad.tar")
    write_tar(tmp_path / "empty.tar", {})
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
    tones = {
        kind: drawn(make(folder, kinds=(kind,), batch_size=10), 0)["tone"]
        for kind in ("clean", "low_light", "haze")
    }
    assert not tones["clean"].any()
    assert (tones["low_light"] >= 0).all()  # the clean photo is brighter and has more contrast
    assert (tones["haze"][:, 3:] >= 0).all()


def test_a_batch_has_the_promised_shapes_and_ranges(folder: Path) -> None:
    batches = make(folder, batch_size=6, crops_per_part=4)
    assert drawn(batches, 0)["part"].tolist() == [0, 0, 0, 1, 1, 1]
    seen = set()
    for number in range(20):
        batch = drawn(batches, number)
        assert batch["gt"].shape == batch["lq"].shape == (6, 3, 64, 64)
        assert batch["clip_view"].shape == batch["native_view"].shape == (2, 3, 48, 48)
        assert batch["label"].dtype == batch["part"].dtype == torch.int64
        for key in ("gt", "lq", "clip_view", "native_view"):
            levels = batch[key] * 255
            assert batch[key].dtype == torch.float32
            assert torch.equal(levels.round().clamp(0, 255) / 255, batch[key])
        strongest = batch["severities"].gather(1, batch["label"][:, None])[:, 0]
        assert torch.equal(strongest, batch["severities"].amax(dim=1))
        assert torch.equal(strongest == 0, batch["label"] == KINDS.index("clean"))
        assert torch.equal(batch["kinds"], F.one_hot(batch["label"], len(KINDS)).float())
        seen.update(batch["label"].tolist())
    assert seen == set(range(len(KINDS)))


def test_what_a_program_does_not_read_is_not_made(folder: Path) -> None:
    labels = {"part", "kinds", "severities", "label"}
    few = drawn(make(folder, reads={"lq", "native_view"}), 3)
    assert few.keys() == labels | {"lq", "native_view"}
    whole = drawn(make(folder), 3)
    assert whole.keys() == labels | PICTURES
    assert all(torch.equal(few[key], whole[key]) for key in few)
    with pytest.raises(ValueError, match=r"reads: unknown \['latent'\]; known are"):
        make(folder, reads={"latent"})


def test_crops_and_views_are_windows_of_their_part(folder: Path) -> None:
    settings = {"kinds": ("noise",), "part": 128}
    batches = make(folder, **settings, batch_size=8, crops_per_part=4, clip_size=128)
    batch = drawn(batches, 1)
    assert torch.equal(batch["clip_view"], batch["native_view"])  # as large as the part
    crops = set()
    for crop, row in zip(batch["lq"], batch["part"], strict=True):
        assert occurs(crop, batch["clip_view"][row])
        assert not occurs(crop, batch["clip_view"][1 - row])
        crops.add(crop.sum().item())
    assert len(crops) == 8
    near = drawn(make(folder, **settings, batch_size=2), 1)["native_view"]
    whole = drawn(make(folder, **settings, batch_size=2, clip_size=128), 1)["clip_view"]
    assert all(occurs(view, photo) for view, photo in zip(near, whole, strict=True))


def test_other_looks_are_on_both_sides_and_change_no_label(folder: Path) -> None:
    for kinds in (("clean",), ("noise",)):
        plain, other = (
            drawn(make(folder, kinds=kinds, looks=share, batch_size=8), 0) for share in (0.0, 1.0)
        )
        assert (plain["gt"] != other["gt"]).flatten(1).any(dim=1).sum() >= 6
        assert torch.equal(plain["label"], other["label"])
        assert torch.equal(other["gt"], other["lq"]) == (kinds == ("clean",))
        levels = other["gt"] * 255
        assert torch.equal(levels.round() / 255, other["gt"])
    rows = make(folder, looks=0.5, batch_size=100, part=16, crop=16)[0].look_rows
    assert 30 < len(rows) < 70


def test_softer_photos_are_softer_on_both_sides_but_not_under_blur(folder: Path) -> None:
    for kind in ("clean", "noise", "blur"):
        plain, soft = (
            drawn(make(folder, kinds=(kind,), softer=share, batch_size=9), 0)
            for share in (0.0, 1.0)
        )
        if kind == "blur":
            assert same(plain, soft)
        else:
            before, after = (batch["gt"].diff(dim=3).abs().mean() for batch in (plain, soft))
            assert after < 0.9 * before
    batch = drawn(make(folder, kinds=("clean",), softer=1.0), 0)
    assert torch.equal(batch["gt"], batch["lq"])


def test_oversampled_kinds_are_drawn_more_often(folder: Path) -> None:
    kinds = {"kinds": ("clean", "noise"), "oversample": ("clean", "clean")}
    batches = make(folder, **kinds, batch_size=200, part=16, crop=16)
    share = (batches[0].labels["label"] == 0).float().mean()
    assert 0.65 < share < 0.85  # three of four
    with pytest.raises(ValueError, match=r"oversample: unknown \['fog'\]; known are"):
        make(folder, oversample=("fog",))


def test_stage_2_pairs_latents_with_the_batches_they_came_from(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "latents.safetensors"
    sampled = make(folder, seed=91, batch_size=2)
    latents = torch.arange(2.0)[:, None, None, None, None].expand(2, 2, 4, 8, 8).contiguous()
    stored = {"numbers": torch.tensor([10, 11]), "latents": latents.half()}
    save_file(stored, file, {"origin": json.dumps(sampled.origin())})
    fresh = make(folder, seed=3, batch_size=2)
    read = read_sampled(fresh, file)
    stage_2 = DecoderBatches(fresh, read, 1.0)
    places = set()
    for number in range(8):
        batch = drawn(stage_2, number)
        place = int(batch.pop("latent")[0, 0, 0, 0])
        assert same(batch, drawn(sampled, 10 + place))
        places.add(place)
    assert places == {0, 1}
    some = [drawn(DecoderBatches(fresh, read, 0.5), number) for number in range(40)]
    found = [number for number, batch in enumerate(some) if "latent" in batch]
    assert 10 < len(found) < 30
    assert all(same(some[n], drawn(fresh, n)) for n in range(40) if n not in found)
    assert same(drawn(DecoderBatches(fresh), found[0]), drawn(fresh, found[0]))
    asked = [SAMPLED in drawn(DecoderBatches(fresh, None, 0.5), number) for number in range(40)]
    assert found == [number for number in range(40) if asked[number]]

    other = {"crop": 32, "softer": 0.5, "looks": 0.5, "batch_size": 4, "crops_per_part": 2}
    for name, value in other.items():
        changed = make(folder, **({"batch_size": 2} | {name: value}))
        with pytest.raises(ValueError, match=f"sampled with {name} .* same --data"):
            read_sampled(changed, file)
    with pytest.raises(ValueError, match="found 4, but the latents were sampled in batches of 2"):
        stage_2.sized(4)
    renamed = tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    (renamed / "astronaut.png").rename(renamed / "zebra.png")  # as many photos, another order
    with pytest.raises(ValueError, match=r"sampled with files .* same --data"):
        read_sampled(make(renamed, batch_size=2), file)
    save_file(stored, file)
    with pytest.raises(ValueError, match="does not tell what its photos were"):
        read_sampled(fresh, file)


def test_crops_are_aligned(folder: Path) -> None:
    clean = drawn(make(folder, kinds=("clean",), batch_size=12), 0)
    assert torch.equal(clean["gt"], clean["lq"])
    batch = drawn(make(folder, kinds=("noise",), batch_size=12, crops_per_part=3), 0)
    for gt, lq in zip(batch["gt"], batch["lq"], strict=True):
        here = (gt - lq).square().mean()
        assert here > 0
        assert all(here < (gt.roll(4, axis) - lq).square().mean() for axis in (1, 2))


MIXED = Mixing(chain=0.7, low_res=0.3, second_order=0.3)


@pytest.mark.parametrize("mixing", [Mixing(), MIXED])
def test_a_batch_depends_on_seed_and_number_alone(folder: Path, mixing: Mixing) -> None:
    first, second = (make(folder, mixing=mixing, batch_size=3) for _ in range(2))
    expected = {number: drawn(first, number) for number in range(8)}
    assert all(same(drawn(second, number), expected[number]) for number in reversed(range(8)))
    assert not same(expected[6], expected[7])
    assert not same(expected[7], drawn(first.with_seed(1), 7))


def test_mixes_name_all_their_kinds(folder: Path) -> None:
    batches = make(folder, mixing=Mixing(chain=0.5), batch_size=300, part=32, crop=32)
    labels = batches[0].labels
    sizes = Counter(labels["kinds"].sum(dim=1).int().tolist())
    assert sizes.keys() == {1, 2, 3, 4}
    assert 90 < 300 - sizes[1] < 180  # half of the 8/9 that are not clean
    assert labels["kinds"].unique().tolist() == [0, 1]
    assert (labels["kinds"].gather(1, labels["label"][:, None]) == 1).all()
    assert (labels["kinds"][labels["kinds"][:, KINDS.index("clean")] > 0].sum(dim=1) == 1).all()
    assert torch.equal(labels["severities"].argmax(dim=1)[labels["severities"].any(dim=1)],
                       labels["label"][labels["severities"].any(dim=1)])  # fmt: skip
    mixes = labels["severities"][labels["kinds"].sum(dim=1) == 3]
    assert mixes.max() > 0.9  # at full strength
    assert set(labels["label"].tolist()) == set(range(len(KINDS)))


def test_a_batch_is_finished_without_looking_at_its_pixels(folder: Path) -> None:
    """On a device without values anything that waits for one fails."""
    batches = make(folder, mixing=MIXED, looks=0.5, batch_size=24, crops_per_part=2)
    found = batches.finish(batches[0], torch.device("meta"))
    expected = drawn(batches, 0)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.is_meta
        assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype)


def test_what_is_done_to_a_part_is_what_its_labels_say(folder: Path) -> None:
    batches = make(folder, mixing=MIXED, batch_size=60, part=32, crop=32)
    item = batches[0]
    done = torch.zeros_like(item.labels["severities"])
    unlabelled: Counter[str] = Counter()
    for kind, rows, severity in item.groups:
        name = "blur" if kind == "low_res" else kind  # lost resolution is seen as blur
        if name in KINDS:
            done[rows, KINDS.index(name)] = done[rows, KINDS.index(name)].maximum(severity)
        else:
            unlabelled[kind] += len(rows)
    assert torch.equal(done, item.labels["severities"])
    assert unlabelled.keys() == {"second_order"}
    assert any(kind == "low_res" for kind, *_ in item.groups)
    order = [kind for kind, *_ in item.groups]
    assert order.index("haze") < order.index("blur") < order.index("noise") < order.index("jpeg")


def test_a_labelled_low_res_is_a_kind_like_another(folder: Path) -> None:
    kinds = (*KINDS, "low_res")
    batches = make(folder, kinds=kinds, mixing=Mixing(low_res=1.0), batch_size=20)
    found = batches[0].labels["kinds"]
    clean = found[:, KINDS.index("clean")] > 0
    assert torch.equal(found[:, -1] > 0, ~clean)
    assert (found[~clean].sum(dim=1) <= 2).all()


def test_unlabelled_damage_changes_the_photo_and_not_the_labels(folder: Path) -> None:
    plain = drawn(make(folder, kinds=("jpeg",), batch_size=4), 0)
    mixing = Mixing(low_res=1.0)
    worse = drawn(make(folder, kinds=("jpeg",), mixing=mixing, batch_size=4), 0)
    assert torch.equal(plain["kinds"], worse["kinds"])
    assert torch.equal(plain["label"], worse["label"])
    assert all(not torch.equal(a, b) for a, b in zip(plain["lq"], worse["lq"], strict=True))


def test_data_for_a_run_is_held_apart(folder: Path) -> None:
    sizes = Sizes(vision_image=32)
    config = DataConfig(folder, crop=32, part=48, held_out=3, crops_per_part=2)
    train, validation = open_data(config, sizes, seed=0, reads={"gt"})
    assert len(train) == 2
    assert "lq" not in drawn(train, 0)
    assert validation["kinds"].argmax(1).tolist() == list(range(9)) * 2
    assert validation["part"].tolist() == list(range(18))
    assert validation.keys() >= PICTURES
    mixed, again = open_data(replace(config, mixing=Mixing(chain=1.0)), sizes, seed=0)
    assert same(validation, again)  # always one kind, so that scores compare
    assert (mixed.sized(20)[0].labels["kinds"].sum(dim=1) > 1).any()


def test_validation_batches_keep_their_own_parts(folder: Path) -> None:
    whole = make(folder, kinds=("clean", "noise")).fixed(5, at_once=2)
    assert whole["label"].tolist() == [0, 1, 0, 1, 0]
    pieces = list(in_batches(whole, 2))
    assert [piece["part"].tolist() for piece in pieces] == [[0], [0, 1], [0, 1]]
    joined = torch.cat([piece["native_view"][piece["part"]] for piece in pieces])
    assert torch.equal(joined, whole["native_view"])


def test_a_run_without_data_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--data.photos or --data.pairs: give clean photos"):
        open_data(DataConfig(), Sizes(), seed=0)
    with pytest.raises(ValueError, match=r"0 photos are left for training and 1 for validation"):
        open_data(DataConfig(folder / "more"), Sizes(), seed=0)


@pytest.mark.parametrize("crops_per_part", [1, 2])
def test_every_photo_comes_once_per_epoch(crops_per_part: int) -> None:
    photos = [torch.full((3, 80, 80), value, dtype=torch.uint8) for value in range(0, 250, 25)]
    batches = RestorationBatches(
        photos, crop=16, part=16, clip_size=16, seed=0, batch_size=4 * crops_per_part,
        crops_per_part=crops_per_part, kinds=("clean",),
    )  # fmt: skip
    seen = torch.cat([batches[number].clean[:, 0, 0, 0] for number in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(0, 250, 25))
    assert seen[:10] != seen[10:]


def test_a_photo_smaller_than_the_part_is_enlarged(folder: Path) -> None:
    batch = drawn(make(folder, crop=192, kinds=("clean",)), 0)
    assert batch["gt"].shape == (1, 3, 192, 192)
    # Mirroring at the border would repeat itself.
    assert not torch.equal(batch["gt"], batch["gt"].flip(-1))


def test_parts_are_cut_from_sharp_and_from_full_sizes() -> None:
    """A grid of single columns tells by its contrast how much a photo was reduced."""
    photo = torch.zeros(3, 1500, 2048, dtype=torch.uint8)
    photo[:, :, ::2] = 255
    generator = torch.Generator().manual_seed(0)
    parts = [cut_clean(photo, 64, generator).float() for _ in range(60)]
    contrast = torch.stack([part.std() for part in parts])
    assert all(part.shape == (3, 64, 64) for part in parts)
    assert contrast.min() < 10  # reduced by 2 and more
    assert contrast.max() > 40  # nearly as it was
    soft = [cut_clean(photo, 64, generator, softer=True) for _ in range(8)]
    runs = [int((part[0, 0].int().diff().abs() > 100).sum()) for part in soft]
    assert max(runs) < 60


def test_the_number_of_workers_does_not_matter(folder: Path) -> None:
    batches = make(folder, batch_size=3, mixing=MIXED)

    def loaded(workers: int) -> list[dict[str, Tensor]]:
        return list(islice(load(batches, BatchNumbers(2), torch.device("cpu"), workers), 3))

    for plain, parallel, number in zip(loaded(0), loaded(2), (2, 3, 4), strict=True):
        assert same(plain, parallel)
        assert same(plain, drawn(batches, number))


def test_an_item_travels_as_bytes_and_is_finished_elsewhere(folder: Path) -> None:
    """As beside a GPU: what a data process hands over is an item, and small."""
    batches = make(folder, batch_size=8, crops_per_part=4, part=128)
    loader = DataLoader(batches, sampler=[5], batch_size=None, num_workers=1)
    (item,) = loader
    assert item.clean.dtype == item.pair_lq.dtype == torch.uint8
    assert same(batches.finish(item, torch.device("cpu")), drawn(batches, 5))


def test_processes_share_what_one_that_accumulates_sees() -> None:
    alone = list(islice(BatchNumbers(3 * 4), 8))  # from step 3 on, 4 batches a step
    shared = [list(islice(BatchNumbers(3 * 2, rank, 2), 4)) for rank in (0, 1)]
    assert [number for both in zip(*shared, strict=True) for number in both] == alone
    assert alone == list(range(12, 20))
    with pytest.raises(ValueError, match="rank 2, world_size 2"):
        BatchNumbers(0, 2, 2)


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
