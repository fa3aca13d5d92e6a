"""The shipped workflows and the blueprint on a running ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.e2e.graph import Graph, Runner, expand_blueprint, make_photo
from tools import demo
from tools.environment import ROOT
from tools.errors import ExecutionError, PromptRejectedError
from tools.host import PACK_NAME
from tools.restoration import restore
from tools.workflow import find_node

API = ROOT / "workflows/api"
(BLUEPRINT,) = (ROOT / "subgraphs").glob("*.json")
VIDEO = "SaveWEBM"
CLASSIFIER = "DiffRestorerDegradationClassifier"
SURE = ("noise", "low_light")
ONE_PHOTO = (
    "compare_decoders", "measure_restoration", "restore_by_kind", "restore_if_degraded",
    "restore_large", "restore_nano", "restore_override", "restore_photo", "restore_upscale_x2",
)  # fmt: skip


def load(name: str, photo: str = "", steps: int = 2) -> Graph:
    return Graph.load(API / f"{name}.json", photo).set("KSampler", steps=steps)


@pytest.fixture(scope="module")
def photos(runner: Runner) -> dict[str, str]:
    """Name -> uploaded photo: all of the demo clean, and those degraded that Nano knows best."""
    found = {}
    for sample in demo.SAMPLES:
        clean = Image.open(sample.photo).convert("RGB").resize((192, 192), Image.Resampling.LANCZOS)
        pictures = {f"clean_{sample.kind}": clean}
        if sample.kind in SURE:
            pictures[f"lq_{sample.kind}"] = demo.degrade_photo(clean, sample)
        for name, picture in pictures.items():
            found[name] = runner.upload(picture, f"{name}.png")
    return found


def write_folder(runner: Runner, name: str, photos: list[Image.Image]) -> Graph:
    folder = runner.host.base / "input" / name
    folder.mkdir()
    for index, photo in enumerate(photos):
        photo.save(folder / f"{index}.png")
    return load("restore_frames").set("LoadImageDataSetFromFolder", folder=name)


@pytest.mark.parametrize("name", ONE_PHOTO)
def test_workflow_runs(runner: Runner, photo: str, name: str) -> None:
    (restored,) = runner.pictures(load(name, photo))
    factor = 2 if name == "restore_upscale_x2" else 1
    assert restored.shape == (72 * factor, 96 * factor, 3)
    assert np.isfinite(restored).all()


def test_clean_photos_are_not_sampled(runner: Runner, photos: dict[str, str]) -> None:
    """Nor encoded; the classifier decides, which is right about some of each kind. What is seen
    as damaged, but not evidently, is not sampled either; what is more likely there than not may be,
    also where `clean` is likelier still."""
    labels, sampled = {}, set()
    for name, photo in photos.items():
        graph = load("restore_if_degraded", photo)
        executed, result = runner.executed(graph)
        text = result.outputs[graph.node(CLASSIFIER)]["text"][0]
        told = json.loads(text)
        labels[name] = next(iter(told))
        expensive = {"DiffRestorerDegradationControl", "KSampler", "DiffRestorerAwareVAEDecode"}
        skipped = not executed & expensive
        assert skipped or executed >= expensive, name
        assert skipped or max(told[kind] for kind in told if kind != "clean") > 0.5, name
        if skipped:
            (out,) = runner.client.images(result, find_node(graph.nodes, "SaveImage", "Restored"))
            sent = Image.open(runner.host.base / "input" / photo)
            assert np.array_equal(np.asarray(out), np.asarray(sent))
        else:
            sampled.add(name)
    assert any(label == "clean" for name, label in labels.items() if name.startswith("clean"))
    for kind in SURE:
        assert labels[f"lq_{kind}"] == kind
        assert f"lq_{kind}" in sampled


def test_only_one_way_runs(runner: Runner, photos: dict[str, str]) -> None:
    ways = set()
    for name in ("lq_noise", "lq_low_light"):
        graph = load("restore_by_kind", photos[name])
        executed, result = runner.executed(graph)
        text = result.outputs[graph.node(CLASSIFIER)]["text"][0]
        label = next(iter(json.loads(text)))
        matched = "DiffRestorerColorFix" in executed
        assert matched == (label in ("noise", "blur", "jpeg"))
        ways.add(matched)
    assert ways == {True, False}


def test_override_changes_the_result(runner: Runner, photos: dict[str, str]) -> None:
    graph = load("restore_override", photos["lq_noise"])
    edit = "DiffRestorerEditDegradation"
    (same,) = runner.pictures(graph.copy().set(edit, mode="mix", weight=0.0))
    (plain,) = runner.pictures(load("restore_nano", photos["lq_noise"]))
    (told,) = runner.pictures(graph.copy().set(edit, type="blur", mode="mix", weight=1.0))
    assert np.array_equal(same, plain)
    assert np.abs(told - plain).mean() > 1


def test_decoders_are_side_by_side(runner: Runner, photos: dict[str, str]) -> None:
    graph = load("compare_decoders", photos["lq_noise"])
    result = runner.run(graph)
    both = find_node(graph.nodes, "SaveImage", "Stock decode, aware decode")
    (stitched,) = (np.asarray(each) for each in runner.client.images(result, both))
    (aware,) = runner.client.images(result, find_node(graph.nodes, "SaveImage", "Restored"))
    assert stitched.shape == (192, 192 + 8 + 192, 3)
    assert np.array_equal(stitched[:, 200:], np.asarray(aware))
    assert not np.array_equal(stitched[:, :192], np.asarray(aware))


def test_measures_are_reported(runner: Runner, photos: dict[str, str]) -> None:
    graph = load("measure_restoration", photos["clean_noise"])
    shown = runner.run(graph).outputs[graph.node("DiffRestorerMeasure")]
    report = json.loads(shown["text"][0])
    assert report["gain"] == pytest.approx(report["psnr"] - report["psnr_lq"], abs=1e-3)
    assert shown["images"]


def test_folder_of_unequal_photos(runner: Runner) -> None:
    """Frames of several sizes make no video, which is muted then."""
    photos = [make_photo(*size) for size in ((96, 72), (53, 61), (64, 64))]
    graph = write_folder(runner, "unequal", photos)
    del graph.nodes[graph.node(VIDEO)]
    restored = runner.pictures(graph)
    shapes = sorted(each.shape[:2] for each in restored)
    assert shapes == sorted((photo.height, photo.width) for photo in photos)


def test_a_folder_is_restored_photo_by_photo(runner: Runner) -> None:
    """Each run takes the next one, saves it under its name, and says which of how many."""
    sizes = {"b": (96, 72), "a": (53, 61)}
    folder = runner.host.base / "input" / "by_name"
    folder.mkdir()
    (folder / "notes.txt").write_text("no photo")
    for name, size in sizes.items():
        make_photo(*size).save(folder / f"{name}.png")
    graph = load("restore_folder")
    shown = graph.node("PreviewAny")
    for index, name in enumerate(sorted(sizes)):
        result = runner.run(graph.set("DiffRestorerFolderPhoto", folder="by_name", index=index))
        (saved,) = result.outputs[graph.node("SaveImage")]["images"]
        assert saved["filename"].startswith(f"{name}_")
        assert result.outputs[shown]["text"] == [f"{index + 1} of 2: {name}.png"]
        (restored,) = runner.client.images(result, graph.node("SaveImage"))
        assert restored.size == sizes[name]
    with pytest.raises(ExecutionError, match="holds 2 photos, counted from 0"):
        runner.run(graph.set("DiffRestorerFolderPhoto", index=2))
    for outside in ("..", "by_name/..", "/"):
        with pytest.raises((ExecutionError, PromptRejectedError)) as refusal:
            runner.run(graph.set("DiffRestorerFolderPhoto", folder=outside, index=0))
        # Newer hosts refuse what their list does not have before the node can.
        by_node = isinstance(refusal.value, ExecutionError)
        expected = "folder: there is no" if by_node else f"folder: {outside!r} not in"
        assert expected in str(refusal.value)


def test_same_noise_for_all_frames(runner: Runner) -> None:
    """Three equal frames, two at once: fixed gives equal results, random does not."""
    graph = write_folder(runner, "frames", [make_photo()] * 3)
    graph.nodes[find_node(graph.nodes, "RebatchImages", "Frames at once")]["inputs"][
        "batch_size"
    ] = 2
    for behavior, least, most in (("fixed", 0.0, 0.5), ("random", 0.01, 255.0)):
        first, second, third = runner.pictures(
            graph.copy().set("LatentBatchSeedBehavior", seed_behavior=behavior)
        )
        assert least <= np.abs(first - second).mean() <= most
        assert np.abs(first - third).mean() <= 0.5  # the first of its batch


def test_frames_make_one_video(runner: Runner) -> None:
    """Though each goes through the graph on its own."""
    graph = write_folder(runner, "film", [make_photo(seed=seed) for seed in range(3)])
    result = runner.run(graph.set(VIDEO, fps=10.0))
    (video,) = result.outputs[graph.node(VIDEO)]["images"]
    assert len(result.outputs[graph.node("SaveImage")]["images"]) == 3
    place = Path(runner.host.base, "output", video["subfolder"], video["filename"])
    with av.open(place) as film:
        (stream,) = film.streams.video
        assert (stream.width, stream.height, stream.average_rate) == (96, 72, 10)
        assert len(list(film.decode(video=0))) == 3


def test_programs_read_the_kinds_of_every_workflow(runner: Runner, photo: str) -> None:
    """Also of the blueprint, which has no Classifier."""
    picture = Image.open(runner.host.base / "input" / photo)
    told = [
        restore(runner.client, load(name).nodes, picture, name).probabilities
        for name in ("restore_photo", "restore_nano")
    ]
    assert told[0] == told[1]
    assert 0 <= min(told[0].values()) < max(told[0].values()) <= 1


def test_blueprint_is_offered_and_runs(runner: Runner, photo: str, tmp_path: Path) -> None:
    listed = runner.client.get("/global_subgraphs")
    (number,) = (key for key, each in listed.items() if each["name"] == BLUEPRINT.stem)
    assert listed[number]["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"
    sent = json.loads(runner.client.get(f"/global_subgraphs/{number}")["data"])
    assert sent == json.loads(BLUEPRINT.read_text())
    plain = load("restore_nano", photo, steps=3)
    nodes, output = expand_blueprint(sent, image=[plain.node("LoadImage"), 0])
    graph = Graph({key: plain.nodes[key] for key in (plain.node("LoadImage"),)} | nodes)
    graph.nodes["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": output, "filename_prefix": "blueprint"},
        "_meta": {"title": "Restored"},
    }
    assert np.array_equal(runner.pictures(graph)[0], runner.pictures(plain)[0])
