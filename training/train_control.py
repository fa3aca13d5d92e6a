"""Stage 1, control module and prompt processor: `python -m training.train_control --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoints import compare_file
from .common import DataConfig, ModelConfig, checkpoint_info, open_data, open_models
from .config import parse
from .diffusion import TIMESTEPS, sample, scheduler
from .loop import LoopConfig, Stage, maybe_compile, run
from .models import clip_tokens, psnr, to_pixels
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
    alphas = scheduler().alphas_cumprod

    def predict(
        noisy: Tensor, timestep: Tensor, hint: Tensor, tokens: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompt = models.prompt(tokens)
        noise = models.denoise(noisy, timestep, hint, prompt.semantic * keep, prompt.degradation)
        return noise.float(), prompt.logits.float()

    predict_fast = maybe_compile(predict, config.loop)
    encode = maybe_compile(models.encode, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        size = len(batch["gt"])
        with torch.no_grad():
            both = encode(to_pixels(torch.cat([batch["gt"], batch["lq"]]))).float()
            clean, hint = both.chunk(2)
            tokens = clip_tokens(models.vision, batch["clip_view"])
        timestep = torch.randint(0, TIMESTEPS, (size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        keep = (torch.rand(size, 1, 1, generator=generator) >= config.semantic_dropout).float()
        alpha = alphas[timestep][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted, logits = predict_fast(noisy, timestep, hint, tokens, keep)
        mse = F.mse_loss(predicted, noise)
        ce = F.cross_entropy(logits, batch["label"])
        return {"loss": mse + config.ce_weight * ce, "mse": mse, "ce": ce}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        prompt = models.prompt(clip_tokens(models.vision, validation["clip_view"]))
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

    parts = ("base.vae.", "base.clip_vision.", "base.unet.", "control.", "prompt_processor.")

    def export(path: Path, settings: dict[str, Any]) -> None:
        models.save(path, parts, checkpoint_info(models, settings), torch.float32)

    def check(path: Path) -> None:
        compare_file(path, models.file_tensors(parts, torch.float32))

    return run(Stage(trainable, loss, validate, export, check=check), train, config.loop, config)


if __name__ == "__main__":
    main(parse(Config, __doc__))
