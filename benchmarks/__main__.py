"""Speed and memory of the nodes against the host's own nodes, as ratios within one run.

Weights are random at the size of SD 1.5, but for Nano. Each case is a process of its own, so that
its peak memory is its own, too. Writes bench.json, a Markdown report and its plots.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from diff_restorer.files import written_whole
from tools.ending import in_words

from .cases import CASES, LARGE, NANO, Setting
from .measuring import computes_bf16, on_gpu
from .pictures import compare
from .report import summary, write_report
from .stage import write_large, write_models

log = logging.getLogger(__name__)
AREAS = (512, 1024, 2048, 4096)
"""Sides of the pictures for Nano's whole graph, pixels."""


@dataclass(frozen=True)
class Config:
    """What to measure, and where to put it."""

    out: Path = Path("bench_out")
    """Folder for bench.json, benchmarks.md and the plots. What bench.json has already from this
    machine is not measured again, so that a stopped run goes on; delete it to begin anew."""
    cases: tuple[str, ...] = ()
    """Which cases; all by default."""
    rounds: int = 3
    """Measured calls of each function; the median counts."""
    large: tuple[int, ...] = (2048, 4096)
    """Sides of the large pictures to decode, pixels; whole ones only the first."""
    vae_width: int = 0
    """Channels of the VAE for large pictures; 0 is SD 1.5's 128 on a GPU and 32 on a CPU."""
    run: str = ""
    """A case as JSON: measure it in this process and print JSON (used by the program)."""


@in_words
def main(config: Config) -> None:
    """Measure in processes, log the table of ratios and write the report.

    Raises:
        ValueError: There is no such case.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.run:
        _measure(json.loads(config.run))
        return
    if unknown := set(config.cases) - set(CASES):
        raise ValueError(f"--cases: unknown {sorted(unknown)}; known are {', '.join(CASES)}")
    pixels = config.out / "pixels"
    pixels.mkdir(parents=True, exist_ok=True)
    path = config.out / "bench.json"
    results: dict[str, Any] = {}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    vae_width = config.vae_width or (128 if on_gpu() else 32)
    machine = _machine(vae_width, config.rounds)
    from training.common import git_revision  # here, for measured processes need not load it

    results["machine"], revision = machine, git_revision()
    jobs = [job for job in _plan(config) if not config.cases or job[0] in config.cases]
    missing = [job for job in jobs if results.get(_key(*job), {}).get("on") != machine]
    with tempfile.TemporaryDirectory(prefix="diff-restorer-bench-") as folder:
        if any(name not in (*NANO, *LARGE) for name, _ in missing):
            log.info("writing random weights at the size of SD 1.5 (4 GB)")
            write_models(Path(folder))
        if any(name in LARGE for name, _ in missing):
            write_large(Path(folder), vae_width)
        for name, side in tqdm(missing, unit="case", disable=None):
            key = _key(name, side)
            job = {"case": name, "folder": folder, "rounds": config.rounds, "side": side}
            found = _in_process(job | {"pixels": str(pixels / f"{key}.npy")})
            results[key] = found if "error" in found else found | {"on": machine, "code": revision}
            if name in LARGE:
                results["differences"] = compare(pixels, config.out)
            with written_whole(path) as part:
                part.write_text(json.dumps(results, indent=1), encoding="utf-8")
            log.info("%s: %s", key, json.dumps(found)[:300])
    log.info("\n%s", summary(results))
    write_report(results, config.out)
    if not config.cases:
        shutil.rmtree(pixels)
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
    return small + large + [("area", side) for side in AREAS]


def _key(name: str, side: int) -> str:
    return f"{name} {side}" if side else name


def _measure(job: dict[str, Any]) -> None:
    setting = Setting(Path(job["folder"]), job["rounds"], job["side"], Path(job["pixels"]))
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        found = CASES[job["case"]](setting)
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    """`_measure` in a fresh process; a failure, such as too little memory, becomes an entry."""
    command = [sys.executable, "-m", "benchmarks", "--run", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _machine(vae_width: int, rounds: int) -> dict[str, Any]:
    """What figures must agree in to stand in one table."""
    name = torch.cuda.get_device_name() if on_gpu() else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "format": "bf16" if computes_bf16() else "fp32",
        "vae_width": vae_width,
        "rounds": rounds,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
