"""Suites beyond the own test sets: others' degradations, mixes, near-clean photos; the anchors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import structural_similarity_index_measure

from diff_restorer.degradations import KINDS
from diff_restorer.similarity import IDENTICAL
from tests.photos import picture
from tools.host import free_port
from training import evaluate
from training.evaluate import Config, PhotoSets
from training.evaluation import anchors, harm, independent, report, suites, tables, testsets
from training.evaluation.metrics import fidelity
from training.evaluation.pictures import (
    read_image,
    read_note,
    save_picture,
    to_image,
    to_picture,
    weights_digest,
)
from training.evaluation.report import PhotoScore
from training.evaluation.testsets import Case

EVERY = [
    pytest.param(kind, corruption, id=f"{kind}-{'-'.join(corruption.steps)}-{index}")
    for kind, corruptions in independent.CORRUPTIONS.items()
    for index, corruption in enumerate(corruptions)
]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return picture("astronaut").crop((150, 40, 262, 136))


@pytest.fixture
def cbsd68(tmp_path: Path, photo: Image.Image) -> Path:
    """A folder named as one whose first 34 photos guided decisions."""
    folder = tmp_path / "CBSD68"
    folder.mkdir()
    for index in range(36):
        photo.crop((index, 0, index + 64, 48)).save(folder / f"{index:02d}.png")
    return folder


def test_photos_that_guided_decisions_are_told_apart(cbsd68: Path, tmp_path: Path):
    photos = testsets.clean_photos(cbsd68)
    assert [p.name for p in photos if not p.decided_on] == ["34", "35"]
    assert [p.name for p in testsets.untouched(photos, 1)] == ["34"]
    assert testsets.untouched(photos[:3], 2) == photos[:2], "there is no other photo"
    cases = suites.mixes(cbsd68, tmp_path / "out", 0, 0).cases
    assert {(case.name, case.decided_on) for case in cases} == {("34", False), ("35", False)}
    elsewhere = cbsd68.rename(tmp_path / "holiday")
    assert not any(p.decided_on for p in testsets.clean_photos(elsewhere))


@pytest.mark.parametrize(("kind", "corruption"), EVERY)
def test_a_variant_of_others_degrades_and_is_a_function_of_its_seed(
    kind: str, corruption: independent.Corruption, photo: Image.Image
):
    try:
        independent.open_package(corruption.package)
    except testsets.MissingPackageError as error:
        pytest.skip(": ".join(error.args))
    levels = np.asarray(photo)
    before = levels.copy()
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    first, again = (independent.apply(corruption, levels, 5) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(levels, before), "the photo was changed in place"
    assert np.random.rand() == expected, "NumPy's own generator moved"
    assert first.shape == levels.shape
    assert first.dtype == np.uint8
    lost = fidelity(to_image(Image.fromarray(first)), to_image(photo))["psnr"]
    assert 6 < lost < 36, f"{kind}: {lost:.1f} dB is no degradation to restore"


def test_a_photo_that_is_too_small_is_named(tmp_path: Path, photo: Image.Image):
    (tmp_path / "clean").mkdir()
    photo.resize((31, 40)).save(tmp_path / "clean/tiny.png")
    found = suites.by_others(tmp_path / "clean", tmp_path / "out", 0, 0)
    assert found.cases == []
    assert "found 31 x 40" in found.failed["independent/noise/tiny"]


def test_every_kind_has_variants_and_photos_draw_different_ones():
    assert set(independent.CORRUPTIONS) == set(KINDS[:-1])
    drawn = [independent.draw("noise", name, 0) for name in "abcdefghijkl"]
    assert drawn == [independent.draw("noise", name, 0) for name in "abcdefghijkl"]
    assert len({seed for _, seed in drawn}) == 12
    assert len({str(corruption) for corruption, _ in drawn}) >= 4


def test_a_missing_package_is_named_and_breaks_nothing(
    cbsd68: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for package in ("albumentations", "imagecorruptions"):
        monkeypatch.setitem(sys.modules, package, None)  # what import makes of "not installed"
    found = suites.by_others(cbsd68, tmp_path / "out", 0, 0)
    assert found.cases == []
    assert found.failed == {}
    assert sum(found.missing.values()) == 2 * 8
    assert {package for package, _ in found.missing} == {"albumentations", "imagecorruptions"}
    config = Config(PhotoSets(cbsd68, suites=("independent",)), tmp_path / "out")
    with pytest.raises(ValueError, match="pip install albumentations"):
        evaluate.open_cases(config)


def test_mixes_and_looks_are_a_function_of_seed_and_photo(cbsd68: Path, tmp_path: Path):
    for make in (suites.mixes, suites.harm):
        first, again, other = (
            make(cbsd68, tmp_path / f"{make.__name__}{index}", 1, seed).cases
            for index, seed in enumerate((0, 0, 1))
        )
        same = {
            one.set
            for one, two, three in zip(first, again, other, strict=True)
            if torch.equal(read_image(one.lq), read_image(two.lq))
            and torch.equal(read_image(one.lq), read_image(three.lq))
        }
        assert same == {
            case.set for case in first if case.set.startswith("harm") and case.set != "harm/sigma 5"
        }
        for one, two in zip(first, again, strict=True):
            assert torch.equal(read_image(one.lq), read_image(two.lq))


@pytest.mark.parametrize("kinds", suites.MIXES, ids="+".join)
def test_a_mix_degrades_a_photo(kinds: tuple[str, ...], photo: Image.Image):
    image = to_image(photo)
    mixed, _ = suites.make_mix(kinds, image, "astronaut", 0)
    assert mixed.shape == image.shape
    assert 5 < fidelity(mixed, image)["psnr"] < 32


def test_looks_are_what_they_say(photo: Image.Image):
    image = to_image(photo)
    made = {look: suites.make_look(look, image, "p", 0)[0] for look in suites.LOOKS}
    assert torch.equal(made["clean"], image)
    assert float(made["flat"].std() / image.std()) == pytest.approx(0.8)
    assert float(made["flat"].mean()) == pytest.approx(float(image.mean()), abs=1e-5)
    assert float(made["dark"].mean() / image.mean()) == pytest.approx(0.8)
    assert torch.equal(made["grey"][:, 0], made["grey"][:, 2])
    assert float((made["sigma 5"] - image).std()) * 255 == pytest.approx(5, rel=0.1)
    for look in ("q 80", "soft"):
        assert 27 < fidelity(made[look], image)["psnr"] < 42


def test_what_has_to_come_back(cbsd68: Path, tmp_path: Path):
    cases = {case.set: case for case in suites.harm(cbsd68, tmp_path / "out", 1, 0).cases}
    itself = {name for name, case in cases.items() if case.lq == case.gt}
    assert itself == {"harm/clean", "harm/flat", "harm/dark", "harm/grey"}
    clean = read_image(cbsd68 / "34.png")
    for name in set(cases) - itself:
        assert torch.equal(read_image(cases[name].gt), clean)
        assert not torch.equal(read_image(cases[name].lq), clean)


def test_mild_pairs_are_taken_as_they_are(tmp_path: Path, photo: Image.Image):
    for role in ("lq", "gt"):
        (tmp_path / "mild" / role).mkdir(parents=True)
    photo.save(tmp_path / "mild/gt/a.png")
    Image.fromarray(np.asarray(photo) // 2).save(tmp_path / "mild/lq/a.png")
    photo.save(tmp_path / "mild/lq/alone.png")
    found = suites.harm(tmp_path / "mild", tmp_path / "out", 0, 0)
    (case,) = found.cases
    assert (case.set, case.name, case.kind) == (suites.MILD_PAIRS, "mild_a", None)
    assert case.decided_on
    assert [Path(name).name for name in found.failed] == ["alone.png"]


def near_clean(name: str, before: float, after: float, look: str = "grey") -> PhotoScore:
    rows = {"lq": {"psnr": before, "ssim": 1.0}, "restored": {"psnr": after, "ssim": 0.9}}
    return PhotoScore(f"harm/{look}", name, None, (9, 9), rows, probabilities={"clean": 1.0})


def test_harm_is_counted_up_to_one_grey_level():
    level = torch.full((1, 3, 16, 16), 100 / 255)
    assert fidelity(level, level + 1 / 255)["psnr"] == pytest.approx(harm.CEILING, abs=1e-3)
    photos = [
        near_clean("same", 100, 100),
        near_clean("invisible", 100, 48),
        near_clean("visible", 100, 39),
        near_clean("ruined", 100, 20),
        near_clean("better", 34, 36, "sigma 5"),
        near_clean("a little worse", 34, 33.5, "sigma 5"),
        near_clean("worse", 34, 29, "sigma 5"),
        near_clean("pair", 31, 25, "real"),
    ]
    found = harm.summarize_harm(photos)
    grey, noisy, every = found["looks"]["grey"], found["looks"]["sigma 5"], found["all"]
    assert grey["lose"] == 0.5
    assert grey["below_40"] == 0.5
    assert grey["below_30"] == 0.25
    assert grey["lowest"] == 20
    assert grey["percentile_5"] == pytest.approx(20 + 0.15 * 19)
    assert noisy["lose"] == pytest.approx(1 / 3)
    assert noisy["below_40"] is None, "none was above"
    assert every["photos"] == 7, "real pairs are counted apart"
    assert every["below_40"] == 0.5
    worst = [entry["photo"] for entry in found["worst"]]
    assert worst[:3] == ["harm/grey/ruined", "harm/grey/visible", "harm/real/pair"]
    assert "harm/grey/same" not in worst
    assert harm.summarize_harm([]) == {}


def test_goals_are_judged_for_information():
    photos = [near_clean(str(index), 100, 100 if index else 29) for index in range(40)]
    summary = report.summarize(photos) | {"harm": harm.summarize_harm(photos)}
    (goal,) = report.goals(summary)
    assert goal.value == "2.5%, 2.5%"
    assert goal.passed is False
    assert all(bar.passed is None for bar in report.quality_bars(summary))


def test_published_figures_stand_beside_their_own_set_only():
    rows = {"lq": {"psnr": 15.0, "ssim": 0.2}, "restored": {"psnr": 25.0, "ssim": 0.6}}
    sets = report.summarize([PhotoScore("noise", "p", "noise", (9, 9), rows)])["sets"]
    assert "Restormer 28.60" in tables._scores_table(sets, None, "CBSD68")
    assert "Restormer" not in tables._scores_table(sets, None, "Set14")


def test_bm3d_removes_noise_where_it_is_installed(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
):
    gt, lq = tmp_path / "gt.png", tmp_path / "lq.png"
    photo.save(gt)
    noisy, _ = testsets.make_lq("noise", to_image(photo), "p", 0)
    to_picture(noisy).save(lq)
    cases = [Case("noise", "p", "noise", gt, lq), Case("blur", "p", "blur", gt, lq)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bm3d", None)
        assert "non-commercial" in (anchors.run_bm3d(tmp_path, cases) or "")
    pytest.importorskip("bm3d")
    assert anchors.run_bm3d(tmp_path, cases) is None
    found = read_image(anchors.anchor_path(tmp_path, "bm3d", cases[0]))
    before = fidelity(read_image(lq), read_image(gt))["psnr"]
    assert fidelity(found, read_image(gt))["psnr"] > before + 7
    assert not anchors.anchor_path(tmp_path, "bm3d", cases[1]).exists()


def test_the_report_has_a_section_for_every_suite(cbsd68: Path, tmp_path: Path):
    """Restored pictures are made up, so that it needs no server: grey photos come back black."""
    config = Config(
        PhotoSets(cbsd68, suites=("independent", "mixes", "harm"), limit_untouched=1),
        tmp_path / "out", server=f"http://127.0.0.1:{free_port()}", workers=1, weights=tmp_path,
    )  # fmt: skip
    cases = evaluate.open_cases(config).cases
    workload, round_trips = evaluate.server_work(config, cases)
    assert round_trips.tasks == ()
    for task, key in workload.pending():
        image = read_image(task.photo)
        result = torch.zeros_like(image) if task.name.startswith("harm/grey") else image
        note = {"key": key, "probabilities": {"haze": 0.7, "clean": 0.3}, "seconds": 1.0}
        save_picture(task.result, to_picture(result), note)
    assert evaluate.main(config) == 0
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert len(metrics["photos"]) == len(cases) >= 8 + 7
    assert metrics["suites"]["mixes"]["gain"] == 0
    assert metrics["suites"]["mixes"]["standing"]["untouched"]["photos"] == 8
    assert metrics["harm"]["all"]["lose"] == pytest.approx(1 / 7)
    (worst,) = metrics["harm"]["worst"]
    assert worst["photo"] == "harm/grey/CBSD68_34"
    text = (config.out / "table.md").read_text()
    for heading in ("Mixes", "Harm", "low_light+blur+jpeg", "grey/CBSD68_34", "Notes"):
        assert heading in text
    with Image.open(config.out / "sheets/harm_worst.jpg") as sheet:
        assert sheet.width > 3 * 64
    stamps = {path: path.stat().st_mtime_ns for path in (config.out / "testset").rglob("*.png")}
    assert evaluate.main(replace(config, check=True)) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "made again for nothing"
    assert read_note(cases[0].lq)["key"]


def test_psnr_and_ssim_are_those_of_other_libraries(photo: Image.Image):
    gt = to_image(photo)
    lq, _ = testsets.make_lq("noise", gt, "x", 0)
    ours = fidelity(lq, gt)
    one, two = (image[0].permute(1, 2, 0).numpy() for image in (lq, gt))
    assert ours["psnr"] == pytest.approx(peak_signal_noise_ratio(two, one, data_range=1), abs=1e-3)
    _, places = structural_similarity_index_measure(lq, gt, data_range=1.0, return_full_image=True)
    # torchmetrics mirrors the photo at its edges; here only places count where the window fits.
    assert ours["ssim"] == pytest.approx(float(places[..., 5:-5, 5:-5].mean()), abs=1e-3)
    assert fidelity(gt, gt) == {"psnr": IDENTICAL, "ssim": pytest.approx(1)}


def test_scores_in_the_metadata_do_not_change_the_weights_digest(tmp_path: Path) -> None:
    def digest_of(value: float, note: str) -> str:
        file = tmp_path / "model.safetensors"
        save_file({"a": torch.tensor([1.0, value])}, file, metadata={"scores": note})
        return weights_digest(file)

    assert digest_of(2, "none") == digest_of(2, "many")
    assert digest_of(2, "none") != digest_of(3, "none")
    (tmp_path / "text").write_text("no model at all")
    with pytest.raises(ValueError, match="text: not a safetensors file"):
        weights_digest(tmp_path / "text")
