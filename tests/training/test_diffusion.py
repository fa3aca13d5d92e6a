"""The diffusion process: where the first step starts, in training and in sampling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.diffusion import TIMESTEPS, first_step_noise, sample, scheduler


def draws(*seeds: int) -> list[Tensor]:
    return [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]


def test_the_first_step_s_noise_takes_the_clean_latent_to_the_sampler_s_start() -> None:
    process, (noise, clean, hint) = scheduler(), draws(0, 1, 2)
    last = torch.tensor([TIMESTEPS - 1] * 2)
    changed = first_step_noise(process, noise, clean, hint)
    found = process.add_noise(clean, changed, last)
    torch.testing.assert_close(found, process.add_noise(hint, noise, last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_of_a_perfect_model_gives_the_clean_latent(prediction: str) -> None:
    """What training asks for at the first step is what takes the sampler to the clean latent."""
    process, (clean, hint) = scheduler(prediction), draws(1, 2)
    noise = torch.randn(hint.shape, generator=torch.Generator().manual_seed(7))
    changed = first_step_noise(process, noise, clean, hint)
    last = torch.tensor([TIMESTEPS - 1] * 2)
    velocity = process.get_velocity(clean, changed, last)

    def denoise(latent: Tensor, timestep: Tensor, *_: Any) -> Tensor:
        assert timestep.tolist() == last.tolist()
        torch.testing.assert_close(latent, process.add_noise(clean, changed, last))
        return velocity if prediction == "v_prediction" else changed

    models: Any = SimpleNamespace(prediction=prediction, denoise=denoise)
    generator = torch.Generator().manual_seed(7)
    found = sample(models, hint, hint, hint, 1, generator)
    share = process.final_alpha_cumprod  # one step of DDIM ends where its schedule does
    expected = process.add_noise(clean, changed, torch.tensor([0, 0]))
    assert 0.999 < share < 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
