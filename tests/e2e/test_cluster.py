"""The restore program on a Ray cluster of two nodes on this machine; `make demo-cluster`."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.e2e.graph import Runner
from tests.e2e.holding import put_photos
from tools import restore
from tools.batch import Options, Server
from tools.errors import ClientError
from tools.host import free_port
from tools.jobs import Job, digest_workflow
from tools.workflow import load_workflow

# Ray reads them when it is imported.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so that it listens on 127.0.0.1 only
    "RAY_agent_register_timeout_ms": "300000",  # on a busy machine
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_worker_niceness": "0",  # else other programs leave a busy machine's workers no time
}
pytest.importorskip("ray", reason='needs Ray: pip install "ray[data]"')
ours: Any = importlib.import_module("tools.cluster")

PORTS = (
    *("metrics_agent_port", "metrics_export_port"),
    *("runtime_env_agent_port", "dashboard_agent_listen_port"),
)
"""Of Ray's agents: a node that has to find them out waits for 15 s only."""
COUNT = 20


def node(**settings: Any) -> dict[str, Any]:
    """One with room for one ComfyUI."""
    ports = {name: free_port() for name in PORTS}
    settings |= {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_log_monitor": False}
    return {**ports, **settings}


@pytest.fixture(scope="module")
def cluster(comfyui_root: Path) -> Iterator[Any]:
    """A head and a second node, each with room for one ComfyUI."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=node(include_dashboard=False))
    cluster.add_node(**node())
    yield cluster
    cluster.shutdown()


def run(cluster: Any, *arguments: str | Path) -> int:
    options = [*map(str, arguments), "--ray", cluster.address, "--preset", "fast"]
    return restore.run(restore.parse(options))


def read_lines(out: Path) -> list[dict[str, Any]]:
    report = out / "diff-restorer-report.jsonl"
    lines = report.read_text().split("\n")[:-1] if report.exists() else []
    return [json.loads(line) for line in lines]


class Accident(threading.Thread):
    """Kills the ComfyUI of the head, and the other node, once half of the photos are done."""

    def __init__(self, cluster: Any, out: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.out = cluster, out
        self.killed: list[str] = []
        """What is dead, in words."""

    def run(self) -> None:
        (node,) = self.cluster.worker_nodes
        while len(lines := read_lines(self.out)) < COUNT / 2:
            time.sleep(0.1)
        self.cluster.remove_node(node, allow_graceful=False)
        self._tell(f"node {node.node_id[:8]}")
        while not (port := self._port(lines, node.node_id)):
            time.sleep(0.1)
            lines = read_lines(self.out)
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            if f"--port\0{port}\0".encode() in process.read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)
                self._tell(f"ComfyUI {port}")

    def _tell(self, killed: str) -> None:
        self.killed.append(killed)
        sys.stdout.write(f"--- killed {killed}\n")

    def _port(self, lines: list[dict[str, Any]], dead: str) -> str | None:
        others = (line["server"] for line in lines if line["server"][:8] != dead[:8])
        return next((server.rpartition(":")[2] for server in others), None)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_is_listed_by_path_and_by_uri(tmp_path: Path, scheme: str):
    folder = tmp_path / "photos"
    put_photos(folder / "sub", 1)
    for name in ("a.jpg", "a.png", "b.heic", ".hidden.png", "notes.txt", "out/a_restored.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/no \xff text.png")).touch()
    named = [f"{scheme}{folder}", f"{scheme}{folder}/out"]
    photos, out = (ours.Place.of(name if scheme else Path(name)) for name in named)
    lines = list(ours.list_photos(photos, out, recursive=True))
    assert [(line["status"], line.get("source")) for line in lines] == [
        ("left out", None),
        ("failed", "."),
        ("pending", "a.jpg"),
        ("pending", "a.png"),
        ("pending", "sub/photo 0.png"),
        ("listed", None),
    ]
    assert "no UTF-8" in lines[1]["error"]
    assert lines[2]["output"] == "a.jpg_restored.png"  # not that of a.png
    assert lines[-1]["count"] == 4


def test_a_result_appears_whole(tmp_path: Path):
    (tmp_path / "result").write_bytes(b"new")
    place = ours.Place.of(f"file://{tmp_path}/out")
    place.put(tmp_path / "result", Path("sub/a.png"))
    assert [path.name for path in (tmp_path / "out/sub").iterdir()] == ["a.png"]
    with pytest.raises(OSError, match="missing"):
        place.put(tmp_path / "missing", Path("sub/a.png"))
    assert [path.read_bytes() for path in (tmp_path / "out/sub").iterdir()] == [b"new"]


def test_a_uri_that_cannot_be_opened_is_named():
    with pytest.raises(ClientError, match=r"nope://.*s3://"):
        ours.Place.of("nope://bucket/photos")


@pytest.mark.parametrize("gpu", [False, True])
def test_where_nothing_can_run_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: bool
):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(ours.ray, "nodes", lambda: nodes)
    assert ours.shares(None, gpu=gpu) == ({"num_gpus": 1} if gpu else {"num_cpus": 2}, 1)
    told = capsys.readouterr().err
    assert ("Waiting for room: no node of the cluster has a GPU" in told) == gpu


def test_a_cluster_that_is_gone_empties_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail = mock.Mock(side_effect=ConnectionError("nobody there"))
    monkeypatch.setattr(ours.ray, "init", fail)
    (tmp_path / "out").mkdir()
    report = tmp_path / "out/diff-restorer-report.jsonl"
    report.write_text("before\n")
    options = [str(tmp_path), "--out", str(report.parent), "--ray", "127.0.0.1:1"]
    with pytest.raises(ClientError, match=r"no Ray cluster answers.*nobody there"):
        restore.run(restore.parse(options))
    assert report.read_text() == "before\n"


def restorer_on(url: str, folder: Path) -> Any:
    """As an actor has it, without Ray."""
    restorer = object.__new__(ours.Restorer)
    restorer.photos, restorer.out = ours.Place.of(folder / "in"), ours.Place.of(folder / "out")
    restorer.workflow = load_workflow(restore.NANO_WORKFLOW)
    restorer.options, restorer.overwrite = Options(), False
    restorer.digest = digest_workflow(restorer.workflow, 0)
    restorer.server, restorer.name = Server(url), "node 1"
    return restorer


def test_what_an_actor_makes_of_a_line(runner: Runner, tmp_path: Path):
    put_photos(tmp_path / "in", 1)
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    restorer = restorer_on(runner.host.url, tmp_path)
    names = ("photo 0.png", "broken.png")
    lines = [Job(Path(name), Path(f"sub/{name}")).report() for name in names]
    done, broken = map(restorer.restore, lines)
    assert (done["status"], done["server"], done["error"]) == ("done", "node 1", None)
    assert (tmp_path / "out/sub/photo 0.png").exists()
    assert restorer.restore(lines[0])["status"] == "skipped"
    assert broken["status"] == "failed"
    assert str(tmp_path / "in/broken.png") in broken["error"]
    missing = restorer.restore(Job(Path("none.png"), Path("none.png")).report())
    assert missing["status"] == "failed"
    assert f"{tmp_path}/in/none.png cannot be copied to this node" in missing["error"]


@pytest.mark.parametrize("place", ["copy_files", "TemporaryDirectory"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_node_without_room_is_no_fault_of_the_photo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, number: int
):
    fail = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    restorer = restorer_on("http://127.0.0.1:1", tmp_path)
    monkeypatch.setattr(ours.fs if place == "copy_files" else ours, place, fail)
    line = restorer.restore(Job(Path("a.png"), Path("a.png")).report())
    assert line["status"] == "full"
    assert os.strerror(number) in line["error"]
    assert "(node node 1)" in line["error"]


@pytest.mark.slow
def test_a_node_and_a_comfyui_die_half_way(cluster: Any, tmp_path: Path):
    photos = put_photos(tmp_path / "photos", COUNT)
    out = tmp_path / "out"
    accident = Accident(cluster, out)
    accident.start()
    assert run(cluster, tmp_path / "photos", "--out", out) == 0
    assert len(accident.killed) == 2
    lines = read_lines(out)
    assert sorted(line["source"] for line in lines) == sorted(map(str, photos))
    # Done before the node died, and not yet told: then it is there, and nothing is done again.
    assert Counter(line["status"] for line in lines).keys() <= {"done", "skipped"}
    # Each of the two that were killed had at most one photo in flight.
    assert sum(max(0, line["attempts"] - 1) for line in lines) <= len(accident.killed)
    results = {out / f"{photo.stem}_restored.png" for photo in photos}
    assert set(out.glob("*.png")) == results
    written = {path: path.stat().st_mtime_ns for path in results}
    assert run(cluster, tmp_path / "photos", "--out", out) == 0
    assert Counter(line["status"] for line in read_lines(out)) == {"skipped": COUNT}
    assert written == {path: path.stat().st_mtime_ns for path in results}
    sys.stdout.write(f"{COUNT} photos restored, none twice; a second run had nothing to do\n")


@pytest.mark.slow
def test_a_photo_that_actors_die_of_fails_alone(cluster: Any):
    def list_names() -> Iterator[dict[str, Any]]:
        for name in ("a.png", "deadly.png", "faulty.png", "b.png"):
            yield Job(Path(name), Path(name)).report()
        yield {"status": "listed", "count": 4}

    class Dying:
        def restore(self, line: dict[str, Any]) -> dict[str, Any]:
            if line["source"] == "deadly.png":
                os._exit(1)
            if line["source"] == "faulty.png":
                raise ZeroDivisionError("a fault of ours")
            return line | {"status": "done"}

    class Unborn:
        def __init__(self) -> None:
            raise OSError("no ComfyUI here")

    options = restore.parse([".", "--ray", cluster.address, "--attempts", "2"])
    with ours.connected(options.ray):
        lines = list(ours.Actors(Dying, (), options).stream(list_names))
        with pytest.raises(ClientError, match=r"actors did not start(.|\n)*no ComfyUI here"):
            list(ours.Actors(Unborn, (), options).stream(list_names))
    found = {line["source"]: line for line in lines if "source" in line}
    assert len(lines) == 5
    assert {name: line["status"] for name, line in found.items()} == {
        "a.png": "done",
        "deadly.png": "failed",
        "faulty.png": "failed",
        "b.png": "done",
    }
    assert "its actor died 2 times" in found["deadly.png"]["error"]
    assert "a fault of ours" in found["faulty.png"]["error"]


@pytest.mark.slow
def test_what_is_no_photo_is_told_and_ends_nothing(cluster: Any, tmp_path: Path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "photos/out"
    first, _ = put_photos(folder / "sub", 2)
    first.rename(folder / "é ämter 東京.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "raw.heic").write_bytes(b"")
    (folder / "loop").symlink_to(folder)
    assert run(cluster, folder, "--out", out, "--recursive") == 1
    status = {Path(line["source"]).name: line["status"] for line in read_lines(out)}
    assert status == {"é ämter 東京.png": "done", "photo 1.png": "done", "broken.jpg": "failed"}
    printed = capsys.readouterr()
    assert f"error: {folder}/broken.jpg is not a picture" in printed.err
    assert "1 .heic left out" in printed.err
    assert (out / "sub/photo 1_restored.png").exists()
