"""From scores of single photos to means, quality bars, Markdown and a few numbers to ship."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diff_restorer.degradations import KINDS
from diff_restorer.similarity import IDENTICAL

from .competing import best_baseline
from .testsets import REAL, SUITES, suite_of

DEGRADED: tuple[str, ...] = KINDS[:-1]
"""The eight kinds whose mean is the headline; `clean` is scored apart."""
_UNKNOWN = "not measured"
STANDING = (("decided_on", True), ("untouched", False))
"""Photos that decisions were made on, and photos that none was."""
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
    """`lq`, `restored`, `vae` (round trip of GT) and anchors -> metric -> value."""
    severity: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Baseline -> PSNR, dB."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Degradation type -> probability, of the workflow's classifier."""
    seconds: float = 0.0
    """Time that the server took."""
    decided_on: bool = False
    """Whether decisions were made on this photo while the model was trained."""

    @property
    def id(self) -> str:
        """That of its `Case`."""
        return f"{self.set}/{self.name}"

    @property
    def suite(self) -> str:
        """Which of `SUITES` it belongs to."""
        return suite_of(self.set)

    @property
    def gain(self) -> float:
        """PSNR of the restored photo less that of the degraded one, dB."""
        return self.scores["restored"]["psnr"] - self.scores["lq"]["psnr"]

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
    for column in ("lq", "restored", "vae", "nafnet", "bm3d"):
        rows = [photo.scores[column] for photo in photos if column in photo.scores]
        if rows:
            summary[column] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    gains = [photo.gain for photo in photos]
    summary["gain"] = _mean(gains)
    parts = {name: [p.gain for p in photos if p.decided_on is on] for name, on in STANDING}
    summary["standing"] = {
        name: {"photos": len(part), "gain": _mean(part)} for name, part in parts.items() if part
    }
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
    """Means per set, suite and overall, and the confusion matrix of the own sets.

    `overall` is the mean over the own sets of `DEGRADED`, and `confusion` is about the own sets;
    `suites` has the mean over the sets of the other suites; harm has a table of its own.
    """
    names = list(dict.fromkeys(photo.set for photo in photos))
    names.sort(
        key=lambda name: (
            SUITES.index(suite_of(name)),
            KINDS.index(name) if name in KINDS else 0,
        )
    )
    sets = {name: summarize_set([p for p in photos if p.set == name]) for name in names}
    degraded = [sets[kind] for kind in DEGRADED if kind in sets]
    synthetic = [photo for photo in photos if photo.set in KINDS and photo.predicted]
    counts = Counter((photo.set, photo.predicted) for photo in synthetic)
    right = sum(photo.set == photo.predicted for photo in synthetic)
    overall = _mean_of_sets(degraded) | {
        "kinds": len(degraded),
        "accuracy": right / len(synthetic) if synthetic else None,
    }
    suites = {
        suite: _mean_of_sets(rows)
        for suite in ("independent", "mixes", "pairs")
        if (rows := [row for name, row in sets.items() if suite_of(name) == suite])
    }
    return {
        "sets": sets,
        "overall": overall,
        "suites": suites,
        "confusion": {
            "kinds": list(KINDS),
            "counts": [[counts[(truth, seen)] for seen in KINDS] for truth in KINDS],
        },
    }


def _mean_of_sets(rows: Sequence[Summary]) -> Summary:
    """Mean over sets, as one more row of their table; only what all of them have."""
    mean: Summary = {"gain": _mean([row["gain"] for row in rows]), "standing": standing(rows)}
    for column in ("lq", "restored", "nafnet", "best_baseline"):
        values = [row[column] for row in rows if column in row]
        if values and len(values) == len(rows):
            names = [name for name, value in values[0].items() if isinstance(value, float)]
            mean[column] = {name: _mean([row[name] for row in values]) for name in names}
    return mean


def standing(rows: Sequence[Summary]) -> Summary:
    """Photos and mean gain of those decided on and those untouched, where every set has some."""
    means: Summary = {}
    for name, _ in STANDING:
        parts = [row["standing"][name] for row in rows if name in row["standing"]]
        if parts and len(parts) == len(rows):
            photos = sum(part["photos"] for part in parts)
            means[name] = {"photos": photos, "gain": _mean([part["gain"] for part in parts])}
    return means


