"""The restore program with a real server: what it keeps, skips and refuses."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageFile

from tests.e2e.graph import Graph, Runner, make_photo
from tests.e2e.holding import Holding, pixels_of, put_photos, read_report, run, wait_until
from tests.e2e.test_photo import as_photo
from tools import photo, photo_writer, restore
from tools.batch import Batch, Event, Options, Server, server_of
from tools.client import AsyncClient, Client, Result
from tools.environment import ROOT
from tools.errors import DECODING, ClientError, ServerUnreachableError
from tools.host import Host, free_port
from tools.jobs import plan
from tools.restoration import PRESETS, encode, with_preset
from tools.workflow import load_workflow


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_pass_through_the_server(
    runner: Runner, holding: Holding, tmp_path: Path, suffix: str
):
    values = np.random.default_rng(0).integers(0, 65536, (48, 64, 3), dtype=np.uint16)
    values[0, :4] = [[0] * 3, [65535] * 3, [1] * 3, [65534] * 3]
    path, out = tmp_path / f"deep{suffix}", tmp_path / "out"
    photo_writer.write(path, as_photo(values), {})
    assert run(holding, runner, path, "--out", out) == 0
    restored = photo.read(out / f"deep_restored{suffix}")
    assert restored.bits == 16
    # SaveImage cuts 65280 steps, not 65535: one level of rounding at most.
    assert np.abs(restored.color.astype(int) - values).max() <= 1
    assert holding.runs == 1, "the second pass must come from the server's cache"
    assert read_report(out)["photos"][0]["bits"] == 16


def test_16_bit_grey_does_not_turn_white(runner: Runner, holding: Holding, tmp_path: Path):
    values = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    tifffile.imwrite(tmp_path / "grey.tif", values)
    assert run(holding, runner, tmp_path / "grey.tif", "--out", tmp_path / "out") == 0
    restored = pixels_of(tmp_path / "out/grey_restored.tif")
    assert restored.dtype == np.uint16
    assert np.abs(restored.astype(int) - values).max() <= 1


def test_8_bits_stay_8_bits(runner: Runner, holding: Holding, tmp_path: Path):
    make_photo(40, 30).save(tmp_path / "photo.tif")
    assert run(holding, runner, tmp_path / "photo.tif", "--out", tmp_path / "out") == 0
    restored = pixels_of(tmp_path / "out/photo_restored.tif")
    assert np.array_equal(restored, np.asarray(make_photo(40, 30)))


def test_alpha_orientation_and_exif_are_kept(runner: Runner, holding: Holding, tmp_path: Path):
    picture = make_photo(40, 30, mode="RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Model] = 6, "A camera"
    picture.save(tmp_path / "photo.png", exif=exif)
    assert run(holding, runner, tmp_path / "photo.png", "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out/photo_restored.png") as restored:
        upright = np.rot90(np.asarray(picture), -1)
        assert np.array_equal(np.asarray(restored), upright)
        assert restored.getexif()[ExifTags.Base.Model] == "A camera"
        assert restored.getexif()[ExifTags.Base.Orientation] == 1


def test_nano_restores_16_bits(runner: Runner, tmp_path: Path):
    deep = photo.to_bits(np.asarray(make_photo(96, 72)), 16)
    photo_writer.write(tmp_path / "deep.png", as_photo(deep), {})
    make_photo(96, 72).save(tmp_path / "flat.png")
    arguments = [tmp_path / "deep.png", tmp_path / "flat.png", "--out", tmp_path / "out"]
    arguments += ["--server", runner.host.url, "--preset", "fast"]
    assert restore.main([str(argument) for argument in arguments]) == 0
    restored = photo.read(tmp_path / "out/deep_restored.png")
    flat = photo.read(tmp_path / "out/flat_restored.png")
    assert restored.bits == 16
    # More than 8 bits hold, and the same picture.
    assert len(np.unique(restored.color % 257)) > 50
    difference = np.abs(restored.color / 257 - flat.color)
    assert difference.mean() < 1  # SaveImage cuts the 8-bit one off
    assert difference.max() < 6
    for entry in read_report(tmp_path / "out")["photos"]:
        assert all(0 <= each <= 1 for each in entry["probabilities"].values())
        assert entry["kind"] == max(entry["probabilities"], key=entry["probabilities"].get)


def test_bad_photos_are_named_and_the_others_done(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = tmp_path / "in", tmp_path / "in/out"
    put_photos(folder, 2)
    (folder / "broken.jpg").write_bytes(b"no picture")
    make_photo(20, 20).save(folder / "Überraschung & ämter 東京.png")
    make_photo(20, 20).save(os.fsencode(folder) + b"/not \xff text.png", "PNG")
    bad = [str(folder / "broken.jpg"), str(ROOT / "LICENSE")]
    assert run(holding, runner, folder, bad[1], "--recursive", "--out", out) == 1
    printed = capsys.readouterr().err
    assert all(f"{path} is not a picture" in printed for path in bad)
    assert "4 restored, 0 done before, 2 failed" in printed
    report = read_report(out)
    assert report["counts"] == {"done": 4, "skipped": 0, "failed": 2, "pending": 0}
    assert (out / "Überraschung & ämter 東京_restored.png").exists()
    failed = [entry for entry in report["photos"] if entry["status"] == "failed"]
    assert [entry["source"] for entry in failed] == bad
    for entry in report["photos"]:
        if entry not in failed:
            assert (entry["server"], entry["attempts"]) == (runner.host.url, 1)
            assert entry["seconds"] > 0
            assert entry["error"] is None


def test_second_run_does_only_what_is_missing(runner: Runner, holding: Holding, tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "in/out"
    first, second, third = put_photos(folder, 3)
    arguments = (folder, "--recursive", "--out", out)
    assert run(holding, runner, *arguments) == 0
    assert holding.runs == 3
    (out / f"{second.stem}_restored.png").unlink()
    before = read_report(out)["photos"]
    assert run(holding, runner, *arguments) == 0
    report = read_report(out)
    assert report["counts"] == {"done": 1, "skipped": 2, "failed": 0, "pending": 0}
    again = {Path(entry["source"]): entry for entry in report["photos"]}
    assert set(again) == {first, second, third}
    assert again[first]["seconds"] == before[0]["seconds"]
    # The server answers a photo that it has just restored from its cache.
    assert holding.runs <= 4


def test_nothing_to_do_needs_no_server(runner: Runner, holding: Holding, tmp_path: Path):
    (path,) = put_photos(tmp_path / "in", 1)
    assert run(holding, runner, path, "--out", tmp_path / "out") == 0
    gone = f"http://127.0.0.1:{free_port()}"
    arguments = [path, "--out", tmp_path / "out", "--server", gone]
    arguments += ["--workflow", holding.workflow]
    assert restore.main([str(argument) for argument in arguments]) == 0
    assert read_report(tmp_path / "out")["counts"]["skipped"] == 1


def test_presets_set_the_sampler_alone():
    workflow = Graph.load().set("KSampler", steps=20).nodes
    for name, settings in PRESETS.items():
        changed = with_preset(workflow, name)
        (sampler,) = (key for key, node in changed.items() if node["class_type"] == "KSampler")
        assert changed[sampler]["inputs"] == workflow[sampler]["inputs"] | settings
        assert changed[sampler] != workflow[sampler]
        changed[sampler] = workflow[sampler]
        assert changed == workflow


def test_preset_without_a_sampler_is_refused(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (path,) = put_photos(tmp_path / "in", 1)
    assert run(holding, runner, path, "--out", tmp_path / "out", "--preset", "best") == 1
    assert "--preset best: the workflow has no KSampler" in capsys.readouterr().err


def test_server_without_the_node_is_named(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (path,) = put_photos(tmp_path / "in", 1)
    holding.workflow.write_text(holding.workflow.read_text().replace("E2EHold", "NoSuchNode"))
    assert run(holding, runner, path, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert runner.host.url in printed
    assert "NoSuchNode" in printed


def test_refused_workflow_is_no_fault_of_the_photos(runner: Runner, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    workflow = Graph.load().set("KSampler", sampler_name="no such sampler").nodes
    Batch([Server(runner.host.url)], workflow, jobs, Options()).run()
    for job in jobs:
        assert (job.status, job.attempts) == ("failed", 0)
        assert "no such sampler" in str(job.error)


def test_a_fault_of_the_program_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    monkeypatch.setattr(photo, "read", mock.Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        Batch([Server("http://127.0.0.1:1")], {}, jobs, Options()).run()


def test_a_fault_of_the_caller_is_no_fault_of_the_photo(tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    jobs[0].source.write_bytes(b"no picture")
    batch = Batch([Server("http://127.0.0.1:1")], {}, jobs, Options())
    with pytest.raises(BrokenPipeError):
        batch.run(mock.Mock(side_effect=BrokenPipeError))
    assert [job.status for job in jobs] == ["failed", "pending"]


def test_a_fault_of_the_caller_leaves_no_run_behind(
    runner: Runner, holding: Holding, tmp_path: Path
):
    jobs = plan(put_photos(tmp_path / "in", 1), tmp_path / "out")
    holding.hold()

    def fail(event: Event) -> None:
        if event.progress and event.progress.node == "hold":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Batch([Server(runner.host.url)], holding.nodes, jobs, Options()).run(fail)
    assert wait_until(lambda: not any(runner.client.get("/queue").values()), 60), "still held"


def picture_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """What a client makes of this answer."""

    monkeypatch.setattr(AsyncClient, "request", mock.AsyncMock(return_value=data))
    result = Result("id", {"save": {"images": [{"filename": "a.png"}]}}, 1.0)
    return Client().images(result, "save")


def test_a_result_that_is_too_large_is_no_fault_of_the_server(monkeypatch: pytest.MonkeyPatch):
    data, _ = encode(np.asarray(make_photo()))
    assert [each.size for each in picture_of(data, monkeypatch)] == [(96, 72)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ClientError, match="picture of node save is too large") as caught:
        picture_of(data, monkeypatch)
    assert not isinstance(caught.value, ServerUnreachableError)


def test_a_damaged_photo_hides_no_damaged_result(monkeypatch: pytest.MonkeyPatch):
    """Pillow's switch for the one is for all threads."""
    data, _ = encode(np.asarray(make_photo()))
    with DECODING, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        asked = pool.submit(picture_of, data[: len(data) // 2], monkeypatch)
        with pytest.raises(TimeoutError):
            asked.result(0.5)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        DECODING.release()
        with pytest.raises(ServerUnreachableError, match="/view"):
            asked.result(60)
        DECODING.acquire()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_server_of_our_own_keeps_nothing(comfyui_root: Path, tmp_path: Path, bits: int):
    folder, nodes = tmp_path / "in", load_workflow(restore.NANO_WORKFLOW)
    folder.mkdir()
    pixels = photo.to_bits(np.asarray(make_photo(64, 48)), bits)
    for name in ("a.png", "b.png", "c.png"):  # one photo thrice, as people keep copies
        photo_writer.write(folder / name, as_photo(pixels), {})
    jobs = plan([folder], tmp_path / "out")
    left: list[int] = []
    with Host() as host:

        def watch(event: Event) -> None:
            if event.job and not event.progress:
                places = ("input", "output", "temp")
                files = [path for place in places for path in (host.base / place).rglob("*.*")]
                left.append(len(files))

        Batch([server_of(host)], with_preset(nodes, "fast"), jobs, Options(wait=20)).run(watch)
    assert [(job.status, job.attempts, job.bits) for job in jobs] == [("done", 1, bits)] * 3
    assert left == [0, 0, 0]


def test_a_full_disk_ends_the_run_at_once(
    runner: Runner,
    holding: Holding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    paths = put_photos(tmp_path / "in", 3)

    def fill(path: Path, *rest: object) -> None:
        raise photo_writer.OutputError(f"{path} cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(photo_writer, "write", fill)
        assert run(holding, runner, *paths, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "No space left" in printed
    assert "0 restored, 0 done before, 0 failed" in printed
    assert (holding.runs, read_report(tmp_path / "out")["counts"]["pending"]) == (1, 3)
    assert run(holding, runner, *paths, "--out", tmp_path / "out") == 0
