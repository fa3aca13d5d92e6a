"""Train Nano's autoencoder from scratch: `python -m training.nano.autoencoder --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoints import compare_file
from ..common import DataConfig, ModelConfig, checkpoint_info, open_data, open_models
from ..config import parse
from ..loop import LoopConfig, Stage, maybe_compile, run
from ..models import psnr, to_pixels
from ..sheets import save_sheet


@dataclass(frozen=True)
class Config:
    """Train the autoencoder on clean and degraded crops: L1 (fine and coarse), weak KL."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    coarse_weight: float = 2.0
    """Weight of L1 between 8x8 averages: without it, a short training never learns colour."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence to N(0, 1), mean over latent elements."""
    degraded_share: float = 0.25
    """Share of crops that are degraded: the encoder has to read such photos later."""


def main(config: Config) -> Path:
    """Train, and write a file with `base.vae.`."""
    models, _ = open_models(config.model)
    vae = models.vae
    train, validation = open_data(config.data, config.model.sizes, config.loop.seed)

    def reconstruct(pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = vae.encode(pixels).latent_dist.parameters.float().chunk(2, dim=1)
        log_var = log_var.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        decoded = vae.decode(mean + (0.5 * log_var).exp() * noise).sample
        error = decoded.float() - pixels
        return error.abs().mean(), F.avg_pool2d(error, 8).abs().mean(), kl

    step_function = maybe_compile(reconstruct, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        size = len(batch["gt"])
        degraded = torch.rand(size, generator=generator) < config.degraded_share
        pixels = to_pixels(torch.where(degraded[:, None, None, None], batch["lq"], batch["gt"]))
        side = config.data.crop // 8
        noise = torch.randn(
            size, config.model.sizes.latent_channels, side, side, generator=generator
        )
        l1, coarse, kl = step_function(pixels, noise)
        total = l1 + config.coarse_weight * coarse + config.kl_weight * kl
        return {"loss": total, "l1": l1, "coarse": coarse, "kl": kl}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        latent = vae.encode(to_pixels(validation["gt"])).latent_dist.mode()
        image = (vae.decode(latent).sample + 1) / 2
        save_sheet(folder / f"{step:07d}.jpg", {"clean": validation["gt"], "decoded": image})
        models.latent_scale = 1 / float(latent.std())
        return {
            "psnr": float(psnr(image, validation["gt"]).mean()),
            "latent_std": float(latent.std()),
        }

    parts = ("base.vae.",)

    def export(path: Path, settings: dict[str, Any]) -> None:
        models.save(path, parts, checkpoint_info(models, settings), torch.float32)

    def check(path: Path) -> None:
        compare_file(path, models.file_tensors(parts, torch.float32))

    return run(Stage(vae, loss, validate, export, check=check), train, config.loop, config)


if __name__ == "__main__":
    main(parse(Config, __doc__))
