"""The benchmark's table says what was measured, and its program runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import Config, main
from benchmarks.pictures import compare
from benchmarks.report import rows, summary, write_report
from tools.environment import ROOT

MACHINE = {
    "device": "a CPU",
    "threads": 2,
    "torch": "2",
    "vae_width": 32,
    "format": "fp32",
}


def decoded(seconds: float, gigabytes: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_gb": gigabytes}


def results() -> dict[str, Any]:
    lever = {"seconds": 1.0, "psnr": [24.0], "mean_psnr": 24.0}
    return {
        "machine": MACHINE,
        "step": {"seconds_per_step": {"stock": 2.0, "ours": 2.1}, "ratio": 1.05, "code": "c0de"},
        "vision": {"seconds": {}, "ratio": 1.01, "code": "0ld"},
        "load": {
            "Nano": {
                "seconds": {},
                "ratio": 0.9,
                "reading": 1.1,
                "file_gb": 0.04,
                "peak_gb": 0.06,
                "largest_gb": 0.01,
            },
            "code": "c0de",
        },
        "untiled 64": decoded(4.0, 8.0),
        "exact 64": decoded(6.0, 1.0),
        "exact 128": decoded(24.0, 2.5),
        "stock_tiled 64": decoded(5.0, 0.5),
        "stock_tiled 128": {"error": "no memory"},
        "area 512": {"seconds": 1.0, "peak_gb": 0.2, "megapixels": 0.26},
        "levers": {"kinds": ["noise"], "rows": {"degraded photo": lever, "euler, 8 steps": lever}},
    }


def test_each_ratio_is_held_against_its_bar() -> None:
    found = {row.what: (round(row.found, 3), row.verdict) for row in rows(results())}
    assert found == {
        "a sampling step / one with ControlNetApplyAdvanced": (1.05, "**miss**"),
        "Prompt Processor + Classifier / CLIPVisionEncode": (1.01, "pass"),
        "loading Nano's file / were its tensors read by the host, without a map": (0.9, "pass"),
        "memory to read Nano's file / the file and its largest tensor": (1.2, "**miss**"),
        "memory, exact tiles at 64 px / whole at 64 px": (0.125, "pass"),
        "time, exact tiles / VAEDecodeTiled at 64 px": (1.2, "pass"),
        "memory, exact tiles at 128 px / whole at 64 px": (0.312, "**miss**"),
    }
    assert "stock_tiled 128: no memory" in summary(results())


def test_differences_are_those_of_the_pictures(tmp_path: Path) -> None:
    whole = np.zeros((8, 8, 3), np.float16)
    tiled = whole.copy()
    tiled[0, 0, 0] = 6.0
    for name, picture in (("untiled 8", whole), ("exact 8", tiled), ("stock_tiled 8", tiled)):
        np.save(tmp_path / f"{name}.npy", picture)
    found = compare(tmp_path, tmp_path)
    assert found == {"exact 8": {"mean": pytest.approx(6 / 192), "max": 6.0}}
    assert (tmp_path / "benchmarks_seams.png").stat().st_size > 1000


def test_the_report_shows_what_there_is(tmp_path: Path) -> None:
    write_report(results() | {"differences": {"exact 64": {"mean": 0.1, "max": 9.0}}}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "code 0ld, c0de. Ratios" in text, "figures of two versions"
    assert "| exact 64 px: largest difference to the whole, levels | 9 | 4 | **miss** |" in text
    assert "| euler, 8 steps | 1.00 | 24.00 |" in text
    assert (tmp_path / "benchmarks_area.png").exists()
    assert (tmp_path / "benchmarks_levers.png").exists()
    assert "benchmarks_seams.png" in text
    write_report(results(), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| exact 128 px |  |  | 24.0 | 2.50 |" in text, "without pictures to compare"
    assert "benchmarks_seams.png" not in text


def test_the_program_measures_and_does_not_measure_twice(
    comfyui_root: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1", "--large", "128"]
    command += ["--cases", "untiled", "exact", "--vae-width", "32", "--out", str(tmp_path)]

    def run() -> dict[str, Any]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "bench.json").read_text())

    found = run()
    assert found["exact 128"]["seconds"] > 0
    assert found["differences"]["exact 128"]["max"] < 4
    assert run() == found


def test_an_unknown_case_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Config(out=tmp_path, cases=("nothing",))) == 1
    assert "error: --cases: unknown ['nothing']; known are step" in capsys.readouterr().err
