"""Batches that are made once and read by another program: a safetensors file each, in a folder."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diff_restorer.files import written_whole

from .common import Precision, autocast, home
from .data import Batch, RestorationBatches, load

Result = TypeVar("Result")
RECORD = "settings.json"
"""What the batches of a folder depend on."""


def require_one_process() -> None:
    """Raises ValueError where several processes were started."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"WORLD_SIZE is {processes}, but this program runs in one process: start it without "
            "accelerate launch"
        )


def batch_file(folder: Path, number: int) -> Path:
    """File of one batch."""
    return folder / f"{number:012d}.safetensors"


def missing(folder: Path, numbers: Sequence[int]) -> list[int]:
    """Those of the batches that have no file yet."""
    return [number for number in numbers if not batch_file(folder, number).exists()]


def claim(folder: Path, settings: str) -> None:
    """Makes a folder for batches that depend on these settings; raises ValueError where it holds
    batches of others."""
    record = folder / RECORD
    if record.exists():
        require_same(settings, record.read_text(), folder)
    with written_whole(record) as part:
        part.write_text(settings)


def require_same(settings: str, found: str, place: Path) -> None:
    """Raises ValueError where what is there, at `place`, was made with other settings."""
    if found != settings:
        raise ValueError(
            f"--out: {place} was made with other settings; delete it, or give another --out"
        )


def require_origin(batches: RestorationBatches, origin: Mapping[str, Any], made: str) -> None:
    """Raises ValueError, which calls them `made`, where batches of that `RestorationBatches.origin`
    are not what `batches`, with any seed, would be."""
    for name, value in batches.with_seed(origin["seed"]).origin().items():
        if origin.get(name) != value:
            raise ValueError(
                f"{made} with {name} {origin.get(name)}, this run has {value}; give both programs "
                "the same --data and batch size"
            )


@torch.no_grad()
def computed(
    batches: RestorationBatches,
    numbers: Sequence[int],
    precision: Precision,
    workers: int,
    compute: Callable[[int, Batch], Result],
) -> Iterator[tuple[int, Result]]:
    """Number and result of each batch on the device of this process, one after the other."""
    loaded = load(batches, numbers, home(), workers)
    for number, batch in zip(numbers, loaded, strict=True):
        with autocast(precision):
            result = compute(number, batch)
        yield number, result


def networks_digest(*networks: nn.Module) -> str:
    """SHA-256 of all weights."""
    total = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            total.update(name.encode())
            total.update(value.detach().float().cpu().contiguous().numpy())
    return total.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a file that is whole or not there."""
    with written_whole(path) as part:
        save_file(tensors, part, metadata)


def fill(
    folder: Path,
    made: Iterable[tuple[int, dict[str, Tensor]]],
    *,
    batch_size: int,
    done: int,
    total: int,
    unit: str,
    metadata: dict[str, str] | None = None,
    until: float = math.inf,
) -> None:
    """Writes batches (number and tensors) into a folder of `claim` as they are made, with a
    progress bar of samples, until `time.perf_counter` is past `until`. `done` of `total` batches
    are there."""
    with tqdm(
        total=total * batch_size,
        initial=done * batch_size,
        unit=unit,
        smoothing=0.05,
        disable=None,
    ) as bar:
        for number, tensors in made:
            save(batch_file(folder, number), tensors, metadata)
            bar.update(batch_size)
            if time.perf_counter() > until:
                break
