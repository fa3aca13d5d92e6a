"""The evaluation: test sets, metrics, report and the whole program against a real server."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import save_file
from torchvision.models import alexnet

from diff_restorer.degradations import KINDS
from tests import photos as test_photos
from tests.e2e.graph import Runner
from tools.client import Client
from tools.errors import ServerUnreachableError, WorkflowError
from tools.host import free_port
from tools.restoration import NANO_WORKFLOW
from tools.workflow import find_node, load_workflow
from training import evaluate
from training.common import DataConfig
from training.evaluate import Config, PhotoSets
from training.evaluation import nafnet, real_pairs, report, tables, testsets
from training.evaluation.baselines import COMPETITORS
from training.evaluation.competing import run_baselines
from training.evaluation.metrics import FILES, Learned
from training.evaluation.pictures import (
    pixel_digest,
    read_image,
    read_note,
    save_picture,
    to_image,
    to_picture,
)
from training.evaluation.report import PhotoScore
from training.evaluation.restoring import Task, run_workload, vae_round_trip
from training.evaluation.testsets import synthetic
from training.layouts import kind_of
from training.loop import LoopConfig


def small_photo(name: str, width: int, height: int) -> Image.Image:
    return test_photos.picture(name).resize((width, height), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    small_photo("astronaut", 61, 50).save(folder / "astronaut.png")
    small_photo("coffee", 56, 45).save(folder / "coffee.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noisy and a dark photo, a small one, and one whose partner has another size."""
    folder = tmp_path_factory.mktemp("pairs")
    clean = small_photo("chelsea", 48, 40)
    levels = np.asarray(clean, np.float32)
    noise = np.random.default_rng(0).normal(0, 25, levels.shape)
    lq = {
        "noise_real": Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8)),
        "lowlight_real": Image.fromarray((levels / 4).astype(np.uint8)),
        "lowres_x4": clean.resize((12, 10), Image.Resampling.BICUBIC),
        "rain_odd": clean.resize((30, 40)),
    }
    for name, picture in lq.items():
        for role in ("lq", "gt"):
            (folder / name / role).mkdir(parents=True)
        picture.save(folder / name / "lq/cat.png")
        clean.save(folder / name / "gt/cat.png")
    return folder


def test_test_sets_are_a_function_of_the_seed_and_the_photo(photos: Path, tmp_path: Path):
    first, again = (synthetic(photos, tmp_path / name, 0, 7).cases for name in ("a", "b"))
    other = synthetic(photos, tmp_path / "c", 0, 8).cases
    alone = synthetic(photos, tmp_path / "d", 1, 7).cases
    assert [case.id for case in first] == [
        f"{k}/{n}" for n in ("astronaut", "coffee") for k in KINDS
    ]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(read_image(one.lq), read_image(two.lq))
        assert one.severity == two.severity
    for one, two in zip(first, alone, strict=False):
        assert torch.equal(read_image(one.lq), read_image(two.lq)), "depends on other photos"
    same = {
        one.kind
        for one, two in zip(first, other, strict=True)
        if torch.equal(read_image(one.lq), read_image(two.lq))
    }
    assert same == {"jpeg", "clean"}, "only these two have nothing random"


def test_severities_lie_in_the_middle_half(photos: Path, tmp_path: Path):
    found = [case for seed in range(4) for case in synthetic(photos, tmp_path, 0, seed).cases]
    free = [case.severity for case in found if case.severity is not None]
    assert len(free) == 4 * 2 * 6
    assert len(set(free)) == len(free)
    assert 0.25 <= min(free) < 0.4
    assert 0.6 < max(free) <= 0.75


def test_the_noise_has_sigma_50_and_the_jpeg_quality_10():
    grey = torch.full((1, 3, 200, 200), 0.5)
    noisy, _ = testsets.make_lq("noise", grey, "grey", 0)
    assert float((noisy - grey).std()) * 255 == pytest.approx(50, rel=0.03)
    photo = to_image(small_photo("astronaut", 64, 48))
    compressed, _ = testsets.make_lq("jpeg", photo, "photo", 0)
    with io.BytesIO() as stream:
        to_picture(photo).save(stream, "JPEG", quality=10)
        expected = to_image(Image.open(stream))
    assert torch.equal(compressed, expected)


