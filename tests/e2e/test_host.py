"""Life of the host: readiness, faults, and an end without orphans."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.e2e.holding import wait_until
from tools import environment
from tools.environment import ROOT, SetupError
from tools.host import Host, HostError, exit_on_termination, free_port, link_pack, serve

pytestmark = pytest.mark.comfy


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_port_in_use_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"port {port}"), Host(tmp_path, port):
            pass


class Remembering(Host):
    """Keeps its server's process, which a host that stops forgets."""

    server: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        super()._start()
        self.server = self.process


def test_early_end_shows_the_log(tmp_path: Path):
    host = Remembering(tmp_path, arguments=["--no-such-argument"])
    with pytest.raises(HostError, match="no-such-argument"), host:
        pass
    assert host.server is not None
    assert host.server.poll() not in (None, 0)


def test_folder_without_comfyui_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"COMFYUI_PATH=.*main\.py"):
        environment.comfyui_root()


def test_pack_is_linked_again(tmp_path: Path):
    place = tmp_path / "pack"
    place.symlink_to(tmp_path / "elsewhere")
    link_pack(place)
    assert place.resolve() == ROOT
    link_pack(place)
    assert (place / "pyproject.toml").samefile(ROOT / "pyproject.toml")


@pytest.mark.parametrize("name", ["diff-restorer", "diff-restorer/nodes/own.py"])
def test_what_users_put_there_is_kept(tmp_path: Path, name: str):
    place, own = tmp_path / "diff-restorer", tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("mine")
    with pytest.raises(HostError, match=f"{place} is there.*name another DIR"):
        link_pack(place)
    assert own.read_text() == "mine"


def test_the_clone_itself_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone = tmp_path / "custom_nodes/diff-restorer"
    clone.mkdir(parents=True)
    (clone / "own.py").write_text("mine")
    monkeypatch.setattr("tools.host.ROOT", clone)
    link_pack(clone)
    assert not clone.is_symlink()
    assert (clone / "own.py").read_text() == "mine"


def test_only_copies_of_ours_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone, place = tmp_path / "clone", tmp_path / "pack"
    clone.mkdir()
    (clone / "old.py").touch()
    monkeypatch.setattr("tools.host.ROOT", clone)
    monkeypatch.setattr(Path, "symlink_to", mock.Mock(side_effect=OSError("no links here")))
    link_pack(place)
    assert (place / "old.py").exists()
    (clone / "old.py").rename(clone / "new.py")
    link_pack(place)
    assert [(place / name).exists() for name in ("old.py", "new.py")] == [False, True]


@pytest.mark.parametrize("ignored", [False, True])
def test_nohup_is_respected(ignored: bool):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        exit_on_termination()
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == ignored
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_serve_shows_why_the_server_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    host = Host(tmp_path, 1)
    answers = iter([True, False])

    def running(self: Host) -> bool:
        with self.log.open("a") as log:
            log.write("out of memory\n")
        return next(answers)

    monkeypatch.setattr(Host, "__enter__", lambda self: self.log.touch() or self)
    monkeypatch.setattr(Host, "running", running)
    monkeypatch.setattr("tools.host.EXAMPLES", ())
    serve(host.base, 1, cpu=True, arguments=())
    assert capsys.readouterr().err.count("out of memory") == 2


def test_a_set_up_that_fails_costs_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFF_RESTORER_CACHE", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    made = tmp_path / f"env-{environment._run_key()}"
    for path in (environment.comfyui_root() / "main.py", made / "bin/python", made / "run.stamp"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for fault in (SetupError("no network"), KeyboardInterrupt()):
        fail = mock.Mock(side_effect=fault)
        monkeypatch.setattr(environment._Setup, "install_dev", fail)
        with pytest.raises(type(fault)):
            environment.ensure("dev")
    assert environment.ensure("run") == made / "bin/python"
    # What was interrupted may be half-way, and is made anew.
    assert (made / "dev.begun").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends orphans itself")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_its_program(tmp_path: Path, comfyui_root: Path, number: signal.Signals):
    port = free_port()
    program = subprocess.Popen(
        [sys.executable, "-m", "tools.host", "serve", "--port", str(port), "--dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "COMFYUI_PATH": str(comfyui_root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: is_listening(port) or program.poll() is not None, 120)
        assert program.poll() is None, "the server did not start"
        program.send_signal(number)
        assert wait_until(lambda: not is_listening(port), 30)
        assert program.wait(30) != 0
    finally:
        program.kill()
        program.wait()
