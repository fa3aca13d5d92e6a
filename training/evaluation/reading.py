"""A Diff-Restorer file as training's own models, and what it reads from whole photos."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer import FusionConfig, PromptOutput
from diff_restorer.checkpoint import Checkpoint, read_checkpoint
from diff_restorer.views import WHOLE, native_view

from ..data import clip_view
from ..models import Models, Sizes


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """Widths and depths of a self-contained file, from its tensors' shapes.

    Raises:
        KeyError: A tensor that carries a size is missing; the message is its key.
    """
    vae, vision = checkpoint.state("base.vae."), checkpoint.state("base.clip_vision.")
    prompt = checkpoint.state("prompt_processor.")
    fusion = FusionConfig.from_state_dict(checkpoint.state("decoder.fusion."))
    width, _, patch, _ = vision["vision_model.embeddings.patch_embedding.weight"].shape
    places = vision["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    levels = _count(vae, "encoder.down.{}.block.0.conv1.weight")
    channels, layers, attention = _unet_sizes(checkpoint.state("base.unet."))
    return Sizes(
        vae_channels=tuple(
            vae[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        vae_layers=_count(vae, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=vae["post_quant_conv.weight"].shape[1],
        unet_channels=channels,
        unet_layers=layers,
        unet_attention=attention,
        context_width=prompt["classifier.weight"].shape[1],
        vision_width=width,
        vision_layers=_count(vision, "vision_model.encoder.layers.{}.mlp.fc1.weight"),
        vision_image=math.isqrt(places) * patch,
        vision_patch=patch,
        prompt_hidden=prompt["semantic.0.weight"].shape[0],
        fusion_levels=tuple(level for level, _ in fusion.channels),
        fusion_growth=fusion.growth,
        fusion_depth=fusion.depth,
        fusion_pixel_width=fusion.pixels[1] if fusion.pixels else 0,
    )


def _count(state: Mapping[str, Tensor], key: str) -> int:
    number = 0
    while key.format(number) in state:
        number += 1
    return number


def _unet_sizes(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, tuple[bool, ...]]:
    """Channels per level, residual blocks per level, and whether a level has attention."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for block in itertools.count(1):
        if f"input_blocks.{block}.0.op.weight" in state:
            levels.append([])
        elif (conv := f"input_blocks.{block}.0.out_layers.3.weight") in state:
            attends = f"input_blocks.{block}.1.norm.weight" in state
            levels[-1].append((state[conv].shape[0], attends))
        else:
            break
    channels = tuple(blocks[-1][0] for blocks in levels)
    return channels, len(levels[0]), tuple(blocks[-1][1] for blocks in levels)


def open_file(path: Path) -> Models:
    """The networks of a self-contained file, for evaluation.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is no Diff-Restorer file.
        ValueError: It has no base networks of its own, or a part does not fit.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.self_contained:
        raise ValueError(f"{path}: holds no UNet, VAE and vision model; give a Nano file")
    view = checkpoint.info.clip.get("degradation_view", WHOLE)
    info = checkpoint.info
    models = Models(sizes_of(checkpoint), info.types, info.prediction, view)
    models.load(path)
    return models.eval().requires_grad_(False)


def views(models: Models, image: Tensor) -> dict[str, Tensor]:
    """What the nodes show the vision encoder of photos (B, 3, H, W) in [0, 1]."""
    size = models.sizes.vision_image
    near = native_view(image.movedim(1, -1), size).movedim(-1, 1)
    return {"clip_view": clip_view(image, size), "native_view": clip_view(near, size)}


@torch.no_grad()
def read_photo(models: Models, image: Tensor) -> tuple[PromptOutput, Tensor]:
    """P_S, P_D and logits of photos (B, 3, H, W) in [0, 1], and the P_CLIP that P_D is made of."""
    whole, close = models.tokens(views(models, image))
    return models.prompt_of(whole, close), close


def pad_to_8(image: Tensor) -> Tensor:
    """Repeats the right and bottom edges up to multiples of 8 pixels, as the nodes do."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
