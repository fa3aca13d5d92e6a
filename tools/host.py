"""Starts, watches and stops ComfyUI with this pack; the one door to the host for all programs.

python -m tools.host setup --stage run|dev     prints the environment's Python
python -m tools.host serve [--port N] [--dir D] [-- further arguments of ComfyUI]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from tools import environment
from tools.ending import in_words
from tools.environment import ROOT

PACK_NAME = "diff-restorer"
PACK_NODE = "DiffRestorerLoader"
NANO_VARIABLE = "DIFF_RESTORER_NANO"
START_TIMEOUT = 300.0
STOP_TIMEOUT = 10.0
LOG_TAIL = 60
FOLDERS = ("custom_nodes", "models", "input", "output", "user")
EXAMPLES = ("example.png", "large.png", "frames")
"""Of what `write_examples` writes, the oldest and the newest."""
NOT_IN_A_COPY = (".git", "__pycache__", "demo_out", "runs", "tests")
COPY_MARK = ".copied-by-tools-host"
"""In a copy of the pack that we may replace; a folder without it is somebody's own."""


class HostError(RuntimeError):
    """ComfyUI did not start, stopped early or did not load the pack."""


class Host:
    """A ComfyUI server on 127.0.0.1 with this pack; a context manager.

    Args:
        base: Base directory for models, input and output; made when missing and kept. ``None``
            takes a temporary one that is removed at the end.
        port: Port to listen on; ``None`` takes a free one.
        cpu: Run on the CPU. ``False`` leaves the choice of device to ComfyUI.
        arguments: Further command-line arguments for ComfyUI.
        log: File for ComfyUI's output; default ``<base>/host.log``.
        nano: File that Load Diff-Restorer Nano opens; default the one that the environment names in
            DIFF_RESTORER_NANO, else the shipped one.

    Raises:
        HostError: On entering, if the server or the pack does not come up; carries the log's end.
    """

    def __init__(
        self,
        base: Path | None = None,
        port: int | None = None,
        *,
        cpu: bool = True,
        arguments: Sequence[str] = (),
        log: Path | None = None,
        nano: Path | None = None,
    ) -> None:
        self.temporary = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="diff-restorer-")).resolve()
        self.port = free_port() if port is None else port
        self.cpu = cpu
        self.arguments = arguments
        self.log = log or self.base / "host.log"
        named = nano or os.environ.get(NANO_VARIABLE)
        # The server runs in another folder.
        self.nano = Path(named).resolve() if named else None
        self.process: subprocess.Popen[bytes] | None = None
        self.keeper = ThreadPoolExecutor(1)
        """Starts the server, which on Linux ends with the thread that does."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Host:
        try:
            for name in FOLDERS:
                (self.base / name).mkdir(parents=True, exist_ok=True)
            link_pack(self.base / "custom_nodes" / PACK_NAME)
            self.log.unlink(missing_ok=True)
            self.restart()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server, by force if it does not follow, and removes a temporary base."""
        self._end()
        if self.temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def restart(self) -> None:
        """Starts the server again on its port and its base, whether it is alive or dead."""
        self._end()
        self._check_port()
        self._start()
        self._wait_until_ready()

    def kill(self) -> None:
        """Ends the server at once, as a crash would; everything else stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process = None

    def clear(self) -> None:
        """Removes uploads, results and previews from a temporary base, which they would fill."""
        for folder in ("input", "output", "temp") if self.temporary else ():
            for path in (self.base / folder).rglob("*"):
                if not path.is_dir():
                    path.unlink(missing_ok=True)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def memory(self, peak: bool = False) -> float | None:
        """GB of memory that ComfyUI holds, or held at most; None where Linux does not tell."""
        status = Path(f"/proc/{self.process.pid if self.process else 'none'}/status")
        if not status.exists():
            return None
        kilobytes = status.read_text().split("VmHWM:" if peak else "VmRSS:")[1].split()[0]
        return int(kilobytes) * 1024 / 1e9

    def get(self, path: str) -> Any:
        """Returns the JSON that the server sends for a path such as ``/object_info``."""
        # No proxy: the server is on this machine whatever http_proxy says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def _check_port(self) -> None:
        try:
            socket.create_server(("127.0.0.1", self.port)).close()
        except OSError as error:
            raise HostError(
                f"port {self.port} on 127.0.0.1 cannot be used ({os.strerror(error.errno or 0)}): "
                "stop the program that holds it or choose another port (PORT=8199)"
            ) from error

    def _start(self) -> None:
        root = environment.comfyui_root()
        if not (root / "main.py").exists():
            raise HostError(f"there is no ComfyUI in {root}; run: python3 -m tools.host setup")
        command = [sys.executable, str(root / "main.py")]
        command += ["--cpu"] if self.cpu else []
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", *self.arguments]
        nano = {} if self.nano is None else {NANO_VARIABLE: str(self.nano)}
        with self.log.open("ab") as log:
            self.process = self.keeper.submit(
                subprocess.Popen[bytes],
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **nano},
                # Ctrl-C reaches this program only, which then stops the server in order.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            ).result()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if not self.running():
                raise self._fault("ended while starting")
            try:
                nodes = self.get(f"/object_info/{PACK_NODE}")
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise self._fault(f"did not answer within {START_TIMEOUT:.0f} s")
        if PACK_NODE not in nodes:
            raise self._fault(f"started without the pack {PACK_NAME} ({PACK_NODE} is missing)")

    def _fault(self, what: str) -> HostError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else ()
        tail = "\n".join(lines[-LOG_TAIL:])
        return HostError(f"ComfyUI {what}. End of its log:\n{tail}")


def link_pack(place: Path) -> None:
    """Puts this repository at ``place`` as a symbolic link, or as a copy where links fail.

    Raises `HostError` rather than touch what somebody else put there.
    """
    if place.resolve() == ROOT:  # also a clone in the user's own ComfyUI
        return
    if place.is_symlink():
        place.unlink()
    elif (place / COPY_MARK).exists():
        shutil.rmtree(place)
    elif place.exists():
        raise HostError(f"{place} is there, and is not ours: move it, or name another DIR (--dir)")
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        place.mkdir()
        (place / COPY_MARK).touch()
        ignored = shutil.ignore_patterns(*NOT_IN_A_COPY)
        shutil.copytree(ROOT, place, ignore=ignored, dirs_exist_ok=True)


def free_port() -> int:
    """Returns a port of 127.0.0.1 that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def exit_on_termination() -> None:
    """Makes SIGTERM and SIGHUP unwind the program, so that a running host is stopped.

    Not where they are ignored, as under nohup.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def _die_with_parent() -> Callable[[], None] | None:
    """Returns the hook that ends the server even if this program is killed outright (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, int(signal.SIGTERM))  # 1 is PR_SET_PDEATHSIG


