"""Scores of the classical baselines, by several processes and kept for the next run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import baselines
from .baselines import COMPETITORS, Pixels
from .pictures import digest, file_digest, pixel_digest, read_json, write_atomically
from .testsets import Case

Tried = dict[str, dict[str, float]]
"""Baseline -> `psnr` and `seconds`, for one photo."""


def read_pixels(path: Path) -> Pixels:
    """A PNG of the test sets as (H, W, 3) float32 in [0, 1]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.float32) / 255


def measure(lq: Path, gt: Path, names: Sequence[str]) -> Tried:
    """Baseline -> `psnr` (dB, of the result rounded to 8 bits) and `seconds`, for one photo."""
    degraded, clean = read_pixels(lq), read_pixels(gt)
    scores = {}
    for name in names:
        begun = time.perf_counter()
        restored = (baselines.apply(name, degraded) * 255).round() / 255
        seconds = time.perf_counter() - begun
        error = float(np.square(restored - clean, dtype=np.float64).mean())
        scores[name] = {"psnr": -10 * np.log10(max(error, 1e-10)), "seconds": seconds}
    return scores


def run_baselines(
    cases: Sequence[Case], cache: Path, workers: int
) -> tuple[dict[str, Tried], dict[str, str]]:
    """Lets every baseline try the cases of its kind, and keeps the scores as JSON in `cache`.

    Returns:
        Case id -> what `measure` returns; and case id -> why it failed.
    """
    scores: dict[str, Tried] = {}
    failed: dict[str, str] = {}
    code = file_digest(*baselines.sources())
    todo: list[tuple[Case, str]] = []
    for case in cases:
        key = digest(code, case.kind or "", pixel_digest(case.lq), pixel_digest(case.gt))
        stored = read_json(_file(cache, case))
        if stored.get("key") == key:
            scores[case.id] = stored["scores"]
        elif COMPETITORS.get(case.kind or ""):
            todo.append((case, key))
    if not todo:
        return scores, failed
    bar = tqdm(_measured(todo, workers or os.cpu_count() or 1), desc="baselines", total=len(todo))
    for (case, key), got in bar:
        if isinstance(got, Exception):
            failed[case.id] = f"baselines: {got}"
            continue
        scores[case.id] = got
        write_atomically(_file(cache, case), json.dumps({"key": key, "scores": got}))
    return scores, failed


def _measured(
    todo: Sequence[tuple[Case, str]], workers: int
) -> Iterator[tuple[tuple[Case, str], Tried | Exception]]:
    """Runs `measure` for every case, in this process or in several, in the order they end."""
    processes = min(workers, len(todo))
    if processes == 1:
        yield from ((entry, _caught(entry[0])) for entry in todo)
        return
    # Spawned, not forked: torch has threads by now, which do not survive a fork.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = {pool.submit(_caught, entry[0]): entry for entry in todo}
        for done in as_completed(running):
            yield running[done], done.result()


def _caught(case: Case) -> Tried | Exception:
    try:
        return measure(case.lq, case.gt, COMPETITORS[case.kind or ""])
    except (ValueError, ArithmeticError, OSError) as error:
        return error


def best_baseline(scores: dict[str, float]) -> str | None:
    """The baseline with the highest mean PSNR of a set; None where there is none."""
    return max(scores, key=scores.__getitem__, default=None)


def mean_seconds(tried: Mapping[str, Tried]) -> dict[str, float]:
    """Mean time of each baseline per photo, seconds."""
    times: dict[str, list[float]] = {}
    for scores in tried.values():
        for name, got in scores.items():
            times.setdefault(name, []).append(got["seconds"])
    return {name: float(np.mean(values)) for name, values in sorted(times.items())}


def _file(cache: Path, case: Case) -> Path:
    return cache / f"{case.id}.json"
