"""Batches survive servers that die, stay away, come back or lose the connection."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.e2e.graph import Graph, Runner, make_photo
from tests.e2e.holding import Holding, pixels_of, put_photos, read_report, run, wait_until
from tools import restore
from tools.batch import Batch, Event, Options, Server, server_of
from tools.client import Client, Progress
from tools.environment import ROOT
from tools.errors import RunLostError
from tools.host import Host, free_port
from tools.jobs import Job, plan


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
    saved = list((host.base / "output").glob("restored_*.png"))
    assert len(saved) == 4, "the server has finished no photo twice"
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
    """Whether or not a run begins in time: the test is to end, and then to fail."""
    wait_until(lambda: holding.runs, 120)
    host.kill()
    holding.release()


def test_a_server_that_stays_away(
    host: Host, runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    paths = put_photos(tmp_path / "in", 3)
    holding.hold()
    killer = threading.Thread(target=kill_during_a_run, args=(host, holding), daemon=True)
    killer.start()
    arguments = [*paths, "--out", tmp_path / "out", "--workflow", holding.workflow, "--wait", "0"]
    assert restore.main([*map(str, arguments), "--server", host.url]) == 1
    killer.join(60)
    assert not killer.is_alive()
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


def test_own_server_is_started_again(comfyui_root: Path, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    workflow = Graph.load().set("KSampler", steps=30).nodes
    killed: list[Job] = []

    def watch(event: Event) -> None:
        if event.job and event.progress and event.progress.step and not killed:
            killed.append(event.job)
            port = str(event.job.server).rpartition(":")[2]
            (server,) = (child for child in psutil.Process().children() if port in child.cmdline())
            server.kill()

    with Host() as host:
        Batch([server_of(host)], workflow, jobs, Options()).run(watch)
    assert [(job.status, job.attempts) for job in jobs] == [("done", 2), ("done", 1)]
    assert killed == [jobs[0]]


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
            with contextlib.suppress(OSError):  # its other side has closed it
                end.shutdown(socket.SHUT_RDWR)
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
    paths, out = put_photos(tmp_path / "in", 3), tmp_path / "out"
    kept = out / f"{paths[0].stem}_restored.png"
    command = [sys.executable, "-m", "tools.restore", *map(str, paths), "--out", str(out)]
    command += ["--server", runner.host.url, "--workflow", str(holding.workflow)]
    holding.hold("2")
    # A shell may have started these tests with SIGINT ignored, which programs inherit.
    program = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert wait_until(lambda: holding.runs >= 2, 120)
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        _, printed = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == 130, printed
    assert b"interrupted" in printed
    queued = runner.client.get("/queue")
    assert queued["queue_running"] + queued["queue_pending"] == []
    assert read_report(out)["counts"] == {"done": 1, "skipped": 0, "failed": 0, "pending": 2}
    written = kept.stat().st_mtime_ns
    holding.release()
    assert run(holding, runner, *paths, "--out", out) == 0
    assert read_report(out)["counts"] == {"done": 2, "skipped": 1, "failed": 0, "pending": 0}
    assert kept.stat().st_mtime_ns == written
