"""How near a picture is to another one: the one definition for nodes, training and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IDENTICAL = 100.0
"""PSNR of two pictures that do not differ, where the formula gives infinity."""
SSIM_WINDOW = 11
"""Pixels; Gaussian, sigma 1.5."""


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, (B,), at most `IDENTICAL`.

    Args:
        image: (B, 3, H, W) in [0, 1], clamped.
        reference: Likewise.
    """
    images = image.clamp(0, 1), reference.clamp(0, 1)
    error = F.mse_loss(*images, reduction="none").flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(10 ** (-IDENTICAL / 10)))


def ssim(image: Tensor, reference: Tensor) -> float | None:
    """Structural similarity of pictures in [0, 1], (B, 3, H, W), clamped: the mean over channels
    and all places where the window fits; None where it fits nowhere.

    Source: Wang et al. (2004), by kornia; as scikit-image's with `gaussian_weights`.
    """
    from kornia.metrics import ssim as ssim_map  # training alone runs without kornia

    if min(image.shape[-2:]) < SSIM_WINDOW:
        return None
    images = image.clamp(0, 1), reference.clamp(0, 1)
    return float(ssim_map(*images, SSIM_WINDOW, padding="valid").mean())
