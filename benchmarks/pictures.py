"""How far tiled decodes are from whole ones, in figures and as a picture of the seams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

PAIRS = (("exact", "untiled"), ("fast", "untiled"), ("stock_tiled", "stock_untiled"))
"""Each tiled decode with the whole one that it should equal."""


def compare(folder: Path, out: Path) -> dict[str, Any]:
    """Differences in levels of 255, by case and side, of `<case> <side>.npy` in a folder, each
    (H, W, 3) levels, and in another folder benchmarks_seams.png of all of them."""
    differences: dict[str, Any] = {}
    maps: dict[str, np.ndarray] = {}
    for tiled, whole in PAIRS:
        for path in sorted(folder.glob(f"{tiled} *.npy")):
            other = path.with_name(path.name.replace(tiled, whole))
            if not other.exists():
                continue
            one, two = (np.load(name).astype(np.float32) for name in (path, other))
            difference = np.abs(one - two)
            mean, most = float(difference.mean()), float(difference.max())
            differences[path.stem] = {"mean": mean, "max": most}
            maps[f"{path.stem.replace('_', ' ')} px"] = difference.max(axis=2)
    if maps:
        _draw(maps, out / "benchmarks_seams.png")
    return differences


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
