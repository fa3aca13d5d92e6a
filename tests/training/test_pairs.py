"""Paired sets: published layouts are recognised, faulty pairs are named, samples stay exact."""

import io
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diff_restorer.degradations import KINDS
from tests.photos import picture, write
from training.common import DataConfig, open_data
from training.data import UNKNOWN_SEVERITY, BatchNumbers, Mixing, RestorationBatches, load
from training.layouts import LAYOUTS, find_pairs, kind_of
from training.networks import Sizes
from training.pairs import PairedPhotos
from training.photos import CleanPhotos, PhotoStore

from .toys import drawn, occurs, same, write_tar

PHOTO = picture("chelsea").resize((96, 72))


def shaded(photo: Image.Image, shade: float) -> Image.Image:
    return Image.fromarray((np.asarray(photo) * shade).round().astype(np.uint8))


def save(path: Path, shade: float = 1.0, size: tuple[int, int] | None = None) -> None:
    """A photo, darkened and resized."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shaded(PHOTO.resize(size) if size else PHOTO, shade).save(path)


def make_set(root: Path, *pairs: str) -> Path:
    """Writes pairs given as `degraded <-> clean`, each clean photo in its own shade."""
    shades: dict[str, float] = {}
    for place, pair in enumerate(pairs):
        lq, gt = pair.split(" <-> ")
        shade = shades.setdefault(gt, 1 - 0.03 * len(shades))
        save(root / gt, shade)
        save(root / lq, 0.5 * shade - 0.003 * place)
    return root


PUBLISHED = {
    "gopro": (
        "blur",
        "train/GOPR0372_07_00/blur/000047.png <-> train/GOPR0372_07_00/sharp/000047.png",
        "train/GOPR0372_07_00/blur_gamma/000047.png <-> train/GOPR0372_07_00/sharp/000047.png",
        "test/GOPR0384_11_00/blur/000047.png <-> test/GOPR0384_11_00/sharp/000047.png",
    ),
    "lol": (
        "low_light",
        "our485/low/2.png <-> our485/high/2.png",
        "eval15/low/1.png <-> eval15/high/1.png",
        "Real/Train/Low/low00001.png <-> Real/Train/Normal/normal00001.png",
    ),
    "rain100": (
        "rain",
        "flat/rain-001.png <-> flat/norain-001.png",
        "Rain100H/rainy/rain-001.png <-> Rain100H/norain-001.png",
        "airnet/rainy/rain-1.png <-> airnet/gt/norain-1.png",
        "Rain200H/rain/X2/norain-1x2.png <-> Rain200H/norain/norain-1.png",
        "pku/rain/rain-005.png <-> pku/norain/norain-005.png",
    ),
    "reside": (
        "haze",
        "OTS/hazy/0001_0.8_0.2.jpg <-> OTS/clear/0001.jpg",
        "OTS/hazy/0001_0.85_0.04.jpg <-> OTS/clear/0001.jpg",
        "OTS_ALPHA/haze/OTS/0005_0.8_0.04.jpg <-> OTS_ALPHA/clear/clear_images/0005.jpg",
        "ITS/hazy/1_1_0.90179.png <-> ITS/clear/1.png",
        "SOTS/indoor/hazy/1400_1.png <-> SOTS/indoor/gt/1400.png",
        "SOTS/outdoor/hazy/0006_0.85_0.08.jpg <-> SOTS/outdoor/gt/0006.png",
        "RESIDE-6K/train/hazy/12.jpg <-> RESIDE-6K/train/GT/12.jpg",
    ),
    "snow100k": (
        "snow",
        "all/synthetic/beautiful_smile_00003.jpg <-> all/gt/beautiful_smile_00003.jpg",
        "test/Snow100K-L/synthetic/city_1.jpg <-> test/Snow100K-L/gt/city_1.jpg",
    ),
    "raindrop": (
        "raindrop",
        "train/data/0_rain.png <-> train/gt/0_clean.png",
        "data/test_b/data/101_rain.jpg <-> data/test_b/gt/101_clean.jpg",
    ),
    "realsr": (
        "low_res",
        "Canon/Train/4/Canon_001_LR4.png <-> Canon/Train/4/Canon_001_HR.png",
        "Nikon/Train/2/Nikon_001_LR2.png <-> Nikon/Train/2/Nikon_001_HR.png",
    ),
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts_are_recognised(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, *listed = PUBLISHED[layout]
    root = make_set(tmp_path / "set", *listed)
    found = find_pairs(root)
    names = {str(pair).replace(f"{root}/", "").replace(" with ", " <-> ") for pair in found}
    assert names == set(listed)
    assert {pair.kind for pair in found} == {kind}
    assert "left out" not in caplog.text
    assert len(PairedPhotos([root], kinds=(kind,))) == len(listed)
    assert find_pairs(root, layout) == found


def test_type_folders_name_the_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = {
        "motion-blurry": "blur", "hazy": "haze", "jpeg-compressed": "jpeg", "noisy": "noise",
        "low-light": "low_light", "raindrop": "raindrop", "rainy": "rain", "snowy": "snow",
        "noise_real": "noise", "Low Light": "low_light", "lowres_x4_bicubic": "low_res",
    }  # fmt: skip
    listed = [f"val/{name}/LQ/x.png <-> val/{name}/GT/x.png" for name in foreign]
    listed += [
        "shadowed/lq/x.png <-> shadowed/gt/x.png",
        "noise/input/a.png <-> noise/target/a.png",
    ]
    found = find_pairs(make_set(tmp_path, *listed))
    kinds = {Path(str(pair.lq)).parent.parent.name: pair.kind for pair in found}
    assert kinds == foreign | {"noise": "noise"}
    assert "'shadowed' (1 pairs)" in caplog.text
    assert "names no kind" not in caplog.text
    assert find_pairs(tmp_path / "val" / "hazy")[0].kind == "haze"


def test_every_kind_has_a_name_and_foreign_words_have_none() -> None:
    assert all(kind_of(kind) == kind for kind in KINDS if kind != "clean")
    assert kind_of("uncompleted") is None
    assert kind_of("train") is None


def test_the_path_can_carry_a_kind_or_a_layout(tmp_path: Path) -> None:
    mine = make_set(tmp_path / "mine", "lq/a.png <-> gt/a.png")
    with pytest.raises(
        ValueError, match=r"'mine' \(1 pairs\) in .* names no kind; known are noise"
    ):
        PairedPhotos([mine])
    assert PairedPhotos([f"haze={mine}"]).pairs[0].kind == "haze"
    assert PairedPhotos([f"snow={mine}", f"rain={mine}"]).by_kind().keys() == {"snow", "rain"}
    both = make_set(tmp_path / "both", "low/a.png <-> high/a.png", "blur/a.png <-> sharp/a.png")
    with pytest.raises(
        ValueError, match=r"looks like gopro \(1 pairs\), lol \(1 pairs\); name one"
    ):
        PairedPhotos([both])
    assert PairedPhotos([f"lol={both}"]).pairs[0].kind == "low_light"
    with pytest.raises(ValueError, match=r"'fog' is neither a kind .*noise.* nor a layout .*gopro"):
        PairedPhotos([f"fog={both}"])
    realsr = make_set(tmp_path / "sr", "a_LR4.png <-> a_HR.png")
    with pytest.raises(ValueError, match=r"1 pairs of .* are of the kind low_res, which is not"):
        PairedPhotos([realsr])
    assert PairedPhotos([f"blur={realsr}"]).pairs[0].kind == "blur"
    data = DataConfig(pairs=(realsr,), crop=32, validation_samples=1)
    wanted = (*KINDS, "low_res")
    for name in "bcd":
        save(tmp_path / "clean" / f"{name}.png")
    clean = replace(data, photos=tmp_path / "clean", held_out=2)
    train, _ = open_data(clean, Sizes(), 0, wanted)
    assert list(train.pairs) == ["low_res"]


def test_a_set_without_pairs_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        PairedPhotos([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no pair among the 0 photos") as empty:
        PairedPhotos([tmp_path])
    assert all(layout.form in str(empty.value) for layout in LAYOUTS.values())
    save(tmp_path / "hazy" / "1_0.8.png")
    save(tmp_path / "gt" / "2.png")
    with pytest.raises(
        ValueError, match=r"no pair among the 2 photos of .*looked for gopro \(blur"
    ):
        PairedPhotos([tmp_path])
    with pytest.raises(ValueError, match=r"looked for reside \(hazy\|haze/N"):
        PairedPhotos([f"reside={tmp_path}"])


@pytest.mark.parametrize("limit_mb", [0, 100])
def test_faulty_pairs_are_named_counted_and_left_out(
    limit_mb: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_set(tmp_path, *(f"low/{n}.png <-> high/{n}.png" for n in "abcdef"))
    (root / "low" / "b.png").write_bytes((root / "high" / "b.png").read_bytes())  # the same content
    Image.open(root / "high" / "c.png").save(root / "low" / "c.png", compress_level=1)  # again
    save(root / "low" / "d.png", 0.5, (48, 36))
    (root / "high" / "e.png").write_text("this is no photo")
    save(root / "low" / "lonely.png")
    save(root / "high" / "unused.png")
    pairs = PairedPhotos([root], PhotoStore(limit_mb))
    halves = [pairs[index] for index in range(len(pairs))]
    assert all(lq.shape == gt.shape and not torch.equal(lq, gt) for lq, gt in halves)
    found = {name: caplog.text.count(f"low/{name}.png") for name in "abcdef"}
    assert found == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 1, "f": 0}
    assert caplog.text.count("both halves have the same content") == 2
    assert "48 x 36 pixels and the clean one 96 x 72" in caplog.text
    assert "lonely.png: found no partner (low/N <-> high|normal/N)" in caplog.text
    assert "unused.png: found no partner" in caplog.text
    assert "left out 1 degraded and 1 clean photos" in caplog.text
    # With room in the store all content is checked at once; else it is when it is drawn.
    assert len(pairs) == (2 if limit_mb else 4)
    assert f"left out {4 if limit_mb else 2} unusable of 6" in caplog.text


def test_a_set_of_identical_halves_is_refused(tmp_path: Path) -> None:
    for half in ("hazy", "gt"):
        save(tmp_path / half / "1.png")
        save(tmp_path / half / "2.png", 0.8)
    with pytest.raises(ValueError, match=r"none of the 2 is usable.*both halves have the same"):
        PairedPhotos([tmp_path])


def encoded(shade: float) -> bytes:
    stream = io.BytesIO()
    shaded(PHOTO, shade).save(stream, "PNG")
    return stream.getvalue()


def test_shards_hold_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = {"lq.png": encoded(0.5), "gt.png": encoded(1)}
    files = {f"x/0001.{end}": content for end, content in (pair | {"cls": b"hazy\n"}).items()}
    files |= {f"x/0002.{end}": content for end, content in (pair | {"cls": b"5"}).items()}
    files |= {"x/0003.lq.png": encoded(0.5), "x/0004.jpg": encoded(1)}
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", {f"0001.{end}": content for end, content in pair.items()})
    pairs = PairedPhotos([tmp_path / "a.tar"])
    assert [pair.kind for pair in pairs.pairs] == ["haze", "rain"]
    lq, gt = pairs[0]
    assert torch.equal(gt, torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1))
    assert lq.float().mean() == pytest.approx(float(gt.float().mean()) / 2, rel=0.02)
    assert "x/0003 has lq; a pair needs lq.png, gt.png and cls" in caplog.text
    assert "left out 2 incomplete samples" in caplog.text
    with pytest.raises(ValueError, match=r"b\.tar has no sample of <key>\.lq\.png"):
        PairedPhotos([tmp_path / "b.tar"])
    assert len(PairedPhotos([f"snow={tmp_path}"])) == 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of low light, twelve of haze (of three clean photos), one of snow."""
    folder = tmp_path_factory.mktemp("sets")
    low = [f"low-light/LQ/{n:02}.png <-> low-light/GT/{n:02}.png" for n in range(12)]
    make_set(folder / "daclip", *low, "snowy/LQ/1.png <-> snowy/GT/1.png")
    hazy = [f"hazy/{n % 3}_0.{n}.png <-> clear/{n % 3}.png" for n in range(1, 13)]
    make_set(folder / "reside", *hazy)
    write(folder / "photos", ("coffee", "astronaut", "rocket"), (96, 72))
    return folder


