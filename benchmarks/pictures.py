"""How far tiled decodes are from whole ones, in figures and as a picture of the seams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

PAIRS = (("exact", "untiled"), ("fast", "untiled"), ("stock_tiled", "stock_untiled"))
"""Each tiled decode with the whole one that it should equal."""


def compare(pixels: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Differences in levels of 255 for each side, and benchmarks_seams.png of the first one.

    Args:
        pixels: `<case> <side>` -> .npy of (H, W, 3) levels.
        out: Folder for the picture.
    """
    found: dict[str, Any] = {}
    maps: dict[str, np.ndarray] = {}
    for tiled, whole in PAIRS:
        for key, path in pixels.items():
            name, side = key.rsplit(" ", 1)
            other = pixels.get(f"{whole} {side}")
            if name != tiled or other is None:
                continue
            difference = np.abs(
                np.load(path).astype(np.float32) - np.load(other).astype(np.float32)
            )
            found[key] = {"mean": float(difference.mean()), "max": float(difference.max())}
            maps[f"{name.replace('_', ' ')}, {side} px"] = difference.max(axis=2)
    if maps:
        _draw(maps, out / "benchmarks_seams.png")
    return found


def _draw(maps: Mapping[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(maps), 4.4), layout="constrained")
    rows = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, difference) in zip(rows, maps.items(), strict=True):
        step = max(1, difference.shape[0] // 1024)
        image = axes.imshow(difference[::step, ::step], vmin=0, vmax=8, cmap="magma")
        axes.set_title(f"{name}: mean {difference.mean():.2f}, max {difference.max():.1f}")
        axes.axis("off")
        figure.colorbar(image, ax=axes, shrink=0.8, label="levels of 255")
    figure.savefig(path, dpi=100)