def quality_bars(summary: Summary) -> list[Bar]:
    """The bars that the project sets itself for Nano, with what was measured."""
    sets, overall = summary["sets"], summary["overall"]
    rows = {kind: sets[kind] for kind in DEGRADED if kind in sets}
    complete = len(rows) == len(DEGRADED)
    gain, accuracy = overall["gain"], overall["accuracy"]
    below = [f"{kind} {row['gain']:+.2f}" for kind, row in rows.items() if row["gain"] < 0]
    clean = sets.get("clean", {}).get("restored", {}).get("psnr")
    better = [
        kind
        for kind, row in rows.items()
        if "best_baseline" in row and row["restored"]["psnr"] > row["best_baseline"]["psnr"]
    ]
    return [
        Bar(
            "mean PSNR over the eight kinds at least 5 dB above LQ",
            f"{gain:+.2f} dB over {len(rows)} kinds" if rows else _UNKNOWN,
            gain >= 5 if complete else None,
        ),
        Bar(
            "no kind below LQ",
            ", ".join(below) or ("none below" if rows else _UNKNOWN),
            not below if complete else None,
        ),
        Bar(
            "clean input at least 30 dB to itself",
            _UNKNOWN if clean is None else f"{clean:.2f} dB",
            None if clean is None else clean >= 30,
        ),
        Bar(
            "better than the best classical baseline on at least six of eight kinds",
            f"{len(better)} of {len(rows)}: {', '.join(better) or 'none'}" if rows else _UNKNOWN,
            len(better) >= 6 if complete else None,
        ),
        Bar(
            "classifier at least 92 % over nine classes",
            _UNKNOWN if accuracy is None else f"{accuracy:.1%}",
            accuracy >= 0.92 if accuracy is not None and complete and "clean" in sets else None,
        ),
        _bar_of_pairs(sets, "low_light", "low-light"),
        _bar_of_pairs(sets, "noise", "noise"),
    ]


def _bar_of_pairs(sets: Summary, kind: str, label: str) -> Bar:
    pairs = [
        (row["gain"], row["photos"])
        for name, row in sets.items()
        if name.startswith(REAL) and row["kind"] == kind and "synth" not in name
    ]
    total = sum(count for _, count in pairs)
    gain = sum(gain * count for gain, count in pairs) / total if total else math.nan
    text = f"{gain:+.2f} dB on {total} pairs" if total else _UNKNOWN
    return Bar(f"real {label} pairs improve on average", text, gain > 0 if total else None)


def goals(summary: Summary) -> list[Bar]:
    """What the next version is to reach: for information, never a failure."""
    sets, suites, harm = summary["sets"], summary["suites"], summary.get("harm", {})
    gains = {kind: row["gain"] for kind, row in sets.items() if kind in DEGRADED}
    gains["mean of eight kinds"] = summary["overall"]["gain"] if len(gains) == 8 else math.nan
    gains["mean of mixes"] = suites.get("mixes", {}).get("gain", math.nan)
    wanted = {
        "mean of eight kinds": 7.0, "jpeg": 1.3, "blur": 1.2, "raindrop": 1.5, "haze": 9.0,
        "snow": 8.0, "rain": 8.5, "low_light": 15.0, "mean of mixes": 6.0,
    }  # fmt: skip
    bars = [
        Bar(f"{name}: at least {bar:+.1f} dB", f"{gains[name]:+.2f} dB", gains[name] >= bar)
        for name, bar in wanted.items()
        if not math.isnan(gains.get(name, math.nan))
    ]
    if "noise" in sets:
        noise = sets["noise"]["restored"]["psnr"]
        bars.append(Bar("noise: at least 27.2 dB", f"{noise:.2f} dB", noise >= 27.2))
    if row := harm.get("all"):
        lose, low = row["lose"], row["below_30"] or 0.0
        text = "near-clean photos: under 2 % lose over 1 dB, none falls below 30 dB"
        bars.append(Bar(text, f"{lose:.1%}, {low:.1%}", lose < 0.02 and low == 0))
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
        "sets": {
            name: row(values)
            for name, values in summary["sets"].items()
            if suite_of(name) in ("own", "pairs")
        },
        "mean_gain": two(summary["overall"]["gain"]),
        "accuracy": two(summary["overall"]["accuracy"]),
    }


def decibel(value: float | None) -> str:
    """PSNR for a table."""
    if value is None or math.isnan(value):
        return "-"
    return "identical" if value >= IDENTICAL - 1e-3 else f"{value:.2f}"