def test_a_changed_photo_is_degraded_again(photos: Path, tmp_path: Path):
    folder = tmp_path / "own"
    folder.mkdir()
    small_photo("coffee", 40, 32).save(folder / "p.png")
    before = {
        case.id: read_image(case.lq) for case in synthetic(folder, tmp_path / "x", 0, 0).cases
    }
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*.png")}
    synthetic(folder, tmp_path / "x", 0, 0)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "made again for nothing"
    small_photo("chelsea", 40, 32).save(folder / "p.png")
    for case in synthetic(folder, tmp_path / "x", 0, 0).cases:
        assert not torch.equal(read_image(case.lq), before[case.id])


def test_a_result_depends_on_pixels_and_not_on_notes(photos: Path, tmp_path: Path):
    with Image.open(photos / "coffee.png") as picture:
        for name in ("a", "b"):
            save_picture(tmp_path / name, picture, {"key": name})
    first, second = (tmp_path / name for name in ("a", "b"))
    assert first.read_bytes() != second.read_bytes()
    assert pixel_digest(first) == pixel_digest(second) != pixel_digest(photos / "astronaut.png")


def test_pairs_are_matched_and_misfits_are_named(pairs: Path, tmp_path: Path):
    for role in ("lq", "gt"):
        (pairs / "noise_real" / role / ".DS_Store").write_bytes(b"no photo")
    found = real_pairs.real(pairs, tmp_path, 0)
    kinds = {case.set: case.kind for case in found.cases}
    assert kinds == {
        "pairs/lowlight_real": "low_light",
        "pairs/lowres_x4": "low_res",
        "pairs/noise_real": "noise",
    }
    for case in found.cases:
        assert read_image(case.lq).shape == read_image(case.gt).shape == (1, 3, 40, 48)
    ((name, reason),) = found.failed.items()
    assert "rain_odd" in name
    assert "30 x 40" in reason


def test_a_published_set_is_read_in_its_layout(tmp_path: Path):
    for split, half in ((s, h) for s in ("train", "test") for h in ("low", "high")):
        (tmp_path / "LOL" / split / half).mkdir(parents=True)
        name = "astronaut" if split == "train" else "coffee"
        picture = small_photo(name, 32, 24)
        dark = ImageEnhance.Brightness(picture).enhance(0.25) if half == "low" else picture
        dark.save(tmp_path / "LOL" / split / half / "1.png")
    found = real_pairs.real(tmp_path / "LOL", tmp_path / "cache", 0)
    assert [(c.set, c.name, c.kind) for c in found.cases] == [
        ("pairs/LOL_low_light", f"{split}_low_1", "low_light") for split in ("test", "train")
    ]
    for case in found.cases:
        assert read_image(case.lq).mean() < 0.5 * read_image(case.gt).mean()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("raindrop_real", "raindrop"), ("rain_synth", "rain"), ("LowLight-v2", "low_light"),
     ("low_light", "low_light"), ("mine", None)],
)  # fmt: skip
def test_a_folder_is_named_after_its_kind(folder: str, kind: str | None):
    assert kind_of(folder) == kind


def test_bad_folders_are_named(tmp_path: Path, photos: Path):
    with pytest.raises(ValueError, match="found no photo"):
        synthetic(tmp_path, tmp_path / "cache", 0, 0)
    with pytest.raises(ValueError, match="pairs"):
        real_pairs.real(tmp_path / "nowhere", tmp_path, 0)
    small_photo("coffee", 16, 16).save(tmp_path / "a.png")
    small_photo("coffee", 16, 16).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="several photos named a"):
        synthetic(tmp_path, tmp_path / "cache", 0, 0)
    assert evaluate.main(Config(out=tmp_path / "out")) == 1


def test_missing_weights_are_named_and_break_nothing(tmp_path: Path, photos: Path):
    learned = Learned(tmp_path)
    assert set(learned.missing) == {"lpips", "dists", "fid"}
    assert FILES["lpips"] in learned.missing["lpips"]
    gt = read_image(photos / "coffee.png")
    assert learned.score(gt, gt) == {}
    assert learned.fid(iter([(gt, gt)])) is None