def make(root: Path, **changes: object) -> RestorationBatches:
    pairs = PairedPhotos([root / "daclip", root / "reside"])
    settings = {"part": 60, "crop": 48, "clip_size": 24, "seed": 0, "pairs": pairs} | changes
    return RestorationBatches(CleanPhotos(root / "photos"), **settings)  # type: ignore[arg-type]


def paired_kinds(labels: dict[str, Tensor]) -> Counter[str]:
    """How often each kind comes from a pair."""
    rows, kinds = (labels["severities"] == UNKNOWN_SEVERITY).nonzero(as_tuple=True)
    assert torch.equal(labels["label"][rows], kinds)
    return Counter(KINDS[kind] for kind in kinds.tolist())


def test_kinds_are_uniform_over_all_sources(root: Path) -> None:
    labels = make(root, part=16, crop=16, batch_size=720, pair_share=0.5)[0].labels
    kinds = Counter(KINDS[label] for label in labels["label"].tolist())
    assert all(50 < kinds[kind] < 115 for kind in KINDS)
    paired = paired_kinds(labels)
    assert paired.keys() == {"low_light", "haze", "snow"}
    assert all(0.3 < paired[kind] / kinds[kind] < 0.7 for kind in paired)
    alone = make(root, part=16, crop=16, batch_size=60, pair_share=1.0)[0].labels
    kinds = Counter(KINDS[label] for label in alone["label"].tolist())
    assert paired_kinds(alone) == {kind: kinds[kind] for kind in paired}


