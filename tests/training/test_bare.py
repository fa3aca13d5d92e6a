"""The program for a bare machine: carried wheels, one folder of results, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.environment import ROOT
from training.bare import split


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """One wheel, whose module takes the place of another that is told to fail."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "print('carried is here')")
        wheel.writestr("sitecustomize.py", "import carried")  # Python imports it at its start
    return folder


def bare(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training" / "bare.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_training_sees_the_wheels_and_its_words_are_kept(wheels: Path, tmp_path: Path) -> None:
    done = bare("--wheels", wheels, "--out", tmp_path / "out", "--", "--pack", tmp_path / "none")
    assert done.returncode == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log == done.stdout
    assert log.startswith("carried is here\n")
    assert f"error: --pack: {tmp_path / 'none'} does not exist" in log


def test_what_is_missing_is_named(wheels: Path, tmp_path: Path) -> None:
    done = bare("--wheels", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "found no wheel; see training/requirements-bare.txt" in done.stderr
    file = next(wheels.iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    done = bare("--wheels", wheels, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"error: {file}: File is not a zip file; it was cut off" in done.stderr


def test_a_file_is_split_into_parts_that_join(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(bytes(range(250)))
    parts = split(file, 100)
    assert [part.name for part in parts] == [f"a.safetensors.part-00{place}" for place in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == file.read_bytes()
