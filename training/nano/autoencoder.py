"""Train Nano's autoencoder from scratch: `python -m training.nano.autoencoder --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff_restorer.similarity import psnr

from ..common import DataConfig, ModelConfig, open_data, to_home
from ..config import run_program
from ..data import Batches
from ..loop import LoopConfig, Stage, maybe_compile
from ..models import Models, to_pixels
from ..photos import PhotoStore
from ..sheets import save_sheet
from ..stages import run_stage, stage_of


@dataclass(frozen=True)
class Config:
    """Train the autoencoder on clean and degraded crops: L1 on images, weak L2 on latents."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    latent_weight: float = 1e-3
    """Weight of the mean square of the latent, which keeps its size near 1."""
    latent_noise: float = 0.05
    """Standard deviation of the noise on latents: what is nearer than that decodes alike."""
    degraded_share: float = 0.25
    """Share of crops that are degraded: the encoder has to read such photos later."""


def start_as_box_average(vae: Any) -> None:
    """Start a TAESD, diffusers' AutoencoderTiny, as a codec of colours: 8x8 averages down, smooth
    interpolation up.

    Three channels of both halves carry red, green and blue through all levels, which TAESD allows
    because it has no norm and colours in [0, 1] pass its ReLUs. All other weights are random and
    learn the detail. Before the first step this decodes at 18 to 20 dB; a random start still showed
    grey blobs after 200 steps.
    """
    colours = torch.eye(3)
    box = torch.zeros(3, 3)
    box[1:, 1:] = 1 / 4  # under a conv of stride 2: the average of 2 x 2 pixels
    taps = torch.tensor([0.25, 0.5, 0.25])
    smooth = torch.outer(taps, taps)
    # Brightness and two colour differences, each with a spread of about one.
    mix = torch.tensor([[1.3, 1.3, 1.3], [4.0, 0.0, -4.0], [-2.5, 5.0, -2.5]])
    mean = 0.45
    encoder, decoder = vae.encoder.layers, vae.decoder.layers

    def through(conv: Any, matrix: Tensor, kernel: Tensor) -> None:
        conv.weight[:3] = 0
        conv.weight[:3, :3] = matrix[:, :, None, None] * kernel

    def at_pixel() -> Tensor:
        return nn.functional.pad(torch.ones(1, 1), (1, 1, 1, 1))

    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("conv.4"):  # the last of a block: nearly an identity at first
                    module.weight.mul_(0.2)
                    module.weight[:3] = 0
                elif module.bias is None:  # where the size changes
                    through(module, colours, box if module.stride == (2, 2) else smooth)
        through(encoder[0], colours, at_pixel())
        encoder[-1].weight[3:].mul_(0.5)
        through(encoder[-1], mix, at_pixel())
        encoder[-1].bias[:3] = -mean * mix.sum(dim=1)
        through(decoder[0], torch.linalg.inv(mix), at_pixel())
        decoder[0].bias[:3] = mean
        decoder[-1].weight.mul_(0.05)
        through(decoder[-1], colours, at_pixel())


def main(config: Config) -> Path:
    """Train, and write a file with `base.vae.`."""
    return run_stage(build, config)


def build(
    models: Models, loaded: set[str], config: Config, store: PhotoStore | None = None
) -> tuple[Stage, Batches]:
    """The stage, and its data from the photos of `store`."""
    vae = models.vae
    if "base.vae." not in loaded:
        start_as_box_average(vae)
    train, fixed = open_data(
        config.data, models.sizes, config.loop.seed, models.types, {"gt", "lq"}, store
    )
    validation = to_home(fixed)

    def reconstruct(pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latent = vae.encoder(pixels).float()
        decoded = vae.decoder(latent + config.latent_noise * noise)
        return (decoded.float() - pixels).abs().mean(), latent.square().mean()

    step_function = maybe_compile(reconstruct, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        size, place = len(batch["gt"]), {"generator": generator, "device": generator.device}
        degraded = torch.rand(size, **place) < config.degraded_share
        pixels = to_pixels(torch.where(degraded[:, None, None, None], batch["lq"], batch["gt"]))
        side = config.data.crop // 8
        noise = torch.randn(size, models.sizes.latent_channels, side, side, **place)
        l1, square = step_function(pixels, noise)
        return {"loss": l1 + config.latent_weight * square, "l1": l1, "latent_square": square}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        latent = vae.encoder(to_pixels(validation["gt"]))
        image = (vae.decoder(latent) + 1) / 2
        save_sheet(folder / f"{step:07d}.jpg", {"clean": validation["gt"], "decoded": image})
        models.latent_scale = 1 / float(latent.std())
        return {
            "psnr": float(psnr(image, validation["gt"]).mean()),
            "latent_std": float(latent.std()),
        }

    return stage_of(models, ("base.vae.",), vae, loss, validate), train


if __name__ == "__main__":
    run_program(main, Config, __doc__)