def test_crops_of_pairs_are_aligned_in_both_halves(root: Path) -> None:
    pairs = PairedPhotos([root / "daclip"])
    batch = drawn(make(root, pairs=pairs, kinds=("low_light",), pair_share=1.0, batch_size=12), 0)
    assert batch["kinds"].unique().tolist() == [1]
    assert batch["lq"].shape == batch["gt"].shape == (12, 3, 48, 48)
    assert batch["clip_view"].shape == (12, 3, 24, 24)
    mirrored: set[bool] = set()
    for lq, gt in zip(batch["lq"], batch["gt"], strict=True):
        ratio = lq.sum() / gt.sum()
        assert 0.4 < ratio < 0.6  # each is about half as bright: any shift would show
        assert (lq - ratio * gt).abs().max() < 2 / 255
        # The crop is found in one of the clean photos, pixel by pixel, perhaps mirrored.
        pixels = (gt * 255).round().byte()
        places = [
            flip
            for _, photo in pairs
            for flip in (False, True)
            if occurs(pixels.flip(-1) if flip else pixels, photo)
        ]
        assert places
        mirrored.update(places)
    assert mirrored == {False, True}


def test_pairs_and_photos_share_a_batch(root: Path) -> None:
    """Each part is degraded by what its own labels say, and pairs by nothing else."""
    batches = make(root, kinds=("noise", "low_light"), pair_share=1.0, batch_size=20)
    item, batch = batches[0], drawn(batches, 0)
    pairs = batch["severities"][:, 1] == UNKNOWN_SEVERITY
    assert torch.equal(pairs.nonzero()[:, 0], item.pair_rows)
    assert 3 < pairs.sum() < 17
    assert torch.equal(pairs, batch["label"] == 1)
    for lq, gt, paired in zip(batch["lq"], batch["gt"], pairs, strict=True):
        ratio = lq.sum() / gt.sum()
        assert ((lq - ratio * gt).abs().max() < 2 / 255) == paired