def serve(base: Path, port: int, cpu: bool, arguments: Sequence[str]) -> int:
    """Runs a server in the foreground until it ends or Ctrl-C; returns its exit code."""
    sys.stderr.write(f"Starting ComfyUI in {base} ...\n")
    if not all((base / "input" / name).exists() for name in EXAMPLES):
        from tools.examples import write_examples  # needs packages that the set-up has not

        write_examples(base / "input")
    # The user's own choice comes later and so goes before.
    with Host(base, port, cpu=cpu, arguments=("--preview-method", "auto", *arguments)) as host:
        sys.stderr.write(
            f"\nComfyUI with Diff-Restorer: {host.url}\n"
            f"Models, input and output: {host.base}\nStop with Ctrl-C.\n\n"
        )
        with host.log.open(errors="replace") as log:
            while host.running():
                sys.stderr.write(log.read())
                time.sleep(0.2)
            sys.stderr.write(log.read())  # its last words
        return host.process.returncode if host.process else 0


@in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.host``."""
    parser = argparse.ArgumentParser(prog="python -m tools.host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("setup", help="make the environment, print its Python")
    maker.add_argument("--stage", choices=environment.STAGES, default="run")
    commands.add_parser("root", help="print the ComfyUI checkout")
    server = commands.add_parser("serve", help="run ComfyUI with the pack")
    server.add_argument("--port", type=int, default=8188)
    server.add_argument("--dir", type=Path, help="base directory (default: in the cache folder)")
    server.add_argument("--gpu", action="store_true", help="let ComfyUI use a GPU")
    server.add_argument("rest", nargs="*", help="after --: further arguments of ComfyUI")
    options = parser.parse_args(arguments)
    exit_on_termination()
    if options.command == "serve":
        base = options.dir or environment.cache_dir() / "serve"
        return serve(base, options.port, not options.gpu, options.rest)
    setup = options.command == "setup"
    print(environment.ensure(options.stage) if setup else environment.comfyui_root())
    return 0


if __name__ == "__main__":
    sys.exit(main())
