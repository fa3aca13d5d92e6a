"""A dry run before a training for SD 1.5: `python -m training.check --help`.

Looks at the data, loads all networks, takes three steps of each stage at the real size, finishes a
file, reads it back and opens it with the nodes, and says what a whole training takes on this card.
"""

from __future__ import annotations

import csv
import gc
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from diff_restorer.prompt_processor import DEFAULT_TYPES
from tools import environment

from . import export, sample_decoder_data, train_control, train_decoder
from .batch_files import require_one_process
from .common import DataConfig, ModelConfig, home, mixed_precision
from .config import exit_after, load, parse
from .loop import LoopConfig, count_steps
from .nano.keeping import InMemory, Slot
from .pack import jpeg_quality
from .pairs import PairedPhotos
from .photos import CleanPhotos, PhotoFile, PhotoStore, list_photos, photo_size

log = logging.getLogger(__name__)

STEPS = 3
FEW_PHOTOS, FEW_PAIRS, LEAST_QUALITY = 1000, 100, 85
STAGES = {"stage 1": train_control, "stage 2": train_decoder}


@dataclass(frozen=True)
class Config:
    """Try a training for SD 1.5 and say what it takes; nothing of it is kept but `out`.

    Takes `--data` and `--model` as the other programs do, from the preset `fast` unless `--config`
    names another.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    presets: tuple[str, ...] = ("paper", "fast")
    """Whose hours are told; steps are tried with the settings of the last."""
    batches: tuple[int, ...] = ()
    """Batch sizes to try, up to the first that does not fit; by default 1, 2, 4 ... 64 on a GPU and
    1 on a CPU, which has no such end."""
    price: float = 0.0
    """Of an hour on this machine, in any currency; 0 tells no cost."""
    out: Path | None = None
    """Where to leave the file, which has learnt nothing."""


class Tried(NamedTuple):
    """One batch size of a stage."""

    batch: int
    samples_per_s: float
    """Of the last step, or latents per second."""
    peak_gb: float
    pieces: int
    """That the batch was computed in; more than 1 where it did not fit."""


@dataclass
class Found:
    """All that a dry run tells."""

    photos: int
    """That an epoch has: clean photos or pairs, whichever are more."""
    wrong: list[str]
    """What to mend in the data, a sentence each."""
    tried: dict[str, list[Tried]] = field(default_factory=dict)
    """By stage, and for `latents`."""
    hours: dict[str, dict[str, float]] = field(default_factory=dict)
    """By preset and stage."""
    nodes: str = ""
    """What became of the file in the nodes."""

    def largest(self, stage: str) -> int:
        """Batch that fits, of those tried."""
        return max(row.batch // row.pieces for row in self.tried[stage])

    def fastest(self, stage: str) -> float:
        """Samples per second at the best batch."""
        return max(row.samples_per_s for row in self.tried[stage])


def main(config: Config) -> Found:
    """Try everything, and log what was found.

    Raises:
        ValueError: SD 1.5 is not named, not even a batch of one fits, or as the programs of the
            stages, whose messages name the file or option.
    """
    require_one_process()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.model.sd15.checkpoint is None:
        raise ValueError(
            "--model.sd15.checkpoint: missing; give Stable Diffusion 1.5, and --model.sd15.clip. "
            "A Nano is tried by `python -m training.nano --steps tiny`"
        )
    environment.comfyui_root()  # a COMFYUI_PATH that is wrong is told at once
    # Photos are decoded when they are drawn, as those of a large set are.
    config = replace(config, data=replace(config.data, memory_mb=0))
    found = look(config.data, config.model.types or DEFAULT_TYPES)
    log.info("data: %d photos or pairs an epoch", found.photos)
    for line in found.wrong or ["nothing was found wrong with it"]:
        log.info("  %s", line)
    held = InMemory(config.model, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            found.tried |= _tries(stage, config, held, Path(folder))
        file = config.out or Path(folder) / "diff_restorer_check.safetensors"
        now = time.perf_counter()
        settings = export.Config(config.data, file, config.model)
        held.export(settings, Slot("export", now, now))
        for preset in config.presets:
            found.hours[preset] = hours(preset, found)
        _tell(found, config)
        found.nodes = opened_by_nodes(file)  # last: a file that it refuses costs no figure
    log.info(found.nodes)
    return found


def look(data: DataConfig, kinds: tuple[str, ...]) -> Found:
    """Counts the photos and pairs, by their headers alone, and says what is wrong with them."""
    store, wrong = PhotoStore(0), list[str]()
    files: list[PhotoFile] = []
    if data.photos:
        files = list(CleanPhotos(data.photos, store).paths)
        if lost := len(list_photos(data.photos)) - len(files):
            wrong.append(f"{lost} photos cannot be read: see above, and mend or remove them")
        if small := sum(min(photo_size(file)) < data.crop for file in files):
            wrong.append(
                f"{small} of {len(files)} photos are smaller than --data.crop {data.crop} and get "
                "enlarged, which teaches blur: give larger ones, or a smaller --data.crop"
            )
        if poor := sum(_quality(file) < LEAST_QUALITY for file in files):
            wrong.append(
                f"{poor} of {len(files)} photos are JPEGs below quality {LEAST_QUALITY}, whose "
                "blocks would count as clean: leave them out (training.pack chooses)"
            )
    pairs = PairedPhotos(data.pairs, store, kinds).by_kind() if data.pairs else {}
    few = [f"{len(some)} of {kind}" for kind, some in pairs.items() if len(some) < FEW_PAIRS]
    if few:
        wrong.append(f"few pairs: {', '.join(few)}; --data.pair-share says how often they come")
    photos = max(len(files), sum(map(len, pairs.values())))
    if photos < FEW_PHOTOS:
        wrong.append(f"{photos} photos are few: the paper's sets have about 21,000")
    return Found(photos, wrong)


def _quality(file: PhotoFile) -> int:
    with file.open("rb") as stream, Image.open(stream) as picture:
        return jpeg_quality(picture)


def _tries(stage: str, config: Config, held: InMemory, folder: Path) -> dict[str, list[Tried]]:
    """A stage at growing batches, and before stage 2 its latents."""
    rows: dict[str, list[Tried]] = {stage: []}
    for batch in config.batches or (tuple(2**n for n in range(7)) if _on_gpu() else (1,)):
        gc.collect()
        if _on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if stage == "stage 2":
                rows.setdefault("latents", []).append(_sample(batch, config, held, folder))
            rows[stage].append(_train(stage, batch, config, held, folder / f"{stage} {batch}"))
        except torch.OutOfMemoryError as error:
            if not rows[stage]:
                raise ValueError(
                    f"--data.crop {config.data.crop}: {stage} has no room for a batch of {batch} "
                    f"on {card()}; give a smaller crop, or --model.gradient-checkpointing (stage 1)"
                ) from error
            break
        if rows[stage][-1].pieces > 1:
            break
    return rows


def _train(stage: str, batch: int, config: Config, held: InMemory, folder: Path) -> Tried:
    loop = {"out": folder, "steps": STEPS, "batch_size": batch, "accumulate": 1, "log_every": 1}
    loop |= {"precision": "auto", "warmup": 1}
    settings = load(STAGES[stage].Config, config.presets[-1], {"loop": loop})
    workers = min(settings.loop.workers, (os.cpu_count() or 1) - 1)
    changes: dict[str, Any] = {"loop": replace(settings.loop, workers=workers)}
    if stage == "stage 2":
        changes["fusion_first"] = 0  # the whole decoder trains for most of the time
    data = replace(config.data, validation_samples=1)
    settings = replace(settings, data=data, model=config.model, validation_steps=1, **changes)
    held.train(STAGES[stage], settings, Slot(stage, time.perf_counter(), math.inf))
    with (folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    speed, peak = float(last["samples_per_s"]), float(last["peak_gb"])
    return Tried(batch, speed, peak, held.spent[stage].pieces)


def _sample(batch: int, config: Config, held: InMemory, folder: Path) -> Tried:
    settings = sample_decoder_data.Config(
        replace(config.data, validation_samples=1),
        *(folder / "unused", config.model),
        samples=batch,
        batch_size=batch,
    )
    held.sample(settings, Slot("latents", time.perf_counter(), math.inf))
    spent = held.spent["latents"]
    return Tried(batch, batch / spent.seconds, spent.peak_bytes / 1e9, 1)


def hours(preset: str, found: Found) -> dict[str, float]:
    """Of each stage with a preset's settings at the fastest batch, without validation."""
    loops = {name: _loop(preset, name) for name in STAGES}
    whole = {name: count_steps(loop, found.photos, processes=1) for name, loop in loops.items()}
    counts = {name: w.steps * w.batch_size * w.accumulate for name, w in whole.items()}
    given = {"out": "unused", "data": {}}
    counts["latents"] = load(sample_decoder_data.Config, preset, given).samples
    return {name: count / found.fastest(name) / 3600 for name, count in sorted(counts.items())}


