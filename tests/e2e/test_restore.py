"""The restore program with real servers: what it keeps, and what it survives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from tests.e2e.conftest import HOST_NODES
from tests.e2e.graph import Runner, make_photo
from tools import photo, restore
from tools.batch import Batch, Event, Options, Server
from tools.client import Client, Progress, RunLostError, Workflow, load_workflow
from tools.environment import ROOT
from tools.host import Host, free_port
from tools.jobs import Job, plan
from tools.restoration import INPUT_TITLE, OUTPUT_TITLE

pytestmark = pytest.mark.comfy


class Holding:
    """A workflow that gives the photo back unchanged, and can be held while it runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hold"
        self.workflow = folder / "workflow.json"
        self.workflow.write_text(json.dumps(self.nodes))

    @property
    def nodes(self) -> Workflow:
        hold = {"image": ["photo", 0], "path": str(self.path)}
        save = {"images": ["hold", 0], "filename_prefix": "restored"}
        return {
            "photo": {
                "class_type": "LoadImage",
                "inputs": {"image": ""},
                "_meta": {"title": INPUT_TITLE},
            },
            "hold": {"class_type": "E2EHold", "inputs": hold},
            "save": {
                "class_type": "SaveImage",
                "inputs": save,
                "_meta": {"title": OUTPUT_TITLE},
            },
        }

    @property
    def runs(self) -> int:
        """How often servers began to run it."""
        log = Path(f"{self.path}.log")
        return len(log.read_text().splitlines()) if log.exists() else 0

    def hold(self, only: str = "") -> None:
        """Holds all runs from now on, or only the one of that number."""
        self.path.write_text(only)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.fixture
def holding(tmp_path: Path) -> Holding:
    folder = tmp_path / "holding"
    folder.mkdir()
    return Holding(folder)


@pytest.fixture
def host(comfyui_root: Path, tmp_path: Path) -> Iterator[Host]:
    """A server that a test may kill."""
    base = tmp_path / "server"
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes/e2e_host_nodes").symlink_to(HOST_NODES, target_is_directory=True)
    with Host(base) as host:
        yield host


def put_photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo {index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        make_photo(32, 24, seed=index).save(path)
    return paths


def saved_by(host: Host) -> int:
    return len(list((host.base / "output").glob("restored_*.png")))


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / restore.REPORT_NAME).read_text())


def run(holding: Holding, runner: Runner, *arguments: str | Path) -> int:
    return restore.main(
        [*map(str, arguments), "--server", runner.host.url, "--workflow", str(holding.workflow)]
    )


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


# What is kept.


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_pass_through_the_server(
    runner: Runner, holding: Holding, tmp_path: Path, suffix: str
):
    values = np.random.default_rng(0).integers(0, 65536, (48, 64, 3), dtype=np.uint16)
    values[0, :4] = [[0] * 3, [65535] * 3, [1] * 3, [65534] * 3]
    source = photo.Photo(values, None, False, b"", b"", None, "")
    path, out = tmp_path / f"deep{suffix}", tmp_path / "out"
    photo.write(path, source, {})
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
    photo.write(tmp_path / "deep.png", photo.Photo(deep, None, False, b"", b"", None, ""), {})
    make_photo(96, 72).save(tmp_path / "flat.png")
    workflow = load_workflow(restore.NANO_WORKFLOW)
    for node in workflow.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    arguments = [tmp_path / "deep.png", tmp_path / "flat.png", "--out", tmp_path / "out"]
    arguments += ["--server", runner.host.url, "--workflow", tmp_path / "workflow.json"]
    assert restore.main([str(argument) for argument in arguments]) == 0
    restored = photo.read(tmp_path / "out/deep_restored.png")
    flat = photo.read(tmp_path / "out/flat_restored.png")
    assert restored.bits == 16
    # More than 8 bits hold, and the same picture.
    assert len(np.unique(restored.color % 257)) > 50
    assert np.abs(restored.color / 257 - flat.color).max() < 2
    for entry in read_report(tmp_path / "out")["photos"]:
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert entry["kind"] == max(entry["probabilities"], key=entry["probabilities"].get)


