"""What every program does first: read its arguments, data and starting file."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diff_restorer.checkpoint import CheckpointInfo
from diff_restorer.degradations import KINDS

from .data import CleanPhotos, RestorationSamples
from .models import CLIP_MEAN, CLIP_STD, Models, Sizes


@dataclass(frozen=True)
class DataConfig:
    """Where photos come from and how samples are cut."""

    photos: Path
    """Clean photos: a folder, a text list or a CSV manifest."""
    crop: int = 128
    """Side of the training crop in pixels, a multiple of 8 * 2^(UNet levels - 1)."""
    held_out: int = 40
    """Every n-th photo is kept for validation."""
    validation_samples: int = 18
    """Fixed samples (held-out photos, all kinds in turn) that are validated and drawn."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the networks and the files they start from."""

    init: tuple[Path, ...] = ()
    """Diff-Restorer files to start from; later files win where parts repeat."""
    sizes: Sizes = field(default_factory=Sizes)
    """Widths and depths; the defaults are Nano's."""


def open_models(config: ModelConfig, needed: tuple[str, ...] = ()) -> tuple[Models, set[str]]:
    """Build the networks and load `config.init`.

    Args:
        needed: File prefixes that a program cannot start without.

    Returns:
        The models and the prefixes that were loaded.

    Raises:
        ValueError: A needed part is in none of the files.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    models = Models(config.sizes, KINDS)
    found: set[str] = set()
    for path in config.init:
        found |= models.load(path)
    if missing := [prefix for prefix in needed if prefix not in found]:
        raise ValueError(f"--model.init: {missing} not found in {list(map(str, config.init))}")
    return models, found


def open_data(
    config: DataConfig, sizes: Sizes, seed: int
) -> tuple[RestorationSamples, dict[str, Tensor]]:
    """Training samples and one fixed validation batch from photos that training never sees."""
    photos = CleanPhotos(config.photos)
    held_out = range(0, len(photos), config.held_out)
    kept = [index for index in range(len(photos)) if index % config.held_out]
    train = RestorationSamples(
        photos.subset(kept), crop=config.crop, clip_size=sizes.vision_image, seed=seed
    )
    validation = RestorationSamples(
        photos.subset(held_out), crop=config.crop, clip_size=sizes.vision_image, seed=seed + 1
    )
    chosen: list[dict[str, Tensor]] = []
    index = 0
    while len(chosen) < config.validation_samples:  # kinds are random per index: take them in turn
        sample = validation[index]
        if int(sample["label"]) == len(chosen) % len(KINDS):
            chosen.append(sample)
        index += 1
    return train, default_collate(chosen)


def checkpoint_info(models: Models, config: dict[str, Any]) -> CheckpointInfo:
    """Metadata of a file made by this run."""
    sizes = models.sizes
    return CheckpointInfo(
        types=models.types,
        base_model="nano",
        clip={
            "name": "nano",
            "image_size": sizes.vision_image,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "degradation_view": models.degradation_view,
        },
        latent_scale=models.latent_scale,
        prediction=models.prediction,
        config=config,
        git_revision=git_revision(),
        scores={},
    )


def git_revision() -> str:
    """Revision of the code, or `unknown` outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
