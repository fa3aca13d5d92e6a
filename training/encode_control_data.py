"""What stage 1 computes of photos before it denoises, once: `python -m training.encode_control_data
--help`.

VAE and CLIP are frozen in stage 1, so that a degraded photo gives the same latents and tokens each
time it is seen. A folder holds them, with the labels, in a file for each batch; `train_control
--encoded` reads it in place of photos.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from diff_restorer.files import written_whole

from .batch_files import (
    RECORD,
    batch_file,
    claim,
    computed,
    fill,
    missing,
    networks_digest,
    require_one_process,
    require_origin,
)
from .checkpoints import require_space
from .common import DataConfig, ModelConfig, Precision, data_for, half, open_models
from .config import run_program
from .data import Batch, RestorationBatches, seeded, to_device
from .models import Models, to_pixels

log = logging.getLogger(__name__)

COMPLETE = "complete"
"""File with the number of batches, once all are there."""


@dataclass(frozen=True)
class Config:
    """Encode degraded photos for stage 1."""

    data: DataConfig
    out: Path
    """Folder to write; the same command goes on with what is missing, and with more `samples` adds
    to it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    samples: int = 20_000
    """How many, in whole batches: as many degradations and windows of each photo as this is times
    the number of photos. At 512 px a sample of SD 1.5 takes 0.6 MB."""
    batch_size: int = 16
    """Samples at once: as many as stage 1 will have in a batch."""
    precision: Precision = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else no."""
    seed: int = 0
    """Seed of the samples."""
    workers: int = 0
    """Data processes."""


class Encoded(NamedTuple):
    """What of B crops from P parts does not depend on anything that trains in stage 1."""

    clean: Tensor
    """Scaled latents of the clean crops, (B, 4, h, w)."""
    hint: Tensor
    """Likewise of the degraded ones."""
    whole: Tensor
    """P_CLIP that P_S is read from, (P, T, width)."""
    close: Tensor
    """P_CLIP that P_D is read from; the same tensor where the views are the same."""


@torch.no_grad()
def encoded(
    models: Models, batch: Batch, encode: Callable[[Tensor], Tensor] | None = None
) -> Encoded:
    """Of a batch with photos; or what a batch of `EncodedBatches` holds.

    Args:
        models: Whose VAE and vision tower look.
        batch: Of training.
        encode: `models.encode`, compiled.
    """
    if "hint" in batch:
        held = {name: batch[name].float() for name in Encoded._fields if name in batch}
        return Encoded(**({"close": held["whole"]} | held))
    # One after the other: together they would be the largest activation of the step.
    encode = encode or models.encode
    clean, hint = (encode(to_pixels(batch[name])).float() for name in ("gt", "lq"))
    return Encoded(clean, hint, *models.tokens(batch))


class EncodedBatches(Dataset[Batch]):
    """The first `count` batches of a folder, each once in an epoch, in another order in each."""

    def __init__(self, folder: Path, count: int, batch_size: int, seed: int) -> None:
        self.folder, self.batch_size, self.seed = folder, batch_size, seed
        self.files = [batch_file(folder, number) for number in range(count)]

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.files) * self.batch_size

    def sized(self, batch_size: int) -> EncodedBatches:
        """The same; raises ValueError for batches of another size."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"--loop.batch-size: found {batch_size}, but {self.folder} holds batches of "
                f"{self.batch_size}; --loop.accumulate makes steps of several"
            )
        return self

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, len(self.files))
        order = torch.randperm(len(self.files), generator=seeded(self.seed, 5, epoch))
        return load_file(self.files[int(order[place])])

    def finish(self, item: Batch, device: torch.device) -> Batch:
        """The batch on `device`: `Encoded`'s tensors in fp16, and the labels of
        `RestorationBatches.finish`."""
        return {key: to_device(value, device) for key, value in item.items()}


def read_encoded(folder: Path, batches: RestorationBatches, models: Models) -> EncodedBatches:
    """Batches of a folder, which must be what these networks would see of these photos.

    Raises:
        FileNotFoundError: There is no such folder, or it is not complete.
        ValueError: They came from other photos, settings or networks.
    """
    complete = folder / COMPLETE
    if not complete.is_file():
        raise FileNotFoundError(
            f"--encoded: {folder} holds no batches, or not all of them; make them with "
            "training.encode_control_data, which goes on with what is there"
        )
    told = json.loads((folder / RECORD).read_text())
    require_origin(batches, told["origin"], f"--encoded: {folder} was made")
    if told["networks"] != networks_digest(models.vae, models.vision):
        raise ValueError(
            f"--encoded: {folder} was made with another VAE or vision tower than --model has; "
            "make it anew"
        )
    count = int(complete.read_text())
    log.info("--encoded: %d samples in %s", count * batches.batch_size, folder)
    return EncodedBatches(folder, count, batches.batch_size, batches.seed)


def main(config: Config) -> Path:
    """Encode and write, with a progress bar; goes on where a killed run was.

    Raises:
        ValueError: The folder has batches of other settings, or several processes were started.
        DiskError: There is too little room.
    """
    require_one_process()
    models, _ = open_models(config.model, ("base.vae.", "base.clip_vision."))
    reads = {"gt", "lq", "clip_view", models.degradation_key}
    train, _ = data_for(models, config.data, config.seed, reads)
    train = train.sized(config.batch_size)
    told = {
        "origin": train.origin(),
        "networks": networks_digest(models.vae, models.vision),
        "precision": config.precision,
    }
    claim(config.out, json.dumps(told))
    numbers = range(-(-config.samples // config.batch_size))
    if some := missing(config.out, numbers):
        models.freeze(half(config.precision))
        fill(
            *(config.out, _made(models, train, some, config)),
            batch_size=config.batch_size,
            done=len(numbers) - len(some),
            total=len(numbers),
            unit="sample",
        )
    with written_whole(config.out / COMPLETE) as part:
        part.write_text(str(len(numbers)))
    log.info("%s: %d batches of %d", config.out, len(numbers), config.batch_size)
    return config.out


def _made(
    models: Models, batches: RestorationBatches, numbers: Sequence[int], config: Config
) -> Iterator[tuple[int, Batch]]:
    def kept(number: int, batch: Batch) -> Batch:
        seen = encoded(models, batch)
        made = {name: value.half() for name, value in seen._asdict().items()}
        if seen.close is seen.whole:
            del made["close"]
        made |= {key: batch[key] for key in ("part", "kinds", "severities", "label")}
        if number == numbers[0]:
            size = sum(value.nbytes for value in made.values())
            require_space(config.out, len(numbers) * size, "encoded photos")
        return {key: value.cpu().contiguous() for key, value in made.items()}

    return computed(batches, numbers, config.precision, config.workers, kept)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
