"""Latents that stage 1 samples, for stage 2: `python -m training.sample_decoder_data --help`.

A file holds numbers of batches and their latents; the photos come from the same data set again,
because a batch is a function of (seed, number).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diff_restorer.checkpoint import open_safetensors

from .batch_files import (
    batch_file,
    claim,
    computed,
    fill,
    missing,
    networks_digest,
    require_one_process,
    require_same,
    save,
)
from .checkpoints import require_space
from .common import DataConfig, ModelConfig, Precision, data_for, half, open_models
from .config import run_program
from .data import Batch, RestorationBatches, sampling_noise
from .diffusion import sample
from .evaluation.pictures import file_digest
from .models import Models, to_pixels
from .photos import PhotoStore

log = logging.getLogger(__name__)

FIRST_BATCH = 10_000_000
"""Number of the first batch: far from those that training steps use."""


@dataclass(frozen=True)
class Config:
    """Sample latents with the trained stage 1."""

    data: DataConfig
    out: Path
    """safetensors file to write: `numbers` of M batches (M,), `latents` (M, B, 4, h, w) scaled,
    fp16, and what the batches were made of (`origin`) in its metadata. Until it is complete, its
    batches are in the folder <out>.parts, from which the same command goes on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    samples: int = 2000
    """How many, in whole batches."""
    batch_size: int = 16
    """Samples at once: as many as stage 2 will have in a batch."""
    steps: int = 20
    """Sampling steps: as many as the decoder will see, 20 in the workflow for SD 1.5."""
    precision: Precision = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else no."""
    seed: int = 0
    """Seed of the samples, which the file tells to stage 2, and of the noise."""
    workers: int = 0
    """Data processes."""


def main(config: Config, until: float = math.inf) -> Path:
    """Sample and write, with a progress bar; goes on where a killed run was.

    Args:
        config: Settings.
        until: When to stop with what there is, of `time.perf_counter`.

    Raises:
        ValueError: The latents or parts that are there belong to other settings, or several
            processes were started.
        DiskError: There is too little room for the parts and the file joined from them.
    """
    require_one_process()
    parts = config.out.with_name(config.out.name + ".parts")
    settings = _settings(config)
    if config.out.is_file():
        with open_safetensors(config.out) as file:
            require_same(settings, (file.metadata() or {}).get("settings", ""), config.out)
        log.info("%s is complete", config.out)
        return config.out
    parts.mkdir(parents=True, exist_ok=True)
    numbers = batch_numbers(config)
    latents = len(numbers) * config.batch_size
    needed = 2 * latents * 2 * 4 * (config.data.crop // 8) ** 2 + 2**20
    require_space(parts, needed, "latents")
    claim(parts, settings)

    if some := missing(parts, numbers):
        _sample(config, parts, some, len(numbers), until)
    done = [number for number in numbers if batch_file(parts, number).exists()]
    found = [load_file(batch_file(parts, number))["latents"] for number in done]
    joined = {"numbers": torch.tensor(done), "latents": torch.stack(found)}
    with open_safetensors(batch_file(parts, numbers[0])) as file:
        origin = file.metadata()["origin"]
    save(config.out, joined, {"settings": settings, "origin": origin})
    shutil.rmtree(parts)
    return config.out


def _sample(config: Config, parts: Path, numbers: list[int], total: int, until: float) -> None:
    models, _ = open_models(
        config.model, ("base.vae.", "base.clip_vision.", "base.unet.", "control.")
    )
    networks = digests(models)
    models.freeze(half(config.precision))
    train = open_batches(models, config)
    made = ((number, {"latents": latents})
            for number, latents in sampled(models, train, numbers, config))  # fmt: skip
    fill(
        *(parts, made),
        batch_size=config.batch_size,
        done=total - len(numbers),
        total=total,
        unit="latent",
        metadata={"origin": json.dumps(train.origin() | {"networks": networks})},
        until=until,
    )


def open_batches(
    models: Models, config: Config, store: PhotoStore | None = None
) -> RestorationBatches:
    """The batches that latents are sampled for, with what stage 1 reads."""
    reads = {"lq", "clip_view", models.degradation_key}
    train, _ = data_for(models, config.data, config.seed, reads, store)
    return train.sized(config.batch_size)


def sampled(
    models: Models, batches: RestorationBatches, numbers: Sequence[int], config: Config
) -> Iterator[tuple[int, Tensor]]:
    """Number and latents, (B, 4, h, w) fp16, of each batch, one after the other."""

    def restored(number: int, batch: Batch) -> Tensor:
        noise = sampling_noise(config.seed, number)
        return _restore(models, batch, config.steps, noise).half().cpu().contiguous()

    return computed(batches, numbers, config.precision, config.workers, restored)


def batch_numbers(config: Config) -> range:
    """Those of the batches, as many as have all samples."""
    return range(FIRST_BATCH, FIRST_BATCH - (-config.samples // config.batch_size))


def digests(models: Models) -> dict[str, str]:
    """Of what latents depend on beside the photos."""
    stage_1 = (models.vision, models.prompt, models.unet, models.control)
    return {"VAE": networks_digest(models.vae), "stage 1": networks_digest(*stage_1)}


def _restore(
    models: Models, batch: Mapping[str, Tensor], steps: int, noise: torch.Generator
) -> Tensor:
    prompt, part = models.read(batch), batch["part"]
    hint = models.encode(to_pixels(batch["lq"]))
    return sample(models, hint, prompt.semantic[part], prompt.degradation[part], steps, noise)


def _settings(config: Config) -> str:
    """All that the latents depend on, as JSON; the files of the model by their content."""
    names = ("data", "model", "samples", "batch_size", "steps", "precision", "seed")
    # What only saves memory or is validated on may change.
    alike = replace(config, data=replace(config.data, memory_mb=0, validation_samples=1))
    values = {name: repr(getattr(alike, name)) for name in names}
    for path in config.model.init:
        values[str(path)] = file_digest(path)
    return json.dumps(values)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
