"""Make Nano from photos, all stages in order: `python -m training.nano --help`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diff_restorer.checkpoint import read_checkpoint

from .. import config, export, sample_decoder_data, train_control, train_decoder
from ..checkpoints import compare_file
from ..common import ModelConfig, checkpoint_info, home, open_models
from ..errors import DiskError, NonFiniteError
from . import autoencoder, vision
from .keeping import InFiles, InMemory
from .timetable import Timetable

log = logging.getLogger(__name__)

BOX_SAMPLES = 10
"""Samples that a stage is validated on in a time box, which has room for two validations at least:
one of each kind."""
SHIPPED = Path(__file__).parents[2] / "models" / "diff_restorer_nano.safetensors"
VALIDATED_PER_MINUTE = 4
"""Samples that a stage validates on at most for each minute that it has: before the first step and
at the end, and a short box must have time for steps between."""
LEAST_FOR_WORKERS = 3.0
"""Minutes of a slot from which on data processes are started by default."""
LEAST_FOR_START = 8.0
"""Minutes of a box from which on stage 2 has a start of its own."""
START_CROPS = 4
"""Times as many crops a step has at the start of stage 2, of half the side."""
START = {
    "data": {"crop": 64, "part": 192, "crops_per_part": 4},
    "sample_steps": 3,
    "sampled_share": 1.0,
    "psnr_floor": 1e-3,
}
"""How stage 2 starts: small crops of many photos give the most steps; docs/decoder.md has what that
is worth. Their latents are sampled at once: the detail path takes the photo's tone from them."""
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
    """The whole pipeline: from photos in files, where a stage that was interrupted goes on at its
    checkpoint, or from a pack in memory, on one device and with one file at the end."""

    photos: Path | None = None
    """Clean photos: a folder, a text list, a CSV manifest or tar shards. Every stage keeps
    checkpoints and hands on a file."""
    pack: Path | None = None
    """Clean photos of `training.pack`. All stages run in this process, with nothing between them
    but memory."""
    minutes: float = 0.0
    """Time box of the whole, finished file included; 0 takes the steps of the preset."""
    init: Path | None = None
    """A finished Nano to fit to these photos: stage 1 and the decoder train on, its VAE, vision
    encoder and P_D stay. Without it they begin anew."""
    vae: Path | None = SHIPPED
    """Without `init`: the file whose VAE is taken, by default that of the Nano that comes with this
    repository; None trains one first."""
    out: Path = Path("runs/nano")
    """Folder of all runs; the finished file is <out>/diff_restorer_nano.safetensors."""
    preset: str = ""
    """Settings of all stages: a preset or a TOML file, see training/configs; none: `nano`, on a GPU
    `nano_gpu`."""
    device: Literal["auto", "cuda"] = "auto"
    """`cuda` fails where there is no GPU; auto then takes the CPU."""
    start_steps: int = 3000
    """Steps of stage 2 on small crops, whose latents are sampled in three steps, before its larger
    crops; a time box of 8 minutes or more has a share for them."""
    steps: Literal["full", "tiny"] = "full"
    """`tiny` runs every stage on a few steps to show that the pipeline works."""
    workers: int | None = None
    """Data processes; none: 1, beside a GPU up to 8, and in slots of a few minutes 0."""
    scores: Path | None = None
    """scores.json of an evaluation, for the file's metadata (with `photos`)."""

    def stages(self, *, sampled_before: bool) -> list[str]:
        """Those that this recipe runs, in order; latents are sampled before the decoder trains, or
        while it does."""
        starts = self.init is None and not 0 < self.minutes < LEAST_FOR_START
        return [
            *([] if self.vae or self.init else ["autoencoder"]),
            *([] if self.init else ["vision"]),
            "control",
            *(["latents"] if sampled_before else []),
            *(["decoder_start"] if starts else []),
            *("decoder", "export"),
        ]


def main(recipe: Recipe) -> Path:
    """Run the stages one after another.

    Raises:
        ValueError: Not one of photos and pack is given, there is no such file or device, or a box
            is too short.
        NonFiniteError: Names the stage and what is not finite in it; what was trained before it is
            in <out>/unfinished.safetensors.
    """
    began = time.perf_counter()
    _check(recipe)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keeping = _keeping(recipe)
    try:
        finished = _stages(recipe, keeping, began)
    except BaseException:
        if isinstance(keeping, InMemory):
            keeping.rescue(recipe.out / "unfinished.safetensors")
        raise
    if isinstance(keeping, InMemory):
        keeping.tell(recipe.out, time.perf_counter() - began)
    return finished


def _check(recipe: Recipe) -> None:
    if (recipe.photos is None) == (recipe.pack is None):
        raise ValueError(
            "--photos, --pack: give one of them: photos train in files, a pack in memory"
        )
    if recipe.pack is not None and not recipe.pack.is_file():
        raise ValueError(
            f"--pack: {recipe.pack} does not exist; make it where the photos are: "
            "python -m training.pack PHOTOS --out photos.pack"
        )
    for name in ("init", "vae"):
        path = getattr(recipe, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name}: {path} does not exist; give a Nano's .safetensors")
    if recipe.init is not None:  # what no stage would train then
        read_checkpoint(recipe.init, ("base.vae.", "base.clip_vision.", "prompt_processor."))
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: torch {torch.__version__} finds no GPU; leave it out to train on the "
            "CPU"
        )
    if recipe.minutes and recipe.steps == "tiny":
        raise ValueError("--minutes, --steps tiny: give one of them")


