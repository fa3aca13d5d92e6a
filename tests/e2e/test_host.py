"""Life of the host: readiness, faults, and an end without orphans."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import environment
from tools.environment import ROOT, SetupError
from tools.host import Host, HostError, free_port, link_pack

pytestmark = pytest.mark.comfy


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


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