def _loop(preset: str, stage: str) -> LoopConfig:
    return load(STAGES[stage].Config, preset, {"loop": {"out": "unused"}}).loop


def opened_by_nodes(file: Path) -> str:
    """Opens a file by the node that users load it with, in a process of its own.

    Returns:
        What to tell of it; without a ComfyUI that starts here, that it was not tried.

    Raises:
        SetupError: `COMFYUI_PATH` names no ComfyUI.
        ValueError: The node refuses the file.
    """
    root = environment.comfyui_root()
    if not (root / "main.py").is_file():
        return "not opened with the nodes: there is no ComfyUI; COMFYUI_PATH names one"
    command = [sys.executable, "-m", "training.opening", str(file.resolve())]
    done = subprocess.run(
        command, cwd=environment.ROOT, capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return f"opened with the nodes of {root}"
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode != 1:
        return f"not opened with the nodes: {sys.executable} ended with {done.returncode} ({last})"
    if last.startswith("ModuleNotFoundError"):
        return f"not opened with the nodes: {root} cannot start in this environment ({last})"
    raise ValueError(f"{file}: Load Diff-Restorer refuses it: {last}")


def card() -> str:
    """What computes here, with its memory."""
    if not _on_gpu():
        return f"{torch.get_num_threads()} threads of the CPU"
    told = torch.cuda.get_device_properties(home())
    return f"{told.name} ({told.total_memory / 1e9:.0f} GB)"


def _on_gpu() -> bool:
    return home().type == "cuda"


def _tell(found: Found, config: Config) -> None:
    log.info("\n%s, %d px, %s:", card(), config.data.crop, mixed_precision("auto"))
    for stage, rows in found.tried.items():
        for row in rows:
            log.info(
                "  %s, batch %d: %.3g samples/s, %.1f GB%s",
                *(stage, row.batch, row.samples_per_s, row.peak_gb),
                "" if row.pieces == 1 else f", in {row.pieces} pieces: does not fit at once",
            )
    for stage in STAGES:
        log.info(
            "%s: the largest batch that fits, of those tried, is %d", stage, found.largest(stage)
        )
    for preset, stages in found.hours.items():
        whole = sum(stages.values())
        parts = ", ".join(f"{name} {value:.3g}" for name, value in stages.items())
        cost = f", which costs {whole * config.price:.2f}" if config.price else ""
        log.info("%s: %.3g hours (%s)%s", preset, whole, parts, cost)
        for line in _advice(preset, found):
            log.info("  %s", line)


def _advice(preset: str, found: Found) -> Iterator[str]:
    """Options for stages of a preset whose batches do not fit."""
    for stage in STAGES:
        loop, fits = _loop(preset, stage), found.largest(stage)
        if _on_gpu() and fits < loop.batch_size:
            accumulate = loop.accumulate * -(-loop.batch_size // fits)
            yield f"{stage}: --loop.batch-size {fits} --loop.accumulate {accumulate}"


if __name__ == "__main__":
    given = sys.argv[1:]
    if not any(each.partition("=")[0] == "--config" for each in given):
        given = ["--config", "fast", *given]
    exit_after(lambda: main(parse(Config, __doc__, given)))