def _keeping(recipe: Recipe) -> InFiles | InMemory:
    """Files or memory, with what the recipe starts from."""
    networks = _settings(recipe, vision, "vision", 0.0)
    init = (recipe.init,) if recipe.init else ()
    if recipe.vae and not recipe.init:
        init = (_vae_alone(recipe.out, replace(networks.model, init=(recipe.vae,), types=())),)
    if recipe.photos is not None:
        return InFiles(init)
    return InMemory(replace(networks.model, init=init), networks.loop.seed)


def _vae_alone(out: Path, config: ModelConfig) -> Path:
    """A file with nothing but the VAE of another: what else that has must not be started from."""
    path, part, own = out / "vae.safetensors", ("base.vae.",), "nano.autoencoder"
    models, _ = open_models(config, part)
    try:  # written again it would have other bytes, which sampled latents are refused for
        compare_file(path, models.file_tensors(part, torch.float32))
    except (OSError, ValueError):
        models.history = {name: part for name, part in models.history.items() if name == own}
        out.mkdir(parents=True, exist_ok=True)
        models.save(path, part, checkpoint_info(models, {}), torch.float32)
    return path


def _stages(recipe: Recipe, keeping: InFiles | InMemory, began: float) -> Path:
    """All stages, in order; an error says in which it was."""
    decoder = _settings(recipe, train_decoder, "decoder", 0.0)
    stages = recipe.stages(sampled_before=not decoder.sample_steps)
    table = Timetable(recipe.minutes, stages, began)

    def train(program: Any, name: str, **more: Any) -> None:
        log.info("%s", name)
        minutes = table.minutes(name)
        with _named(name, minutes, recipe):
            settings = _settings(recipe, program, name, minutes, **more)
            keeping.train(program, settings, table.slot(name))

    if "autoencoder" in stages:
        train(autoencoder, "autoencoder")
    if "vision" in stages:
        train(vision, "vision")
    tiny = recipe.steps == "tiny"
    sampling = {"validation_steps": 2} if tiny else {}
    train(train_control, "control", **sampling)
    few = {"samples": 4, "steps": 2} if tiny else {}
    settings = _settings(
        *(recipe, sample_decoder_data, "latents", 0.0),
        out=str(recipe.out / "latents.safetensors"),
        batch_size=decoder.loop.batch_size,
        **few,
    )
    if "latents" in stages:
        with _named("latents", 0.0, recipe):
            keeping.sample(settings, table.slot("latents"))
    if "decoder_start" in stages:
        loop = {} if recipe.minutes else {"steps": recipe.start_steps}
        loop["batch_size"] = START_CROPS * decoder.loop.batch_size
        start = START | {"loop": loop}
        train(train_decoder, "decoder_start", **start, **sampling)
    train(train_decoder, "decoder", **sampling)
    release = _settings(
        *(recipe, export, "export", 0.0),
        out=str(recipe.out / "diff_restorer_nano.safetensors"),
        **({"samples": 64} if tiny else {}),
        **({"scores": str(recipe.scores)} if recipe.scores else {}),
    )
    with _named("export", 0.0, recipe):
        return keeping.export(release, table.slot("export"))


def _settings(recipe: Recipe, program: Any, name: str, minutes: float, **more: Any) -> Any:
    """A program's settings: the preset's, and over them what the recipe and the stage say."""
    photos = {"photos": str(recipe.photos or recipe.pack)}
    few = {"validation_samples": BOX_SAMPLES} if minutes else {}
    settings = {**more, "data": photos | few | more.get("data", {})}
    workers = recipe.workers
    if workers is None:  # to start a process takes longer than it saves in a short slot
        workers = 0 if 0 < minutes < LEAST_FOR_WORKERS else _workers()
    if "loop" in (fields := program.Config.__dataclass_fields__):
        loop: dict[str, Any] = {"out": str(recipe.out / name), "workers": workers}
        loop |= more.get("loop", {}) | (TINY_LOOP if recipe.steps == "tiny" else {})
        settings["loop"] = loop | ({"minutes": minutes} if minutes else {})
    elif "workers" in fields:
        settings["workers"] = workers
    preset = recipe.preset or ("nano_gpu" if home().type == "cuda" else "nano")
    loaded = config.load(program.Config, preset, settings)
    if not minutes:
        return loaded
    most = max(2, round(VALIDATED_PER_MINUTE * minutes))
    data = replace(loaded.data, validation_samples=min(most, loaded.data.validation_samples))
    return replace(loaded, data=data)


def _workers() -> int:
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if home().type == "cuda" else 1


@contextmanager
def _named(name: str, minutes: float, recipe: Recipe) -> Iterator[None]:
    """Errors of a stage begin with its name."""
    try:
        yield
    except (ValueError, NonFiniteError, DiskError) as error:
        share = f", {minutes:.2g} of --minutes {recipe.minutes:g}" if minutes else ""
        raise type(error)(f"{name}{share}: {error}") from error


if __name__ == "__main__":
    config.run_program(main, Recipe, __doc__)
