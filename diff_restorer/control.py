"""What the Image-guided Control Module adds to a ControlNet: a hint that is the LQ latent."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def zero_init(module: ModuleT) -> ModuleT:
    """Set all parameters of `module` to zero, so that what it injects is nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def make_hint_conv(
    latent_channels: int,
    model_channels: int,
    ops: Any = nn,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Zero-initialised 3x3 conv on the scaled LQ latent (B, 4, H/8, W/8), added after conv_in.

    This equals concatenating the LQ latent to the input of conv_in, as IRControlNet does
    (DiffBIR, arXiv 2308.15070), and leaves conv_in itself as the UNet has it. The trunk is the
    ControlNet class of diffusers (training) or of the host (nodes); its cross-attention context is
    P_D. How the paper encodes the LQ image is not published: this is our choice.
    """
    return zero_init(
        ops.Conv2d(latent_channels, model_channels, 3, padding=1, device=device, dtype=dtype)
    )
