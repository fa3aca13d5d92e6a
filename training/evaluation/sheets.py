"""Side-by-side sheets of restored photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diff_restorer.degradations import KINDS
from tools.sheet import Cell

from . import baselines
from .competing import best_baseline, read_pixels
from .plots import draw_sheet
from .report import PhotoScore, Summary, decibel
from .restoring import restored_path
from .smoothing import to_8_bit
from .testsets import Case

Row = tuple[str, list[Cell]]
_GAIN = 4
"""Differences are drawn this many times as strong."""


def draw_sheets(
    out: Path, cases: Sequence[Case], photos: Sequence[PhotoScore], summary: Summary, count: int
) -> None:
    """Clean, degraded, restored and the best baseline, for the first `count` photos of every set,
    as `sheets/` and `sheet.jpg` in the folder of the evaluation."""
    scores = {photo.id: photo for photo in photos}
    overview: list[Row] = []
    for index, (name, row) in enumerate(summary["sets"].items()):
        chosen = [case for case in cases if case.set == name and case.id in scores]
        best = best_baseline(row["baselines"])
        rows = [_row(out, case, scores[case.id], best) for case in chosen[: max(count, 1)]]
        draw_sheet(rows, out / "sheets" / f"{name.replace('/', '_').replace(' ', '_')}.jpg")
        if name in KINDS:  # each kind on another photo
            overview.append(rows[index % len(rows)])
    draw_sheet(overview, out / "sheet.jpg", window=(320, 240))


def _row(out: Path, case: Case, photo: PhotoScore, best: str | None) -> Row:
    gt, lq, restored = (Image.open(path) for path in (case.gt, case.lq, restored_path(out, case)))
    before, after = photo.scores["lq"]["psnr"], photo.scores["restored"]["psnr"]
    cells: list[Cell] = [
        ("clean", gt),
        (f"degraded, {decibel(before)} dB", lq),
        (f"restored, {decibel(after)} dB", restored),
    ]
    if best:
        picture = Image.fromarray(to_8_bit(baselines.apply(best, read_pixels(case.lq))))
        cells.append((f"best baseline, {photo.baselines[best]:.2f} dB", picture))
    seen = f", seen as {photo.predicted}" if photo.predicted else ""
    return f"{case.set}{seen}{f'; best baseline: {best}' if best else ''}", cells


def draw_worst(
    out: Path, cases: Sequence[Case], photos: Sequence[PhotoScore], harm: Summary
) -> None:
    """The worst photos of `summarize_harm`: as given, restored, and the difference of the two
    around grey, as `sheets/harm_worst.jpg`."""
    places = {case.id: case for case in cases}
    scores = {photo.id: photo for photo in photos}
    rows: list[Row] = []
    for entry in harm["worst"]:
        case, photo = places[entry["photo"]], scores[entry["photo"]]
        given, output = (
            Image.open(path).convert("RGB") for path in (case.lq, restored_path(out, case))
        )
        apart = np.asarray(output, np.float32) - np.asarray(given, np.float32)
        picture = Image.fromarray((128 + _GAIN * apart).clip(0, 255).astype(np.uint8))
        cells: list[Cell] = [
            (f"given, {decibel(photo.scores['lq']['psnr'])} dB", given),
            (f"restored, {decibel(photo.scores['restored']['psnr'])} dB", output),
            (f"difference x {_GAIN}", picture),
        ]
        title = f"{case.id.removeprefix('harm/')}, seen as {photo.predicted}"
        rows.append((title, cells))
    draw_sheet(rows, out / "sheets/harm_worst.jpg")
