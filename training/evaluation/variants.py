"""The restoration taken apart: one photo through training's own models, with parts left out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diff_restorer import PromptOutput, aware_decode, encode_with_features, photo_statistics
from diff_restorer.decoder import Features

from ..data import seeded, to_8_bit
from ..diffusion import sample
from ..models import Models, to_pixels
from .reading import pad_to_8, read_prompt


@dataclass(frozen=True)
class Variant:
    """What is left out of the full restoration."""

    title: str
    """In tables."""
    latent: Literal["sampled", "lq", "gt"] = "sampled"
    """What is decoded: what diffusion samples, or the latent of the degraded or clean photo."""
    semantic: bool = True
    """P_S as the UNet's prompt; else zeros, as in training's dropout."""
    degradation: bool = True
    """P_D as the control module's prompt; else the mean of the class prototypes."""
    decoder: Literal["aware", "stock"] = "aware"
    """The degradation-aware decoder, or the VAE's own."""
    pooled: bool = True
    """Pooled P_D in the decoder; else the mean of the class prototypes."""
    fidelity: float = 1.0
    """Weight of the degraded photo's own features in the decoder."""
    steps: int | None = None
    """Sampling steps; None takes the program's."""
    retrained: bool = False
    """Only a file that was trained that way shows it: it cannot be switched off afterwards."""


VARIANTS: Mapping[str, Variant] = {
    "full": Variant("full model"),
    "no_ps": Variant("without P_S", semantic=False),
    "no_pd_control": Variant("without P_D in the control", degradation=False),
    "no_pd_decoder": Variant("aware decoder without P_D", pooled=False),
    "no_pd": Variant("without P_D anywhere", degradation=False, pooled=False),
    "no_ce": Variant("trained without CE", retrained=True),
    "stock_decoder": Variant("stock decoder", decoder="stock"),
    "fidelity_0": Variant("aware decoder, fidelity 0", fidelity=0.0),
    "fidelity_0.5": Variant("aware decoder, fidelity 0.5", fidelity=0.5),
    "no_diffusion": Variant("without diffusion (LQ latent)", latent="lq"),
    "steps_20": Variant("20 sampling steps", steps=20),
    "gt_latent": Variant("GT latent (bound of any sampler)", latent="gt"),
}
"""Every variant under its name on the command line."""


class Photo:
    """One degraded photo with everything that variants share, computed when first needed."""

    def __init__(self, models: Models, lq: Tensor, gt: Tensor, noise_seed: tuple[int, str]) -> None:
        """Reads a photo (1, 3, H, W) in [0, 1] with models of `reading.open_file`; `gt` is only for
        the latent of the clean one, and the sampler's noise a function of `noise_seed`, (seed,
        name)."""
        self.models, self.gt = models, gt
        self.size = lq.shape[-2:]
        self.seed, self.name = noise_seed
        self.prompt: PromptOutput
        self.prompt, _ = read_prompt(models, lq)
        self.trunk = models.decoder.trunk(models.vae)
        self.pixels = self._pixels(lq)
        self.hint, self.features = self._encode(self.pixels)
        self._latents: dict[tuple[bool, bool, int], Tensor] = {}

    def _pixels(self, image: Tensor) -> Tensor:
        return to_pixels(pad_to_8(image)).to(self.models.prompt.prototypes.device)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Features]:
        levels = self.models.decoder.extension.levels
        moments, features = encode_with_features(self.trunk, pixels, levels)
        return moments[:, : self.trunk.latent_channels].float() * self.models.latent_scale, features

    def restore(self, variant: Variant, steps: int) -> Tensor:
        """(1, 3, H, W) in [0, 1], in steps of 1/255 as a saved file; `steps` of sampling where the
        variant names none."""
        latent = self._latent(variant, variant.steps or steps)
        neutral = self.models.prompt.prototypes.mean(dim=0, keepdim=True)
        pooled = self.prompt.pooled if variant.pooled else neutral
        if variant.decoder == "stock":
            image = self.models.decode(latent)
        else:
            extension = self.models.decoder.extension
            statistics = photo_statistics((self.pixels + 1) / 2)
            image = aware_decode(
                self.trunk,
                extension,
                latent / self.models.latent_scale,
                self.features,
                extension.condition(pooled, statistics),
                variant.fidelity,
            )
        height, width = self.size
        image = (image.float()[..., :height, :width] + 1) / 2
        if variant.decoder != "stock" and variant.fidelity:
            image = self.models.without_haze(image.clamp(0, 1), pooled)
        return to_8_bit(image.cpu())

    def _latent(self, variant: Variant, steps: int) -> Tensor:
        if variant.latent == "lq":
            return self.hint
        if variant.latent == "gt":
            return self._encode(self._pixels(self.gt))[0]
        key = (variant.semantic, variant.degradation, steps)
        if key not in self._latents:
            p_s, p_d = self.prompt.semantic, self.prompt.degradation
            if not variant.semantic:
                p_s = torch.zeros_like(p_s)
            if not variant.degradation:
                p_d = self.models.prompt.prototypes.mean(dim=0).expand_as(p_d)
            # The same noise for every variant, so that differences are theirs alone.
            generator = seeded(self.seed, zlib.crc32(self.name.encode()))
            self._latents[key] = sample(self.models, self.hint, p_s, p_d, steps, generator)
        return self._latents[key]
