"""The diffusion process of SD 1.5: noising, targets and a deterministic sampler."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diff_restorer.checkpoint import EPSILON

from .models import Models

TIMESTEPS = 1000


def scheduler(prediction: str = EPSILON) -> Any:
    """DDIMScheduler with the noise schedule of SD 1.5 (scaled linear).

    Args:
        prediction: What the UNet predicts: `epsilon`, or `v_prediction` (Salimans and Ho 2022,
            arXiv 2202.00512), v = sqrt(a) noise - sqrt(1 - a) clean.
    """
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        prediction_type=cast(Any, prediction),
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def sample(
    models: Models, hint: Tensor, p_s: Tensor, p_d: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Sample restored latents from pure noise by DDIM without CFG.

    Args:
        hint: Scaled LQ latent, (B, 4, h, w).
        p_s: (B, T, context_width). p_d: likewise.
        steps: Number of UNet evaluations.

    Returns:
        Scaled latent, (B, 4, h, w).
    """
    ddim = scheduler(models.prediction)
    ddim.set_timesteps(steps)
    latent = torch.randn(hint.shape, generator=generator, device=generator.device).to(hint.device)
    for timestep in ddim.timesteps:
        batch = timestep.expand(len(latent)).to(hint.device)
        noise = models.denoise(latent, batch, hint, p_s, p_d).float()
        latent = ddim.step(noise, timestep, latent).prev_sample
    return latent