def test_small_pairs_are_enlarged(root: Path) -> None:
    batch = drawn(make(root, crop=128, kinds=("haze",), pair_share=1.0), 0)
    assert batch["gt"].shape == batch["lq"].shape == (1, 3, 128, 128)
    assert not torch.equal(batch["gt"], batch["lq"])


def test_batches_depend_on_seed_and_number_alone(root: Path) -> None:
    first, second = make(root, batch_size=2), make(root, batch_size=2, pairs=PairedPhotos(
        [root / "daclip", root / "reside"], PhotoStore(0)
    ))  # fmt: skip
    expected = {number: drawn(first, number) for number in range(10)}
    assert all(same(drawn(second, number), expected[number]) for number in reversed(range(10)))
    assert not same(expected[3], drawn(first.with_seed(1), 3))


def test_the_number_of_workers_does_not_matter(root: Path) -> None:
    batches = make(root, mixing=Mixing(chain=0.5, low_res=0.5), batch_size=6)

    def loaded(workers: int) -> list[dict[str, Tensor]]:
        return list(islice(load(batches, BatchNumbers(2), torch.device("cpu"), workers), 3))

    for plain, parallel in zip(loaded(0), loaded(2), strict=True):
        assert same(plain, parallel)


def test_held_out_pairs_share_no_clean_photo_with_the_others(root: Path) -> None:
    train, held_out = PairedPhotos([root / "daclip", root / "reside"]).split(4)
    assert len(train) + len(held_out) == 25
    assert not {pair.gt for pair in train.pairs} & {pair.gt for pair in held_out.pairs}
    counts = Counter(pair.kind for pair in held_out.pairs)
    assert counts == {"low_light": 3, "haze": 4}  # every 4th of 12, one of 3 with its four hazes
    assert "snow" in train.by_kind()


def test_a_run_can_have_pairs_alone_or_beside_photos(root: Path) -> None:
    sizes = Sizes(vision_image=32)
    config = DataConfig(
        pairs=(root / "daclip", f"haze={root / 'reside'}"), part=40, crop=32, held_out=4
    )
    train, validation = open_data(config, sizes, seed=0)
    assert len(train.photos) == 9 + 2 + 1  # their clean halves serve as clean photos
    assert len(train) == 18  # pairs
    assert validation["label"].tolist() == list(range(9)) * 2
    labels = train.sized(100)[0].labels["label"]
    assert set(labels.tolist()) == set(range(9))
    train, _ = open_data(replace(config, photos=root / "photos"), sizes, seed=0)
    assert len(train.photos) == 2
    assert paired_kinds(train.sized(120)[0].labels).keys() == {"low_light", "haze", "snow"}
