"""The programs that users run: the restore client and the demo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.graph import Runner, make_photo
from tools import demo, restore
from tools.environment import ROOT


def test_restore_writes_a_photo(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photo = tmp_path / "my photo.jpg"
    make_photo(101, 67).save(photo)
    assert restore.main([str(photo), "--server", runner.host.url, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "my photo_restored.png") as restored:
        assert restored.size == (101, 67)
    assert "seen as" in capsys.readouterr().out


@pytest.mark.parametrize("large", [False, True])
def test_demo_of_own_photo(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """A large one goes in tiles; its sheet shows all of it and a piece. Here large is small."""
    if large:
        monkeypatch.setattr(demo, "LARGE", 1000)
        monkeypatch.setattr(demo, "SHOWN", 60)
        monkeypatch.setattr(demo, "PIECE", 48)
    photo = tmp_path / "own.png"
    make_photo(120, 90).save(photo)
    arguments = ["--server", runner.host.url, "--out", str(tmp_path), "--image", str(photo)]
    assert demo.main(arguments) == 0
    with Image.open(tmp_path / "own_restored.png") as restored:
        assert restored.size == (120, 90)
    with Image.open(tmp_path / "own_sheet.png") as drawn:
        assert not large or drawn.height > 45 + 48


def test_demo_improves_photos(runner: Runner, tmp_path: Path):
    assert demo.main(["--server", runner.host.url, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    scores = {score["kind"]: score for score in report["photos"]}
    assert set(scores) == {sample.kind for sample in demo.SAMPLES}
    assert report["mean"]["psnr_restored"] > report["mean"]["psnr_lq"]
    for kind in ("noise", "low_light"):
        assert scores[kind]["psnr_restored"] > scores[kind]["psnr_lq"]
    for kind in scores:
        for name in ("degraded", "restored", "sheet"):
            assert (tmp_path / f"{kind}_{name}.png").stat().st_size > 1000
    assert (tmp_path / "sheet.jpg").exists()


def test_demo_degrades_reproducibly():
    sample = demo.SAMPLES[0]
    photo = make_photo(64, 64)
    first, second = (demo.degrade_photo(photo, sample) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert demo.psnr(first, photo) < 35


@pytest.mark.parametrize(
    "variables", [("restore", "PHOTOS"), ("nano", "PHOTOS"), ("demo", "IMAGE")]
)
def test_make_runs_no_part_of_a_name(tmp_path: Path, variables: tuple[str, str]):
    target, variable = variables
    python = tmp_path / "python"
    script = 'case "$*" in (-c*) ;; (*" setup "*) echo "$0";; (*) printf "%s\\n" "$@";; esac'
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    name = 'it\'s `touch made` $$(touch made) "a".png'
    command = ["make", "-s", "-C", ROOT, target, f"PYTHON={python}", f"{variable}={name}"]
    program = subprocess.run(
        [*command, f"OUT={tmp_path}/o `touch made`"], capture_output=True, text=True, check=True
    )
    assert name.replace("$$", "$") in program.stdout.splitlines()
    assert not (ROOT / "made").exists()
