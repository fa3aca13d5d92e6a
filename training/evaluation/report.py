"""From scores of single photos to means, quality bars, Markdown and a few numbers to ship."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diff_restorer.degradations import KINDS

from .competing import best_baseline
from .metrics import IDENTICAL
from .testsets import REAL

DEGRADED: tuple[str, ...] = KINDS[:-1]
"""The eight kinds whose mean is the headline; `clean` is scored apart."""
Summary = dict[str, Any]


@dataclass(frozen=True)
class PhotoScore:
    """Everything that was measured on one photo of one test set."""

    set: str
    name: str
    kind: str | None
    size: tuple[int, int]
    """Width and height, pixels."""
    scores: Mapping[str, Mapping[str, float]]
    """`lq`, `restored`, `vae` (round trip of GT), `nafnet` -> metric -> value."""
    severity: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Baseline -> PSNR, dB."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Degradation type -> probability, of the workflow's classifier."""
    seconds: float = 0.0
    """Time that the server took."""

    @property
    def predicted(self) -> str | None:
        """The most probable type."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)


@dataclass(frozen=True)
class Bar:
    """One quality bar and what was measured."""

    name: str
    value: str
    passed: bool | None
    """None where it was not measured."""


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def summarize_set(photos: Sequence[PhotoScore]) -> Summary:
    """Means over the photos of one set."""
    kind = photos[0].kind
    summary: Summary = {"kind": kind, "photos": len(photos)}
    for column in ("lq", "restored", "vae", "nafnet"):
        rows = [photo.scores[column] for photo in photos if column in photo.scores]
        if rows:
            summary[column] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    gains = [p.scores["restored"]["psnr"] - p.scores["lq"]["psnr"] for p in photos]
    summary["gain"] = _mean(gains)
    summary["gain_standard_error"] = (
        float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
    )
    tried = {name: _mean([p.baselines[name] for p in photos]) for name in photos[0].baselines}
    summary["baselines"] = tried
    if best := best_baseline(tried):
        summary["best_baseline"] = {"name": best, "psnr": tried[best]}
    seen = Counter(photo.predicted for photo in photos if photo.predicted)
    summary["seen_as"] = dict(seen.most_common())
    summary["recall"] = seen[kind] / len(photos) if kind in KINDS and seen else None
    summary["seconds"] = _mean([photo.seconds for photo in photos])
    return summary


def summarize(photos: Sequence[PhotoScore]) -> Summary:
    """Means per set and overall, and the confusion matrix of the synthetic sets."""
    names = list(dict.fromkeys(photo.set for photo in photos))
    names.sort(key=lambda name: (name.startswith(REAL), KINDS.index(name) if name in KINDS else 0))
    sets = {name: summarize_set([p for p in photos if p.set == name]) for name in names}
    degraded = [sets[kind] for kind in DEGRADED if kind in sets]
    synthetic = [photo for photo in photos if photo.set in KINDS and photo.predicted]
    counts = Counter((photo.set, photo.predicted) for photo in synthetic)
    right = sum(photo.set == photo.predicted for photo in synthetic)
    overall: Summary = {"kinds": len(degraded), "gain": _mean([row["gain"] for row in degraded])}
    for column in ("lq", "restored", "nafnet"):
        rows = [row[column] for row in degraded if column in row]
        if rows and len(rows) == len(degraded):
            overall[column] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    best = [row["best_baseline"]["psnr"] for row in degraded if "best_baseline" in row]
    overall["best_baseline"] = {"psnr": _mean(best)}
    overall["accuracy"] = right / len(synthetic) if synthetic else None
    return {
        "sets": sets,
        "overall": overall,
        "confusion": {
            "kinds": list(KINDS),
            "counts": [[counts[(truth, found)] for found in KINDS] for truth in KINDS],
        },
    }


def quality_bars(summary: Summary) -> list[Bar]:
    """The bars that the project sets itself for Nano, with what was measured."""
    sets, overall = summary["sets"], summary["overall"]
    rows = {kind: sets[kind] for kind in DEGRADED if kind in sets}
    complete = len(rows) == len(DEGRADED)
    bars = [
        Bar(
            "mean PSNR over the eight kinds at least 5 dB above LQ",
            f"{overall['gain']:+.2f} dB over {len(rows)} kinds",
            overall["gain"] >= 5 if complete else None,
        )
    ]
    below = [f"{kind} {row['gain']:+.2f}" for kind, row in rows.items() if row["gain"] < 0]
    bars.append(
        Bar("no kind below LQ", ", ".join(below) or "none below", not below if complete else None)
    )
    clean = sets.get("clean", {}).get("restored", {}).get("psnr")
    bars.append(
        Bar(
            "clean input at least 30 dB to itself",
            "not measured" if clean is None else f"{clean:.2f} dB",
            None if clean is None else clean >= 30,
        )
    )
    better = [
        kind
        for kind, row in rows.items()
        if "best_baseline" in row and row["restored"]["psnr"] > row["best_baseline"]["psnr"]
    ]
    bars.append(
        Bar(
            "better than the best classical baseline on at least six of eight kinds",
            f"{len(better)} of {len(rows)}: {', '.join(better) or 'none'}",
            len(better) >= 6 if complete else None,
        )
    )
    accuracy = overall["accuracy"]
    bars.append(
        Bar(
            "classifier at least 92 % over nine classes",
            "not measured" if accuracy is None else f"{accuracy:.1%}",
            accuracy >= 0.92 if accuracy is not None and complete and "clean" in sets else None,
        )
    )
    for kind, label in (("low_light", "low-light"), ("noise", "noise")):
        pairs = [
            (row["gain"], row["photos"])
            for name, row in sets.items()
            if name.startswith(REAL) and row["kind"] == kind and "synth" not in name
        ]
        total = sum(count for _, count in pairs)
        gain = sum(gain * count for gain, count in pairs) / total if total else math.nan
        text = f"{gain:+.2f} dB on {total} pairs" if total else "not measured"
        bars.append(
            Bar(f"real {label} pairs improve on average", text, gain > 0 if total else None)
        )
    return bars


def compact_scores(summary: Summary, about: Mapping[str, Any]) -> Summary:
    """What goes into the weights' metadata (`training.export --scores`)."""

    def two(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    def row(values: Summary) -> Summary:
        return {
            "photos": values["photos"],
            "psnr_lq": two(values["lq"]["psnr"]),
            "psnr": two(values["restored"]["psnr"]),
            "ssim": two(values["restored"]["ssim"]),
            "recall": two(values["recall"]),
        }

    return {
        "test_sets": {key: about[key] for key in ("clean", "seed", "limit", "definition")},
        "sets": {name: row(values) for name, values in summary["sets"].items()},
        "mean_gain": two(summary["overall"]["gain"]),
        "accuracy": two(summary["overall"]["accuracy"]),
    }


def decibel(value: float | None) -> str:
    """PSNR for a table."""
    if value is None or math.isnan(value):
        return "-"
    return "identical" if value >= IDENTICAL - 1e-3 else f"{value:.2f}"
