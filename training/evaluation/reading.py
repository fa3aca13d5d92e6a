"""A Diff-Restorer file as training's own models, and what it reads from whole photos."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer import PromptOutput
from diff_restorer.checkpoint import read_checkpoint
from diff_restorer.views import native_views

from ..common import ModelConfig, load_models
from ..data import clip_view
from ..models import Models
from ..pretrained import Sd15Config


def open_file(path: Path, sd15: Sd15Config | None = None) -> Models:
    """The networks of a finished file, for evaluation, on the device of this process.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is no Diff-Restorer file.
        ValueError: It has no base networks of its own and none are given, or a part does not fit.
    """
    base, file = sd15 or Sd15Config(), read_checkpoint(path)
    if not file.self_contained and base.checkpoint is None:
        raise ValueError(
            f"{path}: holds no UNet, VAE and vision model; give SD 1.5's with --sd15.checkpoint "
            "and --sd15.clip"
        )
    models, _ = load_models(ModelConfig(sd15=base), [file])
    return models.eval().requires_grad_(False)


def views(models: Models, image: Tensor) -> dict[str, Tensor]:
    """What the nodes show the vision encoder of photos (B, 3, H, W) in [0, 1]: B in `clip_view`,
    and in `native_view` all windows of the first photo first."""
    size = models.sizes.vision_image
    near = native_views(image.movedim(1, -1), size).flatten(0, 1).movedim(-1, 1)
    return {"clip_view": clip_view(image, size), "native_view": clip_view(near, size)}


@torch.no_grad()
def read_prompt(models: Models, image: Tensor) -> tuple[PromptOutput, Tensor]:
    """P_S, P_D and logits of photos (B, 3, H, W) in [0, 1], and the P_CLIP that P_D is made of.

    There is a P_CLIP for each view of a photo.
    """
    image = image.to(models.prompt.prototypes.device)
    whole, close = models.tokens(views(models, image))
    return models.prompt_of(whole, close).over_views(len(image)), close


def pad_to_8(image: Tensor) -> Tensor:
    """Repeats the right and bottom edges up to multiples of 8 pixels, as the nodes do."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
