"""Train a Nano on a bare machine, without network or installation, in one command.

python3 training/bare.py --wheels wheels --out result -- --minutes 9.5 --pack photos.pack

What is after `--` goes to `training.nano` (see `--help` there). The machine has Python and the
packages of `PRESENT`; the wheels are those of training/requirements-bare.txt, which says how they
are collected. They are unpacked into a folder that is gone afterwards. The result folder has the
finished file, log.txt, and a folder per stage with its tables, curves and sheets.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_PYTHON = (3, 11)
PRESENT = (
    *("torch", "accelerate", "transformers", "safetensors", "matplotlib", "tqdm", "skimage"),
    *("torchmetrics", "numpy", "PIL"),
)
"""Modules that the machine must have."""


def main(args: Sequence[str] | None = None) -> int:
    """Unpack, train, and return the exit status of the training."""
    options = _options(args)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bare-") as folder:
        packages = Path(folder)
        _unpack(options.wheels, packages)
        command = [sys.executable, "-u", "-m", "training.nano", "--out", str(options.out)]
        status = _run([*command, *options.training], packages, options.out / "log.txt")
    if options.split_mib:
        size = int(options.split_mib * 2**20)
        for file in sorted(options.out.glob("*.safetensors")):
            if file.stat().st_size > size:
                split(file, size)
    return status


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder of carried wheels")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument(
        "--split-mib", type=float, default=0.0,
        help="also cut larger files into parts of so many MiB (cat FILE.part-* > FILE)",
    )  # fmt: skip
    parser.add_argument("training", nargs="*", help="options of training.nano, after --")
    options = parser.parse_args(args)
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        parser.error(f"found Python {sys.version.split()[0]}; needs {least} or newer")
    if missing := [name for name in PRESENT if importlib.util.find_spec(name) is None]:
        parser.error(f"{sys.executable} lacks {', '.join(missing)}; name a Python that has them")
    if not any(options.wheels.glob("*.whl")):
        parser.error(
            f"--wheels {options.wheels}: found no wheel; see training/requirements-bare.txt for "
            "the command that collects them"
        )
    return options


def _unpack(wheels: Path, target: Path) -> None:
    """A wheel of pure Python is a zip of what belongs on the path."""
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        except zipfile.BadZipFile as error:
            sys.exit(f"error: {wheel}: {error}; it was cut off, carry it again")


def _run(command: Sequence[str], packages: Path, log: Path) -> int:
    """Its exit status; what it says goes to the log, too."""
    paths = [str(packages), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLCONFIGDIR": str(packages / "matplotlib-settings"),  # the home may be read-only
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w", encoding="utf-8") as file:
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    file.write(line)
                    file.flush()
            except KeyboardInterrupt:  # the terminal told the training, too: it saves
                file.write(process.stdout.read())
        return process.returncode


def split(file: Path, size: int) -> list[Path]:
    """Cut `file` into parts of at most `size` bytes beside it, in the order of their names."""
    parts: list[Path] = []
    with file.open("rb") as stream:
        while content := stream.read(size):
            part = file.with_name(f"{file.name}.part-{len(parts):03d}")
            part.write_bytes(content)
            parts.append(part)
    return parts


if __name__ == "__main__":
    sys.exit(main())
