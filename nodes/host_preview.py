"""What the host shows while it samples in latents of a VAE of our own."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import comfy.latent_formats
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

_SIDE, _CELLS, _CHROMA = 96, 8, 0.4
"""Pixels of the picture that the colours are fitted to, its cells, and how colourful it is."""


class PreviewedLatent(comfy.latent_formats.LatentFormat):
    """The previews made for Stable Diffusion's latents would be wrong.

    The host asks for the colours only where previews are on, so they are found then.
    """

    def __init__(self, scale_factor: float, channels: int, vae: Any) -> None:
        self.scale_factor = scale_factor
        self.latent_channels = channels
        self._vae = vae

    @cached_property
    def _colors(self) -> Tensor:
        return fit_colors(self._vae, self.scale_factor)

    @property
    def latent_rgb_factors(self) -> list[list[float]]:
        """R, G and B in [-1, 1] of each channel."""
        return self._colors[:-1].tolist()

    @property
    def latent_rgb_factors_bias(self) -> list[float]:
        """R, G and B in [-1, 1] of a latent of zeros."""
        return self._colors[-1].tolist()


def fit_colors(vae: Any, scale_factor: float) -> Tensor:
    """The linear map of latents to colours that comes closest to the VAE's own decoder.

    Returns:
        (C + 1, 3): R, G and B in [-1, 1] of each scaled latent channel, and of none, by least
        squares over a picture of soft patches, grey for the most part, as photos are.
    """
    random = torch.Generator().manual_seed(0)
    grey, color = (torch.rand(1, n, _CELLS, _CELLS, generator=random) for n in (1, 3))
    patches = F.interpolate(grey + _CHROMA * (color - 0.5), (_SIDE, _SIDE), mode="bicubic")
    raw_latent = vae.encode(patches.clamp(0, 1).movedim(1, -1))  # BCHW -> BHWC
    pixels = vae.decode(raw_latent).float().cpu().movedim(-1, 1) * 2 - 1
    latent = raw_latent.float().cpu() * scale_factor
    small = F.adaptive_avg_pool2d(pixels, latent.shape[-2:])
    channels = torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)
    rows = [rearrange(pixels, "b c h w -> (b h w) c") for pixels in (channels, small)]
    return torch.linalg.lstsq(*rows).solution
