"""Make Nano from a folder of photos, all stages in order: `python -m training.nano --help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .. import export, sample_decoder_data, train_control, train_decoder
from ..common import DataConfig, ModelConfig
from ..loop import LoopConfig
from . import autoencoder, vision


@dataclass(frozen=True)
class Recipe:
    """The whole pipeline; a stage that was interrupted goes on where its checkpoint is."""

    photos: Path
    """Clean photos: a folder, a text list or a CSV manifest."""
    out: Path = Path("runs/nano")
    """Folder of all runs; the finished file is <out>/diff_restorer_nano.safetensors."""
    steps: Literal["full", "tiny"] = "full"
    """`tiny` runs every stage on a few steps to show that the pipeline works."""
    compile: bool = False
    """torch.compile the networks (with `steps full` only)."""
    workers: int = 1
    """Data processes."""


@dataclass(frozen=True)
class Plan:
    """Length and settings of one stage."""

    steps: int
    batch_size: int
    lr: float
    crop: int = 128


FULL = {
    "autoencoder": Plan(8000, 8, 8e-4),
    "vision": Plan(8000, 16, 5e-4),
    "control": Plan(10000, 16, 8e-4),
    "decoder": Plan(12000, 8, 6e-4),
}


def main(recipe: Recipe) -> Path:
    """Run the stages one after another."""
    tiny = recipe.steps == "tiny"

    def loop(name: str) -> LoopConfig:
        plan = FULL[name]
        return LoopConfig(
            out=recipe.out / name,
            steps=6 if tiny else plan.steps,
            batch_size=2 if tiny else plan.batch_size,
            lr=plan.lr,
            warmup=2 if tiny else 200,
            compile=recipe.compile and not tiny,
            workers=recipe.workers,
            checkpoint_every=3 if tiny else 500,
            validate_every=6 if tiny else 1000,
        )

    def data(name: str) -> DataConfig:
        return DataConfig(recipe.photos, crop=FULL[name].crop)

    base = autoencoder.main(autoencoder.Config(loop("autoencoder"), data("autoencoder")))
    eyes = vision.main(vision.Config(loop("vision"), data("vision")))
    control = train_control.main(
        train_control.Config(
            loop("control"),
            data("control"),
            ModelConfig(init=(eyes, base)),
            train_unet=True,
            validation_steps=2 if tiny else 20,
        )
    )
    latents = sample_decoder_data.main(
        sample_decoder_data.Config(
            data("decoder"),
            recipe.out / "latents.safetensors",
            ModelConfig(init=(control,)),
            samples=4 if tiny else 3000,
            steps=2 if tiny else 20,
        )
    )
    decoder = train_decoder.main(
        train_decoder.Config(
            loop("decoder"),
            data("decoder"),
            ModelConfig(init=(control,)),
            latents=latents,
            sampled_share=0.75,
            latent_noise=1.0,  # a small stage 1 samples badly: the decoder must doubt its latent
            validation_steps=2 if tiny else 20,
        )
    )
    return export.main(
        export.Config(
            data("decoder"),
            recipe.out / "diff_restorer_nano.safetensors",
            ModelConfig(init=(decoder,)),
            samples=64 if tiny else 512,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
