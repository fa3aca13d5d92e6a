"""Speed and memory of the nodes against the host's own nodes, as ratios within one run.

Weights are random at the size of SD 1.5, but for Nano. Each case is a process of its own, so that
its peak memory is its own, too. Writes bench.json, a Markdown report and its plots.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from .cases import CASES, Setting
from .measuring import on_gpu
from .report import summary, write_report
from .stage import write_models

log = logging.getLogger(__name__)
LARGE = ("untiled", "exact", "fast", "stock_tiled", "stock_untiled")


@dataclass(frozen=True)
class Config:
    """What to measure, and where to put it."""

    out: Path = Path("bench_out")
    """Folder for bench.json, benchmarks.md and the plots. A case that bench.json has already is not
    measured again, so that a stopped run goes on."""
    cases: tuple[str, ...] = ()
    """Which cases; all by default."""
    rounds: int = 3
    """Measured calls of each function; the median counts."""
    large: tuple[int, ...] = (2048, 4096)
    """Sides of the large pictures to decode, pixels; whole ones only the first."""
    vae_width: int = 0
    """Channels of the VAE for large pictures; 0 is SD 1.5's 128 on a GPU and 32 on a CPU."""
    areas: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Sides of the pictures for Nano's whole graph, pixels."""
    again: bool = False
    """Measure what bench.json has, too."""
    run: str = ""
    """A case as JSON: measure it in this process and print JSON (used by the program)."""


def main(config: Config) -> None:
    """Measure in processes, log the table of ratios and write the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.run:
        _measure(json.loads(config.run))
        return
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "bench.json"
    results: dict[str, Any] = {}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    vae_width = config.vae_width or (128 if on_gpu() else 32)
    results["machine"] = _machine(vae_width)
    jobs = [job for job in _plan(config) if not config.cases or job[0] in config.cases]
    missing = [
        job
        for job in jobs
        if config.again or "error" in results.get(_key(*job), {"error": "not measured"})
    ]
    with tempfile.TemporaryDirectory(prefix="diff-restorer-bench-") as folder:
        if any(name not in ("area", "peak", "levers") for name, _ in missing):
            log.info("writing random weights at the size of SD 1.5 (3.3 GB)")
            write_models(Path(folder), vae_width)
        pixels: dict[str, str] = {}
        for name, side in tqdm(missing, unit="case", disable=None):
            job = {"case": name, "folder": folder, "rounds": config.rounds, "side": side}
            found = _in_process(job)
            if "pixels" in found:
                pixels[_key(name, side)] = found.pop("pixels")
            results[_key(name, side)] = found
            _write(path, results)
            log.info("%s: %s", _key(name, side), json.dumps(found)[:300])
        if pixels:
            from .pictures import compare

            results["differences"] = results.get("differences", {}) | compare(pixels, config.out)
    _write(path, results)
    log.info("\n%s", summary(results))
    write_report(results, config.out)
    log.info("written to %s", config.out)


def _plan(config: Config) -> list[tuple[str, int]]:
    small = [(name, 0) for name in CASES if name not in (*LARGE, "area")]
    first, *_ = config.large
    large = [
        (name, side)
        for side in config.large
        for name in LARGE
        if side == first or "untiled" not in name
    ]
    return small + large + [("area", side) for side in config.areas]


def _key(name: str, side: int) -> str:
    return f"{name} {side}" if side else name


def _measure(job: dict[str, Any]) -> None:
    setting = Setting(Path(job["folder"]), job["rounds"], job["side"])
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        found = CASES[job["case"]](setting)
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    """`_measure` in a fresh process; a failure, such as too little memory, becomes an entry."""
    command = [sys.executable, "-m", "benchmarks", "--run", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _machine(vae_width: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if on_gpu() else _cpu_name()
    return {
        "device": name,
        "threads": os.cpu_count(),
        "torch": torch.__version__,
        "vae_width": vae_width,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _write(path: Path, results: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