# Many photos, bad ones among them, and a second run.


def test_bad_photos_are_named_and_the_others_done(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = tmp_path / "in", tmp_path / "in/out"
    put_photos(folder, 2)
    (folder / "broken.jpg").write_bytes(b"no picture")
    make_photo(20, 20).save(folder / "Überraschung & ämter 東京.png")
    make_photo(20, 20).save(os.fsencode(folder) + b"/not \xff text.png", "PNG")
    assert run(holding, runner, folder, "--recursive", "--out", out) == 1
    printed = capsys.readouterr()
    assert str(folder / "broken.jpg") in printed.err
    assert "4 restored, 0 done before, 1 failed" in printed.err
    report = read_report(out)
    assert report["counts"] == {"done": 4, "skipped": 0, "failed": 1, "pending": 0}
    assert (out / "Überraschung & ämter 東京_restored.png").exists()
    (failed,) = (entry for entry in report["photos"] if entry["status"] == "failed")
    assert failed["source"] == str(folder / "broken.jpg")
    for entry in report["photos"]:
        if entry is not failed:
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
    workflow = load_workflow(restore.NANO_WORKFLOW)
    for node in workflow.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["sampler_name"] = "no such sampler"
    Batch([Server(runner.host.url)], workflow, jobs, Options()).run()
    for job in jobs:
        assert (job.status, job.attempts) == ("failed", 0)
        assert "no such sampler" in str(job.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wait", "-1"], "--wait: -1 is too small: 0 is the least"),
        (["--attempts", "0"], "--attempts: 0 is too small: 1 is the least"),
        (["--max-side", "x"], "--max-side: invalid int value: 'x'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        restore.main(["photo.jpg", *arguments])
    assert message in capsys.readouterr().err


# Servers that die.


def holds(event: Event) -> bool:
    """Whether a server has just begun to wait with a photo, which is then in flight for sure."""
    return event.progress is not None and event.progress.node == "hold"


def test_a_server_that_dies_and_comes_back(host: Host, holding: Holding, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 4), tmp_path / "out")
    settled: list[Job] = []
    news: list[str] = []
    holding.hold("3")

    def watch(event: Event) -> None:
        if event.text:
            news.append(event.text)
        elif event.job is jobs[2] and holds(event) and holding.path.exists():
            host.kill()
            holding.release()
            host.restart()
        elif event.job and not event.progress:
            settled.append(event.job)

    Batch([Server(host.url)], holding.nodes, jobs, Options()).run(watch)
    assert [job.status for job in jobs] == ["done"] * 4
    assert Counter(map(id, settled)) == Counter(map(id, jobs)), "each photo is settled once"
    assert [job.attempts for job in jobs] == [1, 1, 2, 1]
    assert saved_by(host) == 4, "the server has finished no photo twice"
    assert any(f"{jobs[2].source} was in flight" in text for text in news)
    for job in jobs:
        assert np.array_equal(pixels_of(job.output), pixels_of(job.source))


def test_another_server_takes_over(host: Host, runner: Runner, holding: Holding, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 5), tmp_path / "out")
    holding.hold()

    def watch(event: Event) -> None:
        # Both servers are held until the one that dies has a photo.
        if holds(event) and event.job and event.job.server == host.url:
            host.kill()
            holding.release()

    Batch([Server(host.url), Server(runner.host.url)], holding.nodes, jobs, Options()).run(watch)
    assert [(job.status, job.server) for job in jobs] == [("done", runner.host.url)] * 5
    assert sorted(job.attempts for job in jobs) == [1, 1, 1, 1, 2]


def kill_during_a_run(host: Host, holding: Holding) -> None:
    while not holding.runs:
        time.sleep(0.05)
    host.kill()
    holding.release()


def test_a_server_that_stays_away(
    host: Host, runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    paths = put_photos(tmp_path / "in", 3)
    holding.hold()
    killer = threading.Thread(target=kill_during_a_run, args=(host, holding))
    killer.start()
    arguments = [*paths, "--out", tmp_path / "out", "--workflow", holding.workflow, "--wait", "0"]
    assert restore.main([*map(str, arguments), "--server", host.url]) == 1
    killer.join()
    assert f"{host.url} did not answer for 0 s" in capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert report["counts"]["failed"] == 3
    assert all(host.url in entry["error"] for entry in report["photos"])
    # Nothing is lost: another server finishes.
    assert run(holding, runner, *paths, "--out", tmp_path / "out") == 0
    assert read_report(tmp_path / "out")["counts"]["done"] == 3


def test_a_photo_that_kills_its_server_is_given_up(host: Host, holding: Holding, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    deadly = jobs[0]
    holding.hold()

    def watch(event: Event) -> None:
        if event.job is deadly and holds(event):
            host.kill()
            if deadly.attempts == 2:
                holding.release()
            host.restart()

    Batch([Server(host.url)], holding.nodes, jobs, Options(attempts=2)).run(watch)
    assert [job.status for job in jobs] == ["failed", "done"]
    assert "died 2 times" in str(deadly.error)


def test_a_server_that_is_not_there_yet(host: Host, holding: Holding, tmp_path: Path):
    host.kill()
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")

    def watch(event: Event) -> None:
        if event.text and "Waiting" in event.text:
            host.restart()

    Batch([Server(host.url, answers=False)], holding.nodes, jobs, Options()).run(watch)
    assert [(job.status, job.attempts) for job in jobs] == [("done", 1)] * 2


def test_no_server_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (path,) = put_photos(tmp_path / "in", 1)
    gone = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    arguments = [str(path), "--out", str(tmp_path / "out"), "--server", gone[0]]
    assert restore.main(arguments) == 1
    assert f"no ComfyUI answers at {gone[0]}" in capsys.readouterr().err
    assert restore.main([*arguments, "--server", gone[1]]) == 1
    assert f"no ComfyUI answers at any of {gone[0]}, {gone[1]}" in capsys.readouterr().err
    assert read_report(tmp_path / "out")["counts"]["pending"] == 1


class Proxy:
    """Passes connections on to a server, and cuts them when told."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in self.ends:
            end.close() if end.fileno() < 0 else end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", self.target))
            self.ends += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_broken_connection_is_no_broken_run(runner: Runner, holding: Holding):
    proxy = Proxy(runner.host.port)
    client = Client(proxy.url)
    nodes = holding.nodes
    nodes["photo"]["inputs"]["image"] = runner.upload(make_photo(8, 8, seed=77), "broken.png")
    holding.hold()
    cuts: list[str] = []

    def cut(progress: Progress) -> None:
        if progress.node == "hold" and not cuts:
            cuts.append(progress.prompt_id)
            proxy.cut()
            holding.release()

    result = client.run(nodes, cut)
    assert cuts == [result.prompt_id]
    assert client.images(result, "save")[0].size == (8, 8)
    assert holding.runs == 1


def test_the_client_sees_a_lost_run(host: Host, holding: Holding):
    client = Client(host.url)
    nodes = holding.nodes
    nodes["photo"]["inputs"]["image"] = Runner(host).upload(make_photo(8, 8), "lost.png")
    holding.hold()

    def kill(progress: Progress) -> None:
        if progress.node == "hold":
            host.kill()

    with pytest.raises(RunLostError, match=host.url):
        client.run(nodes, kill)


def test_interrupt_keeps_what_is_done(runner: Runner, holding: Holding, tmp_path: Path):
    paths = put_photos(tmp_path / "in", 3)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tools.restore", *map(str, paths), "--out", str(out)]
    command += ["--server", runner.host.url, "--workflow", str(holding.workflow)]
    holding.hold()
    program = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not holding.runs:
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, printed = program.communicate(timeout=120)
    assert program.returncode == 130, printed
    assert b"interrupted" in printed
    queued = runner.client.get("/queue")
    assert queued["queue_running"] + queued["queue_pending"] == []
    assert read_report(out)["counts"] == {"done": 0, "skipped": 0, "failed": 0, "pending": 3}
    holding.release()
    assert run(holding, runner, *paths, "--out", out) == 0
    assert read_report(out)["counts"]["done"] == 3
