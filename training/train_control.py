"""Stage 1, control module and prompt processor: `python -m training.train_control --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from diff_restorer.checkpoint import V_PREDICTION

from .common import DataConfig, ModelConfig, checkpoint_info, open_data, open_models
from .diffusion import TIMESTEPS, sample, scheduler
from .loop import LoopConfig, Stage, maybe_compile, run
from .models import psnr, to_pixels
from .sheets import save_sheet


@dataclass(frozen=True)
class Config:
    """Noise MSE + weighted cross-entropy (Diff-Restorer, stage 1)."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    ce_weight: float = 0.1
    """Weight of the classifier's cross-entropy."""
    semantic_dropout: float = 0.1
    """Share of samples whose P_S is zero, so that CFG stays possible."""
    train_unet: bool = False
    """Train the UNet, too. The paper freezes SD 1.5's; Nano has none to start from."""
    validation_steps: int = 20
    """Sampling steps of the validation pictures."""


def main(config: Config) -> Path:
    """Train, and write a file with everything that `--model.init` had and stage 1 made."""
    models, found = open_models(config.model, ("base.vae.", "base.clip_vision."))
    if "control." not in found:
        models.start_control()
    models.vae.requires_grad_(False)
    models.vision.requires_grad_(False)
    models.unet.requires_grad_(config.train_unet)
    trainable = nn.ModuleList([models.control, models.prompt])
    if config.train_unet:
        trainable.append(models.unet)
    train, validation = open_data(config.data, config.model.sizes, config.loop.seed)
    process = scheduler(models.prediction)

    def predict(
        noisy: Tensor, timestep: Tensor, hint: Tensor, whole: Tensor, close: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompt = models.prompt_of(whole, close)
        found = models.denoise(noisy, timestep, hint, prompt.semantic * keep, prompt.degradation)
        return found.float(), prompt.logits.float()

    predict_fast = maybe_compile(predict, config.loop)
    encode = maybe_compile(models.encode, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        size = len(batch["gt"])
        with torch.no_grad():
            both = encode(to_pixels(torch.cat([batch["gt"], batch["lq"]]))).float()
            clean, hint = both.chunk(2)
            whole, close = models.tokens(batch)
        timestep = torch.randint(0, TIMESTEPS, (size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        keep = (torch.rand(size, 1, 1, generator=generator) >= config.semantic_dropout).float()
        noisy = process.add_noise(clean, noise, timestep)
        predicted, logits = predict_fast(noisy, timestep, hint, whole, close, keep)
        velocity = models.prediction == V_PREDICTION
        target = process.get_velocity(clean, noise, timestep) if velocity else noise
        mse = F.mse_loss(predicted, target)
        ce = F.cross_entropy(logits, batch["label"])
        return {"loss": mse + config.ce_weight * ce, "mse": mse, "ce": ce}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        prompt = models.read(validation)
        hint = models.encode(to_pixels(validation["lq"]))
        restored = sample(
            models,
            hint,
            prompt.semantic,
            prompt.degradation,
            config.validation_steps,
            torch.Generator().manual_seed(0),
        )
        image = (models.vae.decode(restored / models.latent_scale).sample + 1) / 2
        save_sheet(
            folder / f"{step:07d}.jpg",
            {"degraded": validation["lq"], "stage 1": image, "clean": validation["gt"]},
            [models.types[label] for label in validation["label"]],
        )
        degraded = validation["label"] != len(models.types) - 1  # without the clean ones
        right = prompt.logits.argmax(dim=1) == validation["label"]
        return {
            "psnr_lq": float(psnr(validation["lq"], validation["gt"])[degraded].mean()),
            "psnr": float(psnr(image, validation["gt"])[degraded].mean()),
            "accuracy": float(right.float().mean()),
        }

    def export(path: Path, settings: dict[str, Any]) -> None:
        parts = {"base.vae.", "base.clip_vision.", "base.unet.", "control.", "prompt_processor."}
        models.save(path, tuple(parts), checkpoint_info(models, settings), torch.float32)

    return run(Stage(trainable, loss, validate, export), train, config.loop)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
