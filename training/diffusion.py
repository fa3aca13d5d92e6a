"""The diffusion process of SD 1.5: noising, targets, and the sampler of the workflows.

Training shows the first step what `sample` starts from, and whatever samples here (validation,
latents for stage 2, `evaluate`, `ablate`) does so by `sample`. For SD 1.5 it is what the host makes
of `workflows/api/restore_sd15.json`, to rounding: euler on `simple` is DDIM on trailing timesteps.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diff_restorer.checkpoint import EPSILON

from .models import SD15, Models

TIMESTEPS = 1000


def scheduler(prediction: str = EPSILON, base_model: str = SD15) -> Any:
    """DDIMScheduler with the noise schedule of SD 1.5 (scaled linear).

    Args:
        prediction: What the UNet predicts: `epsilon`, or `v_prediction` (Salimans and Ho 2022,
            arXiv 2202.00512), v = sqrt(a) noise - sqrt(1 - a) clean.
        base_model: For SD 1.5 it ends without noise, as the host does. The published Nano learnt
            from latents that keep the 2.9 % of the least timestep, and its training still does.
    """
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        prediction_type=cast(Any, prediction),
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=base_model == SD15,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def _start_noise(process: Any, noise: Tensor) -> Tensor:
    """What `add_noise` has to be given at the last timestep for where a sampler starts.

    The host's are at sqrt(a) latent + noise there, not at sqrt(a) latent + sqrt(1 - a) noise.

    Source: `EPS.noise_scaling` of ComfyUI at full denoise. Nano's training starts as DDIM does.
    """
    if not process.config.set_alpha_to_one:
        return noise
    return noise / (1 - process.alphas_cumprod[-1]).sqrt()


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
    return _start_noise(process, noise) + (share / (1 - share)).sqrt() * (hint - clean)


@torch.no_grad()
def sample(
    models: Models, hint: Tensor, p_s: Tensor, p_d: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """`sample_from` noise of `generator`, without gradients.

    Returns:
        Scaled latent, (B, 4, h, w).
    """
    noise = torch.randn(hint.shape, generator=generator, device=generator.device).to(hint.device)
    return sample_from(models, noise, hint, p_s, p_d, steps)


def sample_from(
    models: Models, noise: Tensor, hint: Tensor, p_s: Tensor, p_d: Tensor, steps: int
) -> Tensor:
    """Sample restored latents by DDIM without CFG, from where the host's samplers start.

    At full denoise they start from the latent they are given under the noise of the last timestep,
    which leaves 7 % of it; that latent is the degraded photo's.

    Args:
        noise: Standard normal, (B, 4, h, w).
        hint: Scaled LQ latent, likewise.
        p_s: (B, T, context_width). p_d: likewise.
        steps: Number of UNet evaluations.

    Returns:
        Scaled latent, (B, 4, h, w).
    """
    ddim = scheduler(models.prediction, models.base_model)
    ddim.set_timesteps(steps)
    start = _start_noise(ddim, noise)
    latent = ddim.add_noise(hint.float(), start, torch.tensor([TIMESTEPS - 1]))
    for timestep in ddim.timesteps:
        batch = timestep.expand(len(latent)).to(hint.device)
        predicted = models.denoise(latent, batch, hint, p_s, p_d).float()
        latent = ddim.step(predicted, timestep, latent).prev_sample
    return latent
