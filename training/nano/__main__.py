"""Make Nano from a folder of photos, all stages in order: `python -m training.nano --help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import config, export, sample_decoder_data, train_control, train_decoder
from . import autoencoder, vision

TINY_LOOP = {
    "steps": 6,
    "batch_size": 2,
    "warmup": 2,
    "log_every": 3,
    "checkpoint_every": 3,
    "validate_every": 6,
}


@dataclass(frozen=True)
class Recipe:
    """The whole pipeline; a stage that was interrupted goes on where its checkpoint is."""

    photos: Path
    """Clean photos: a folder, a text list or a CSV manifest."""
    out: Path = Path("runs/nano")
    """Folder of all runs; the finished file is <out>/diff_restorer_nano.safetensors."""
    preset: str = "nano"
    """Settings of all stages: a preset or a TOML file, see training/configs."""
    start_steps: int = 3000
    """Steps of stage 2 on latents of clean photos, before those that stage 1 samples."""
    steps: Literal["full", "tiny"] = "full"
    """`tiny` runs every stage on a few steps to show that the pipeline works."""
    workers: int = 1
    """Data processes."""
    scores: Path | None = None
    """scores.json of an evaluation, for the file's metadata."""


def main(recipe: Recipe) -> Path:
    """Run the stages one after another."""
    tiny = recipe.steps == "tiny"
    photos = {"photos": str(recipe.photos)}
    sampling = {"validation_steps": 2} if tiny else {}

    def run(program: Any, *init: Path, **settings: Any) -> Path:
        """Run one program with the preset's settings, from the files `init`."""
        model = {"init": [str(path) for path in init]}
        overrides = {"data": photos, "model": model, **settings}
        return program.main(config.load(program.Config, recipe.preset, overrides))

    def train(program: Any, name: str, *init: Path, **settings: Any) -> Path:
        """Run one stage in a run folder of its own."""
        loop: dict[str, Any] = {"out": str(recipe.out / name), "workers": recipe.workers}
        loop |= settings.pop("loop", {}) | (TINY_LOOP if tiny else {})
        return run(program, *init, loop=loop, **settings)

    base = train(autoencoder, "autoencoder")
    eyes = train(vision, "vision")
    control = train(train_control, "control", eyes, base, **sampling)
    latents = run(
        sample_decoder_data,
        control,
        out=str(recipe.out / "latents.safetensors"),
        **({"samples": 4, "steps": 2, "batch_size": TINY_LOOP["batch_size"]} if tiny else {}),
    )
    start = train(
        train_decoder,
        "decoder_start",
        control,
        loop={"steps": recipe.start_steps, "decay": False},
        sampled_share=0.0,
        **sampling,
    )
    decoder = train(train_decoder, "decoder", start, latents=str(latents), **sampling)
    return run(
        export,
        decoder,
        out=str(recipe.out / "diff_restorer_nano.safetensors"),
        **({"samples": 64} if tiny else {}),
        **({"scores": str(recipe.scores)} if recipe.scores else {}),
    )


if __name__ == "__main__":
    config.run_program(main, Recipe, __doc__)
