"""Draws the training curves of one run, or of several over each other.

Run: python -m training.plots RUN [RUN...] --out curves.png
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from .config import exit_after
from .progress import read_table

_TABLES = ("metrics", "validation")
_COLUMNS = 3
_OMITTED = frozenset({"step", "eta_s"})
_LOGARITHMIC = frozenset({"loss", "grad_norm"})
Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class PlotConfig:
    """Settings of the picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (`--loop.out`)."""
    out: Path = Path("curves.png")
    """PNG, SVG or PDF file to write."""


def read_curves(run: Path) -> dict[tuple[str, str], Curve]:
    """(table, column) -> steps and values, of the columns of a run's tables.

    Raises:
        ValueError: The folder holds no table.
    """
    curves: dict[tuple[str, str], Curve] = {}
    paths = {table: run / f"{table}.csv" for table in _TABLES}
    if not any(path.exists() for path in paths.values()):
        raise ValueError(f"{run}: found no metrics.csv; give run folders (--loop.out)")
    for table, path in paths.items():
        for row in read_table(path) if path.exists() else ():
            for name, value in row.items():
                if name not in _OMITTED and value:
                    steps, values = curves.setdefault((table, name), ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


def draw_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw a panel per column of `metrics.csv` and `validation.csv`, a line per run.

    Args:
        runs: Run folders.
        out: Picture to write.

    Raises:
        ValueError: A folder holds no table.
    """
    tables = {run: read_curves(run) for run in runs}
    panels = list(dict.fromkeys(key for curves in tables.values() for key in curves))
    panels.sort(key=lambda key: _TABLES.index(key[0]))
    height = max(1, math.ceil(len(panels) / _COLUMNS))
    figure = Figure(figsize=(4.5 * _COLUMNS, 2.6 * height), dpi=90)
    # Fixed margins: a layout engine would draw all twice.
    margins = {"left": 0.06, "right": 0.98, "bottom": 0.18 / height, "top": 1 - 0.12 / height}
    figure.subplots_adjust(**margins, wspace=0.22, hspace=0.38)
    axes = figure.subplots(height, _COLUMNS, squeeze=False).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        table, name = panel
        for index, (run, curves) in enumerate(tables.items()):
            steps, values = curves.get(panel, ([], []))
            style = {"color": f"C{index % 10}", "label": run.name}
            if table == "validation" or len(steps) < 50:
                axis.plot(steps, values, marker=".", **style)
            else:
                axis.plot(steps, values, linewidth=0.5, alpha=0.35, color=style["color"])
                axis.plot(steps, _smooth(values), **style)
        if name in _LOGARITHMIC and all(
            value > 0 for curves in tables.values() for value in curves.get(panel, ([], []))[1]
        ):
            axis.set_yscale("log")
        axis.set_title(name if table == "metrics" else f"validation: {name}", fontsize=10)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - _COLUMNS) : len(panels)]:
        axis.set_xlabel("step", fontsize=8)
    if len(runs) > 1:
        axes[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of a fiftieth of the curve to either side."""
    reach = max(1, len(values) // 50)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def main(config: PlotConfig) -> None:
    draw_curves(config.runs, config.out)


if __name__ == "__main__":
    exit_after(lambda: main(tyro.cli(PlotConfig, description=__doc__)))
