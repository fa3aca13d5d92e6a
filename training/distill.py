"""A student that samples in one or two steps what a finished model samples in many:
`python -m training.distill --help`.

It starts as a copy of that model, and learns where its sampler ends from the same noise (Luhman and
Luhman 2021, arXiv 2101.02388), from latents of `training.sample_decoder_data`. Afterwards the aware
decoder is trained on for what the student samples: `train_decoder --sample-steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import train_control, train_decoder
from .common import DataConfig, ModelConfig, data_for, to_home
from .config import run_program
from .data import Batches
from .diffusion import sample_from
from .loop import LoopConfig, Stage, maybe_compile
from .models import Models, to_pixels
from .photos import PhotoStore
from .sample_decoder_data import digests
from .stages import run_stage, stage_of
from .train_decoder import DecoderBatches, DecoderLoss, Validation, read_sampled


@dataclass(frozen=True)
class Config:
    """Squared distance of the student's latents from the teacher's."""

    loop: LoopConfig
    data: DataConfig
    latents: Path
    """What the teacher samples: a file of `sample_decoder_data`, made with the finished model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The finished model, from which the student starts."""
    steps: int = 1
    """Sampling steps of the student: with 2 a step of training takes twice the memory."""
    train_unet: bool = False
    """Train the UNet, too: Nano's. SD 1.5's stays; its student is in the control module and P_S."""


def prepare(models: Models, config: Config) -> torch.nn.Module:
    """Freeze P_D, the classifier and all encoders and decoders; returns what trains.

    Raises:
        ValueError: There is no step to train; or SD 1.5's UNet would train.
    """
    if config.steps < 1:
        raise ValueError(f"--steps: found {config.steps}; give 1 or 2")
    settings = train_control.Config(
        *(config.loop, config.data, config.model),
        train_degradation=False,
        train_unet=config.train_unet,
    )
    return train_control.prepare(models, settings)


def make_loss(models: Models, config: Config) -> Callable[..., dict[str, Tensor]]:
    """(batch, generator) -> `loss`."""

    def sampled(noise: Tensor, hint: Tensor, whole: Tensor, close: Tensor, part: Tensor) -> Tensor:
        prompt = models.prompt_of(whole, close)
        p_s, p_d = prompt.semantic[part], prompt.degradation[part]
        return sample_from(models, noise, hint, p_s, p_d, config.steps)

    sample_fast = maybe_compile(sampled, config.loop)
    encode = maybe_compile(models.encode, config.loop)

    def loss(batch: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            hint, tokens = encode(to_pixels(batch["lq"])), models.tokens(batch)
        latent = sample_fast(batch["noise"], hint, *tokens, batch["part"])
        return {"loss": F.mse_loss(latent, batch["latent"])}

    return loss


def main(config: Config) -> Path:
    """Train, and write a complete file, whose decoder is still the teacher's."""
    needed = ("base.vae.", "base.clip_vision.", "base.unet.", "control.", "prompt_processor.")
    return run_stage(build, config, needed)


def build(
    models: Models, loaded: set[str], config: Config, store: PhotoStore | None = None
) -> tuple[Stage, Batches]:
    """The stage, and its data from the photos of `store`.

    Raises:
        ValueError: As `prepare` and `read_sampled`.
    """
    reads = {"lq", "clip_view", models.degradation_key}
    train, fixed = data_for(models, config.data, config.loop.seed, reads, store)
    train = train.sized(config.loop.batch_size)
    networks = digests(models)
    sampled = read_sampled(train, config.latents, networks)._replace(with_noise=True)
    trainable = prepare(models, config)
    settings: Any = train_decoder.Config(
        *(config.loop, config.data, config.model), validation_steps=config.steps
    )
    models.decoder.requires_grad_(False)
    decoder = DecoderLoss(models, settings)
    validation = Validation(models, decoder, to_home(fixed), settings, samples=True)
    stage = stage_of(models, sorted(loaded), trainable, make_loss(models, config), validation)
    return stage, DecoderBatches(train, sampled, share=1.0)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
