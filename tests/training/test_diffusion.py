"""The diffusion process: where the first step starts, in training and in sampling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diff_restorer.checkpoint import EPSILON, V_PREDICTION
from training.diffusion import TIMESTEPS, first_step_noise, sample, scheduler
from training.models import NANO, SD15


def draws(*seeds: int) -> list[Tensor]:
    return [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]


@pytest.mark.parametrize("base", [NANO, SD15])
def test_the_first_step_s_noise_takes_the_clean_latent_to_the_sampler_s_start(base: str) -> None:
    """SD 1.5's is the host's: sqrt(a) latent + noise."""
    process, (noise, clean, hint) = scheduler(base_model=base), draws(0, 1, 2)
    last = torch.tensor([TIMESTEPS - 1] * 2)
    changed = first_step_noise(process, noise, clean, hint)
    found = process.add_noise(clean, changed, last)
    expected = process.add_noise(hint, noise, last)
    if base == SD15:
        expected = process.alphas_cumprod[-1].sqrt() * hint + noise
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", [NANO, SD15])
@pytest.mark.parametrize("prediction", [EPSILON, V_PREDICTION])
def test_one_step_of_a_perfect_model_gives_the_clean_latent(prediction: str, base: str) -> None:
    """What training asks for at the first step is what takes the sampler to the clean latent."""
    process, (clean, hint) = scheduler(prediction, base), draws(1, 2)
    noise = torch.randn(hint.shape, generator=torch.Generator().manual_seed(7))
    changed = first_step_noise(process, noise, clean, hint)
    last = torch.tensor([TIMESTEPS - 1] * 2)
    velocity = process.get_velocity(clean, changed, last)

    def denoise(latent: Tensor, timestep: Tensor, *_: Any) -> Tensor:
        assert timestep.tolist() == last.tolist()
        torch.testing.assert_close(latent, process.add_noise(clean, changed, last))
        return velocity if prediction == V_PREDICTION else changed

    models: Any = SimpleNamespace(prediction=prediction, base_model=base, denoise=denoise)
    generator = torch.Generator().manual_seed(7)
    found = sample(models, hint, hint, hint, 1, generator)
    expected = clean
    if base == NANO:  # one step of DDIM ends where its schedule does
        assert 0.999 < process.final_alpha_cumprod < 1
        expected = process.add_noise(clean, changed, torch.tensor([0, 0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
