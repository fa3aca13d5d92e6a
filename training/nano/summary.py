"""What a training in memory says at its end: where the time went, stage by stage."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from ..common import home
from ..loop import Spent

log = logging.getLogger(__name__)

TRAINING = ("data", "forward and backward", "optimizer")
"""Parts of a stage's time in which it sees crops."""


def tell(out: Path, spent: Mapping[str, Spent], seconds: float) -> None:
    """Log it, and leave it in <out>/summary.json.

    Args:
        out: Folder.
        spent: By stage.
        seconds: Of the whole, what no stage counts included.
    """
    stages = {name: _stage(stage) for name, stage in spent.items()}
    for name, row in stages.items():
        log.info(
            "%s: %.1f s, %d steps, %d crops, %.3g crops/s while training",
            *(name, row["seconds"], row["steps"], row["crops"], row["crops_per_s"]),
        )
    parts: dict[str, float] = {}
    for stage in spent.values():
        for part, taken in stage.parts.items():
            parts[part] = parts.get(part, 0.0) + taken
    parts["other"] = seconds - sum(parts.values())
    shares = {part: round(taken / seconds, 4) for part, taken in parts.items()}
    peak = max((stage.peak_bytes for stage in spent.values()), default=0.0) / 1e9
    line = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
    log.info("%.1f s: %s; peak memory %.2f GB", seconds, line, peak)
    summary = {
        "device": torch.cuda.get_device_name() if home().type == "cuda" else "cpu",
        "seconds": round(seconds, 2),
        "shares": shares,
        "peak_gb": round(peak, 3),
        "stages": stages,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _stage(spent: Spent) -> dict[str, float]:
    training = sum(spent.parts.get(part, 0.0) for part in TRAINING)
    return {
        "seconds": round(spent.seconds, 2),
        "steps": spent.steps,
        "crops": spent.samples,
        "crops_per_s": round(spent.samples / training, 2) if training else 0.0,
    }
