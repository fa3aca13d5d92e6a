"""Networks of diffusers and open_clip at toy width, which training has at full size only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from open_clip.transformer import QuickGELU, VisionTransformer

from tests.toy_weights import VisionSizes


def autoencoder_kl(channels: tuple[int, ...] = (32, 32, 64, 64), layers: int = 1) -> Any:
    """An AutoencoderKL with 8x8 compression and random weights.

    `Any`: its annotations are too loose to be checked against.
    """
    levels = len(channels)
    arguments: dict[str, Any] = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(**arguments).eval()


def open_clip_tower(sizes: VisionSizes) -> Any:
    """With weights large enough that gelu instead of quick_gelu would show."""
    with torch.inference_mode(False):
        tower = VisionTransformer(
            sizes.image, sizes.patch, sizes.width, sizes.layers, sizes.width // 64,
            sizes.mlp / sizes.width, act_layer=QuickGELU, output_dim=sizes.projection,
        ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tower.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        norm = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
        parameter.data.copy_(norm + scale * noise)
    return tower
