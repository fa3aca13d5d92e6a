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


def first_step_noise(process: Any, noise: Tensor, clean: Tensor, hint: Tensor) -> Tensor:
    """The noise that takes `clean` at the last timestep to where `sample` starts from `hint`.

    SD 1.5's schedule ends short of pure noise, so that the last timestep betrays how bright the
    clean photo is (Lin et al. 2024, arXiv 2305.08891). A sampler has no clean photo: what it starts
    from is as dark or hazy as the degraded one. Trained on this noise, the first step expects that.

    Args:
        process: Of `scheduler`.
        noise: Standard normal, (B, 4, h, w).
        clean, hint: Scaled latents of GT and LQ, likewise.
    """
    share = process.alphas_cumprod[-1]
    return noise + (share / (1 - share)).sqrt() * (hint - clean)


@torch.no_grad()
def sample(
    models: Models, hint: Tensor, p_s: Tensor, p_d: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Sample restored latents by DDIM without CFG, from where the host's samplers start.

    At full denoise they start from the latent they are given under the noise of the last timestep,
    which leaves 7 % of it; that latent is the degraded photo's.

    Args:
        hint: Scaled LQ latent, (B, 4, h, w).
        p_s: (B, T, context_width). p_d: likewise.
        steps: Number of UNet evaluations.

    Returns:
        Scaled latent, (B, 4, h, w).
    """
    ddim = scheduler(models.prediction)
    ddim.set_timesteps(steps)
    noise = torch.randn(hint.shape, generator=generator, device=generator.device).to(hint.device)
    latent = ddim.add_noise(hint.float(), noise, torch.tensor([TIMESTEPS - 1]))
    for timestep in ddim.timesteps:
        batch = timestep.expand(len(latent)).to(hint.device)
        predicted = models.denoise(latent, batch, hint, p_s, p_d).float()
        latent = ddim.step(predicted, timestep, latent).prev_sample
    return latent
