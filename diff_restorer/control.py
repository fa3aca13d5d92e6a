"""Image-guided Control Module: a ControlNet on the LQ latent, steered by P_D.

    residuals = ControlNet(x_t, t, hint = Conv_0(z_LQ), context = P_D)
    prediction = UNet(x_t, t, P_S, residuals)

The trunk and its cross-attention are the ControlNet class of the host (`ControlModel.forward` in
nodes/host_control.py) or of diffusers (`Models.denoise` in training/models.py): both hand it P_D
where a prompt would be. The hint's conv is made here.
"""

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
    (DiffBIR, arXiv 2308.15070), and leaves conv_in itself as the UNet has it. How the paper encodes
    the LQ image, and how P_D enters, is not published: both are our choices.
    """
    return zero_init(
        ops.Conv2d(latent_channels, model_channels, 3, padding=1, device=device, dtype=dtype)
    )
