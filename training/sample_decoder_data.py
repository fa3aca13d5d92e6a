"""Latents that stage 1 samples, for stage 2: `python -m training.sample_decoder_data --help`.

A file holds sample indices and latents; the photos come from the same data set again, because a
sample is a function of (seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch.utils.data import default_collate
from tqdm import tqdm

from .common import DataConfig, ModelConfig, open_data, open_models
from .diffusion import sample
from .models import to_pixels


@dataclass(frozen=True)
class Config:
    """Sample latents with the trained stage 1."""

    data: DataConfig
    out: Path
    """safetensors file to write: `indices` (N,), `latents` (N, 4, h, w) scaled, fp16."""
    model: ModelConfig = field(default_factory=ModelConfig)
    samples: int = 2000
    """How many."""
    batch_size: int = 16
    """Samples at once."""
    steps: int = 20
    """Sampling steps; the nodes' default is 20."""
    seed: int = 0
    """Seed of the data set (stage 2 must use the same) and of the noise."""
    first_index: int = 10_000_000
    """Index of the first sample: far from those that training steps use."""


@torch.no_grad()
def main(config: Config) -> Path:
    """Sample and write, with a progress bar."""
    models, _ = open_models(
        config.model, ("base.vae.", "base.clip_vision.", "base.unet.", "control.")
    )
    train, _ = open_data(config.data, config.model.sizes, config.seed)
    indices = list(range(config.first_index, config.first_index + config.samples))
    generator = torch.Generator().manual_seed(config.seed)
    latents: list[torch.Tensor] = []
    bar = tqdm(total=len(indices), unit="latent")
    for start in range(0, len(indices), config.batch_size):
        chosen = indices[start : start + config.batch_size]
        batch = default_collate([train[index] for index in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            prompt = models.read(batch)
            hint = models.encode(to_pixels(batch["lq"])).float()
            latents.append(
                sample(
                    models, hint, prompt.semantic, prompt.degradation, config.steps, generator
                ).half()
            )
        bar.update(len(chosen))
    bar.close()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"indices": torch.tensor(indices), "latents": torch.cat(latents)}, config.out)
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
