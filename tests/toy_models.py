"""A network of open_clip at any width, which training reads at full size only."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from tests.toy_weights import VisionSizes


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
