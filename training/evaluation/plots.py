"""Pictures of an evaluation: bars, confusion matrix, t-SNE, side-by-side sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.manifold import TSNE
from tqdm import tqdm

from diff_restorer.degradations import KINDS
from tools import sheet
from tools.sheet import Cell

from ..pretrained import Sd15Config
from .pictures import read_image
from .reading import open_file, read_prompt
from .report import DEGRADED, Summary
from .testsets import Case

matplotlib.use("Agg")
_COLOURS = dict(zip(KINDS, plt.get_cmap("tab10")(range(len(KINDS))), strict=True))
_COLOURS["clean"] = np.array([0.25, 0.25, 0.25, 1.0])
LQ_COLOUR, BASELINE_COLOUR, NAFNET_COLOUR, OURS_COLOUR = "#b8b8b8", "#e0a458", "#7aa874", "#33658a"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), dpi=140, layout="constrained", squeeze=False
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_bars(summary: Summary, path: Path, name: str) -> None:
    """PSNR per kind: degraded, best baseline, NAFNet where there is one, and the model of that
    name."""
    sets = {kind: summary["sets"][kind] for kind in DEGRADED if kind in summary["sets"]}
    if not sets:
        return
    rows = [*sets.values(), summary["overall"]]
    series = [
        ("degraded", LQ_COLOUR, [row["lq"]["psnr"] for row in rows]),
        (
            "best classical baseline, told the kind",
            BASELINE_COLOUR,
            [row.get("best_baseline", {}).get("psnr", np.nan) for row in rows],
        ),
        ("NAFNet", NAFNET_COLOUR, [row.get("nafnet", {}).get("psnr", np.nan) for row in rows]),
        (name, OURS_COLOUR, [row["restored"]["psnr"] for row in rows]),
    ]
    series = [entry for entry in series if not np.isnan(entry[2]).all()]
    figure, (axis,) = _figure(11, 4.2)
    width = 0.84 / len(series)
    places = np.arange(len(rows)) + 0.35 * (np.arange(len(rows)) == len(sets))
    for index, (label, colour, values) in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * width
        drawn = axis.bar(places + offset, values, 0.92 * width, color=colour, label=label)
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axis.set_xticks(places, [*sets, "mean"])
    axis.set_ylabel("PSNR, dB")
    values = np.concatenate([entry[2] for entry in series])
    axis.set_ylim(max(0, np.nanmin(values) - 3), np.nanmax(values) + 3.5)
    axis.legend(frameon=False, ncols=len(series), loc="upper left")
    _save(figure, path)


def draw_confusion(confusion: Summary, accuracy: float | None, path: Path) -> None:
    """The classifier's confusion matrix, in per cent of each row."""
    counts = np.array(confusion["counts"], float)
    if not counts.any():
        return
    share = counts / counts.sum(1, keepdims=True).clip(1)
    kinds = confusion["kinds"]
    figure, (axis,) = _figure(6.2, 5.6)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(share > 0):
        value = share[row, column]
        colour = "white" if value > 0.55 else "black"
        axis.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xlabel("seen as")
    axis.set_ylabel("true kind")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title(f"accuracy {accuracy:.1%}, {int(counts.sum())} photos" if accuracy else "")
    _save(figure, path)


def draw_tsne(file: Path, sd15: Sd15Config, cases: Sequence[Case], path: Path) -> str | None:
    """t-SNE of P_CLIP and P_D of the own sets, a point per photo, coloured by kind; returns why it
    was not drawn.

    Source: figure 3 of Diff-Restorer (arXiv 2407.03636).
    """
    chosen = [case for case in cases if case.set in KINDS]
    if len(chosen) < 5:
        return "t-SNE: needs at least five photos of the own sets"
    try:
        models = open_file(file, sd15)
    except (ValueError, OSError) as error:
        return f"t-SNE: {error}"
    features: dict[str, list[NDArray[np.float32]]] = {
        "P_CLIP (mean over tokens)": [],
        "P_D (pooled)": [],
    }
    for case in tqdm(chosen, desc="features", unit="photo"):
        prompt, tokens = read_prompt(models, read_image(case.lq))
        means = tokens.mean(dim=(0, 1)), prompt.pooled[0]
        for rows, mean in zip(features.values(), means, strict=True):
            rows.append(mean.cpu().numpy())
    figure, axes = _figure(5.4 * len(features) + 1.4, 5.0, len(features))
    labels = np.array([case.set for case in chosen])
    for axis, (title, rows) in zip(axes, features.items(), strict=True):
        values = np.stack(rows)
        scaled = (values - values.mean(0)) / (values.std() + 1e-8)
        embedding = TSNE(
            perplexity=min(30.0, (len(chosen) - 1) / 3), init="pca", random_state=0
        ).fit_transform(scaled)
        for kind in KINDS:
            place = embedding[labels == kind]
            axis.scatter(
                place[:, 0], place[:, 1], s=18, color=_COLOURS[kind], label=kind, linewidths=0
            )
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("#cccccc")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=1.6)
    _save(figure, path)
    return None


def draw_differences(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Horizontal bars with error bars: what each variant changes against the full model, by `name`,
    `difference` (dB) and `interval` (dB or None) of each row, as `ablate` finds them."""
    figure, (axis,) = _figure(8.2, 0.9 + 0.45 * len(rows))
    names = [row["name"] for row in rows]
    values = np.array([row["difference"] for row in rows])
    errors = np.array([row["interval"] or 0.0 for row in rows])
    colours = ["#a23b3b" if value < 0 else OURS_COLOUR for value in values]
    axis.barh(names, values, color=colours, height=0.62)
    axis.errorbar(values, names, xerr=errors, fmt="none", ecolor="black", capsize=3, lw=1)
    reach = float(np.abs(values).max() + errors.max()) or 1.0
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        side = -1 if value < 0 else 1
        axis.text(
            value + side * (error + 0.02 * reach), place, f"{value:+.2f}", va="center",
            ha="right" if side < 0 else "left", fontsize=8,
        )  # fmt: skip
    low, high = min(0.0, float((values - errors).min())), max(0.0, float((values + errors).max()))
    axis.set_xlim(low - 0.14 * reach, high + 0.14 * reach)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("PSNR against the full model, dB (bars: 95 % of the paired mean)")
    axis.set_title(title, fontsize=10)
    _save(figure, path)


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Cell]]], path: Path, window: tuple[int, int] | None = None
) -> None:
    """Side-by-side pictures, one titled row of cells (label, picture) per photo; of each picture
    the centre of `window`, width and height in pixels, or all."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if window:
        rows = [
            (title, [(label, _centre(p, window)) for label, p in cells]) for title, cells in rows
        ]
    drawn = sheet.stack([sheet.row(title, cells) for title, cells in rows])
    drawn.save(path, quality=90)


def _centre(picture: Image.Image, window: tuple[int, int]) -> Image.Image:
    left, top = (max(0, have - want) // 2 for have, want in zip(picture.size, window, strict=True))
    return picture.crop((left, top, left + window[0], top + window[1]))