@pytest.mark.slow
def test_lpips_is_measured_where_its_file_is(tmp_path: Path, photos: Path):
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / FILES["lpips"])
    learned = Learned(tmp_path)
    assert set(learned.missing) == {"dists", "fid"}
    gt = to_image(small_photo("astronaut", 96, 80))
    lq, _ = testsets.make_lq("noise", gt, "x", 0)
    assert learned.score(gt, gt)["lpips"] == pytest.approx(0, abs=1e-6)
    assert learned.score(lq, gt)["lpips"] > 0.001


@pytest.fixture(scope="module")
def offline(photos: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose restored pictures are made up, so that it needs no server."""
    out = tmp_path_factory.mktemp("offline")
    (pairs / "rain_odd").rename(out / "rain_odd")
    config = Config(
        PhotoSets(photos, pairs, suites=("own", "pairs")), out, workers=1, weights=out,
        server=f"http://127.0.0.1:{free_port()}", sheet_photos=1,
    )  # fmt: skip
    cases = {case.id: case for case in evaluate.open_cases(config).cases}
    restored, round_trips = evaluate.server_work(config, list(cases.values()))
    for task, key in restored.pending():
        case = cases[task.name]
        seen = dict.fromkeys(KINDS, 0.02) | {case.kind or "noise": 0.9}
        note = {"key": key, "probabilities": seen, "seconds": 1.5}
        halfway = (read_image(case.lq) + read_image(case.gt)) / 2
        save_picture(task.result, to_picture(halfway), note)
    for task, key in round_trips.pending():
        save_picture(task.result, to_picture(read_image(task.photo) * 0.9), {"key": key})
    return config


@pytest.fixture(scope="module")
def metrics(offline: Config) -> dict:
    """The file that a run of the whole program writes."""
    assert evaluate.main(offline) == 0
    return json.loads((offline.out / "metrics.json").read_text())


def test_the_report_has_the_scores_of_every_photo(offline: Config, metrics: dict):
    assert len(metrics["photos"]) == 2 * 9 + 3
    assert {photo["decided_on"] for photo in metrics["photos"][:18]} == {False}
    for photo in metrics["photos"]:
        gain = photo["scores"]["restored"]["psnr"] - photo["scores"]["lq"]["psnr"]
        if photo["set"] != "clean":
            # Half of the error is 6 dB; rounding to 8 bits takes a little.
            assert gain == pytest.approx(6.02, abs=0.6)
    assert set(metrics["sets"]) == {
        *KINDS,
        "pairs/noise_real",
        "pairs/lowlight_real",
        "pairs/lowres_x4",
    }
    assert metrics["overall"]["gain"] == pytest.approx(6.02, abs=0.3)
    assert metrics["overall"]["accuracy"] == 1
    assert metrics["about"]["seed"] == 0
    assert len(metrics["about"]["weights_sha256"]) == 64


def test_the_best_baseline_is_the_best_of_the_mean(metrics: dict):
    for kind in KINDS[:-1]:
        row = metrics["sets"][kind]
        of_kind = [photo["baselines"] for photo in metrics["photos"] if photo["set"] == kind]
        means = {name: np.mean([scores[name] for scores in of_kind]) for name in of_kind[0]}
        assert set(means) == set(COMPETITORS[kind])
        best = row["best_baseline"]
        assert best["name"] == max(means, key=means.__getitem__)
        assert best["psnr"] == pytest.approx(means[best["name"]])


def test_the_bars_are_judged(metrics: dict):
    verdicts = {bar["name"]: bar["passed"] for bar in metrics["bars"]}
    assert len(verdicts) == 7
    assert verdicts["mean PSNR over the eight kinds at least 5 dB above LQ"]
    assert verdicts["classifier at least 92 % over nine classes"]
    assert verdicts["real noise pairs improve on average"]


def test_the_run_writes_pictures_and_tables(offline: Config, metrics: dict):
    for name in ("bars.png", "confusion.png", "tsne.png", "sheet.jpg", "sheets/noise.jpg"):
        with Image.open(offline.out / name) as picture:
            assert min(picture.size) > 100
    text = (offline.out / "table.md").read_text()
    for heading in ("Quality bars", "Goals", "Own", "pairs", "Anchors", "baselines", "Classifier"):
        assert heading in text
    assert f"LPIPS: not available: file {FILES['lpips']} missing" in text
    scores = json.loads((offline.out / "scores.json").read_text())
    assert scores["sets"]["noise"]["photos"] == 2
    assert scores["mean_gain"] == pytest.approx(metrics["overall"]["gain"], abs=1e-3)


def score(kind: str, lq: float, restored: float, seen: str, **more: float) -> PhotoScore:
    rows = {"lq": {"psnr": lq, "ssim": 0.5}, "restored": {"psnr": restored, "ssim": 0.6}}
    return PhotoScore(kind, "p", kind, (9, 9), rows, probabilities={seen: 1.0}, baselines=more)


def test_bars_fail_where_they_should():
    photos = [score(kind, 20, 24, kind, bicubic=25) for kind in KINDS[:-2]]
    photos += [score("raindrop", 20, 19, "rain", bicubic=18), score("clean", 100, 29, "clean")]
    summary = report.summarize(photos)
    bars = {bar.name.split(" at least")[0]: bar for bar in report.quality_bars(summary)}
    assert summary["overall"]["gain"] == pytest.approx((7 * 4 - 1) / 8)
    assert bars["mean PSNR over the eight kinds"].passed is False
    assert bars["no kind below LQ"].value == "raindrop -1.00"
    assert bars["clean input"].passed is False
    assert bars["better than the best classical baseline on"].value == "1 of 8: raindrop"
    assert bars["classifier"].value == "88.9%"
    assert bars["real noise pairs improve on average"].passed is None
    counts = np.array(summary["confusion"]["counts"])
    assert counts[KINDS.index("raindrop"), KINDS.index("rain")] == 1
    assert counts.trace() == 8
    some = report.summarize(photos[:3])
    assert report.quality_bars(some)[0].passed is None, "a part of the kinds proves nothing"
    assert "**fail**" in tables.bars_table(report.quality_bars(summary))


def test_baseline_scores_are_kept(offline: Config, metrics: dict):
    cases = evaluate.open_cases(offline).cases[:2]
    cache = offline.out / "baselines"
    path = cache / f"{cases[0].id}.json"
    before = path.read_text()
    scores, failed = run_baselines(cases, cache, 1)
    assert not failed
    assert path.read_text() == before, "a score was measured again: its time would differ"
    assert scores[cases[0].id] == json.loads(before)["scores"]


def test_several_processes_give_the_same_scores(offline: Config, metrics: dict, tmp_path: Path):
    cases = evaluate.open_cases(offline).cases[:2]
    scores, failed = run_baselines(cases, tmp_path, 2)
    assert not failed
    for case in cases:
        (photo,) = (p for p in metrics["photos"] if (p["set"], p["name"]) == (case.set, case.name))
        found = {name: got["psnr"] for name, got in scores[case.id].items()}
        assert found == pytest.approx(photo["baselines"])


def test_nafnet_begins_as_identity_and_takes_any_size():
    network = nafnet.new_nafnet(8, (1, 1, 1))
    image = torch.rand(1, 3, 37, 50)
    assert torch.equal(network(image), image)
    default = nafnet.new_nafnet(nafnet.Config.width, nafnet.Config.blocks)
    assert 1e6 < sum(parameter.numel() for parameter in default.parameters()) < 4e6


def test_nafnet_trains_and_is_scored(photos: Path, offline: Config, metrics: dict, tmp_path: Path):
    file = nafnet.main(
        nafnet.Config(
            LoopConfig(tmp_path / "nafnet", steps=20, batch_size=2, lr=1e-3, warmup=2, workers=0),
            DataConfig(photos, crop=32, held_out=2, validation_samples=9),
            width=8,
            blocks=(1, 1, 1),
        )
    )
    network = nafnet.load_network(file)
    image = torch.rand(1, 3, 24, 24)
    assert not torch.equal(network(image), image), "it learned nothing"
    missed = [bar for bar in metrics["bars"] if bar["passed"] is False]
    assert evaluate.main(replace(offline, nafnet=file, check=True)) == (2 if missed else 0)
    found = json.loads((offline.out / "metrics.json").read_text())
    assert 5 < found["overall"]["nafnet"]["psnr"] < 50
    assert "NAFNet" in (offline.out / "table.md").read_text()
    with pytest.raises(ValueError, match="no network that spandrel reads"):
        nafnet.load_network(offline.file)


def test_the_round_trip_takes_the_vae_of_the_workflow():
    trip = vae_round_trip(load_workflow(NANO_WORKFLOW))
    classes = sorted(node["class_type"] for node in trip.values())
    assert classes == ["DiffRestorerNanoLoader", "LoadImage", "SaveImage", "VAEDecode", "VAEEncode"]
    with pytest.raises(WorkflowError, match="no VAE"):
        vae_round_trip({"1": {"class_type": "LoadImage", "inputs": {}}})


def test_a_dead_server_ends_the_run_with_a_message(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server = f"http://127.0.0.1:{free_port()}"
    sets = PhotoSets(photos, suites=("own",), limit=1)
    assert evaluate.main(Config(sets, tmp_path, server=server)) == 1
    assert "no ComfyUI answers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(runner: Runner, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The whole program on two tiny photos and one that cannot be read."""
    out = tmp_path_factory.mktemp("run")
    clean = out / "clean"
    clean.mkdir()
    for path in photos.iterdir():
        (clean / path.name).write_bytes(path.read_bytes())
    (clean / "broken.png").write_bytes(b"no picture")
    workflow = load_workflow(NANO_WORKFLOW)
    workflow[find_node(workflow, "KSampler")]["inputs"]["steps"] = 2
    (out / "quick.json").write_text(json.dumps(workflow))
    config = Config(
        PhotoSets(clean, suites=("own",)),
        out,
        out / "quick.json",
        server=runner.host.url,
        workers=1,
        sheet_photos=1,
    )
    assert evaluate.main(config) == 1, "the broken photo must show in the exit code"
    return config


def test_the_program_restores_through_the_api(run: Config):
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert len(metrics["photos"]) == 18
    assert [Path(name).name for name in metrics["failed"]] == ["broken.png"]
    assert "broken.png" in (run.out / "table.md").read_text()
    for photo in metrics["photos"]:
        assert set(photo["probabilities"]) == set(KINDS)
        assert 0.3 < max(photo["probabilities"].values()) <= 1
        assert min(photo["probabilities"].values()) >= 0
        assert {"lq", "restored", "vae"} <= set(photo["scores"])
        assert photo["seconds"] > 0
    assert metrics["sets"]["low_light"]["gain"] > 1


def test_a_second_run_does_only_what_is_missing(run: Config):
    results = sorted((run.out / "restored").rglob("*.png"))
    assert len(results) == 18
    stamps = {path: path.stat().st_mtime_ns for path in results}
    results[3].unlink()
    assert evaluate.main(run) == 1
    again = {path for path in results if path.stat().st_mtime_ns != stamps[path]}
    assert again == {results[3]}


def test_another_model_file_makes_every_result_stale(run: Config, photos: Path, tmp_path: Path):
    cases = evaluate.open_cases(replace(run, data=PhotoSets(photos, suites=("own",)))).cases
    workload, _ = evaluate.server_work(run, cases)
    assert workload.pending() == []
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    other, _ = evaluate.server_work(replace(run, file=tmp_path / "other.safetensors"), cases)
    assert len(other.pending()) == len(cases)


def test_a_failed_photo_does_not_stop_the_others(run: Config, runner: Runner, tmp_path: Path):
    good = evaluate.open_cases(run).cases[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    tasks = (Task("bad", broken, tmp_path / "1.png"), Task("good", good.lq, tmp_path / "2.png"))
    workload = replace(evaluate.server_work(run, [good])[0], tasks=tasks)
    failed = run_workload(runner.client, workload, workload.pending())
    assert list(failed) == ["bad"]
    assert read_note(tmp_path / "2.png")["probabilities"]
    with pytest.raises(ServerUnreachableError):
        run_workload(
            Client(f"127.0.0.1:{free_port()}"), replace(workload, model="x"), [(tasks[1], "")]
        )


def test_it_starts_a_server_of_its_own(pairs: Path, tmp_path: Path, comfyui_root: Path):
    only = tmp_path / "pairs"
    (only / "noise_real").parent.mkdir()
    (only / "noise_real").symlink_to(pairs / "noise_real", target_is_directory=True)
    config = Config(PhotoSets(pairs=only), tmp_path / "out", workers=1)
    assert evaluate.main(config) == 0
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert metrics["sets"]["pairs/noise_real"]["photos"] == 1
