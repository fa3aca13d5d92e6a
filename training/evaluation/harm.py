"""What becomes of photos that hardly need restoring: shares that lose, and the worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .report import PhotoScore, Summary
from .suites import MILD_PAIRS

CEILING = 20 * math.log10(255)
"""PSNR of an error of one grey level (48.13 dB): what is nearer counts as untouched."""
LOSS = 1.0
"""Decibels below which a loss does not count."""
WORST = 10
"""Photos on the sheet."""


def psnr_before(photo: PhotoScore) -> float:
    """PSNR of the photo as it was given, dB, at most `CEILING`."""
    return min(photo.scores["lq"]["psnr"], CEILING)


def psnr_after(photo: PhotoScore) -> float:
    """PSNR of the restored photo, dB, at most `CEILING`."""
    return min(photo.scores["restored"]["psnr"], CEILING)


def loss(photo: PhotoScore) -> float:
    """What restoring costs, dB, both ends at most `CEILING`.

    So of a photo that is its own reference, 1 dB is lost by an error of 1.12 grey levels, and one
    that was 34 dB away from its reference loses 1 dB at 33.
    """
    return psnr_before(photo) - psnr_after(photo)


def fallen(photos: Sequence[PhotoScore], level: float) -> float | None:
    """Share of the photos at `level` dB or above that end below; None where there was none."""
    above = [photo for photo in photos if psnr_before(photo) >= level]
    return float(np.mean([psnr_after(p) < level for p in above])) if above else None


def _row(photos: Sequence[PhotoScore]) -> Summary:
    ends = [psnr_after(photo) for photo in photos]
    return {
        "photos": len(photos),
        "before": float(np.mean([psnr_before(photo) for photo in photos])),
        "after": float(np.mean(ends)),
        "lose": float(np.mean([loss(photo) > LOSS for photo in photos])),
        "below_40": fallen(photos, 40),
        "below_30": fallen(photos, 30),
        "percentile_5": float(np.percentile(ends, 5)),
        "lowest": min(ends),
        "seen_clean": float(np.mean([photo.predicted == "clean" for photo in photos])),
    }


def summarize_harm(photos: Sequence[PhotoScore]) -> Summary:
    """The harm table: `looks` -> row, `all` looks together (without the real pairs), `worst`; empty
    where no photo is of the suite `harm`."""
    chosen = [photo for photo in photos if photo.suite == "harm"]
    if not chosen:
        return {}
    names = list(dict.fromkeys(photo.set for photo in chosen))
    rows = {name: _row([photo for photo in chosen if photo.set == name]) for name in names}
    made = [photo for photo in chosen if photo.set != MILD_PAIRS]
    worst = sorted((p for p in chosen if loss(p) > 0), key=loss, reverse=True)[:WORST]
    return {
        "looks": {name.removeprefix("harm/"): row for name, row in rows.items()},
        "all": _row(made) if made else None,
        "worst": [
            {
                "photo": photo.id,
                "before": photo.scores["lq"]["psnr"],
                "after": photo.scores["restored"]["psnr"],
                "loss": loss(photo),
                "seen_as": photo.predicted,
            }
            for photo in worst
        ],
    }
