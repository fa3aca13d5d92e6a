"""Finish a trained file for release: `python -m training.export --help`."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diff_restorer.checkpoint import CheckpointInfo, read_checkpoint, write_checkpoint

from .batch_files import require_one_process
from .checkpoints import compare_file, require_space
from .common import DataConfig, ModelConfig, data_for, home, load_models, open_models, to_home
from .config import run_program
from .data import Batch, Mixing, RestorationBatches
from .models import Models
from .photos import PhotoStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Compute class prototypes, write fp16, load back and compare."""

    data: DataConfig
    out: Path
    """File to write."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """`--model.init` is the file to finish."""
    samples: int = 256
    """Training photos, in whole batches of 16 and of one kind each, that the prototypes are
    averaged over."""
    scores: Path | None = None
    """JSON of evaluation results for the file's metadata."""


@torch.no_grad()
def pooled_p_d(models: Models, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pooled P_D (P, C) and kinds (P, N) of all photos of batches on the models' device."""
    read = [(models.read_pooled(batch).cpu(), batch["kinds"].cpu()) for batch in batches]
    pooled, kinds = zip(*read, strict=True)
    return torch.cat(pooled), torch.cat(kinds)


def main(config: Config, until: float = math.inf) -> Path:
    """Finish the file.

    Args:
        config: Settings.
        until: When fewer samples must do, of `time.perf_counter`.

    Raises:
        ValueError: The file is an ablation, the scores are no JSON, no sample of some type was
            drawn, a weight is too large for fp16, or the file reads back other than it was written.
        DiskError: There is too little room for the file.
    """
    require_one_process()
    scores = _read_scores(config.scores) if config.scores else None
    files = [read_checkpoint(path, ()) for path in config.model.init]
    models, _ = load_models(config.model, files, ("prompt_processor.", "control."))
    if models.ablations:
        raise ValueError(
            f"--model.init: {files[-1].path} was trained as an ablation "
            f"({', '.join(sorted(models.ablations))}), which the nodes do not run; evaluate it "
            "with training's own programs"
        )
    source = files[-1]
    scores = source.info.scores if scores is None else scores
    parts = sorted({_part(key) for key in source.keys})
    fixed, written = write(models, parts, replace(source.info, scores=scores), config, until=until)
    del models  # SD 1.5 twice would be much
    return read_back(config, fixed, written)


def write(
    models: Models,
    parts: Sequence[str],
    info: CheckpointInfo,
    config: Config,
    store: PhotoStore | None = None,
    until: float = math.inf,
) -> tuple[dict[str, Tensor], Tensor]:
    """Give models their class prototypes, and write them.

    Args:
        models: Are changed.
        parts: File prefixes to write.
        info: Metadata, whose paths are shortened.
        config: Settings.
        store: Photos that are decoded already.
        until: When fewer samples must do, of `time.perf_counter`.

    Returns:
        A validation batch and its pooled P_D, for `read_back`.

    Raises:
        ValueError: No sample of some type was drawn, a weight is too large for fp16, or the file
            reads back other than it was written.
        DiskError: There is too little room for the file.
    """
    # A mix would say little of each of its kinds.
    data = replace(config.data, crops_per_part=1, mixing=Mixing())
    reads = {models.degradation_key}
    train, validation = data_for(models, data, 1234, reads, store)
    train = train.sized(16)
    pooled, kinds = pooled_p_d(models, _drawn(train, -(-config.samples // 16), until))
    for index, kind in enumerate(models.types):
        rows = kinds[:, index] > 0
        if not rows.any():
            raise ValueError(f"--samples: {config.samples} are too few, none of type {kind!r}")
        models.prompt.prototypes[index] = pooled[rows].mean(dim=0)

    tensors = models.file_tensors(parts, torch.float16)
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{config.out}: {name} is not finite in fp16")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(value.nbytes for value in tensors.values()) + 2**20
    require_space(config.out.parent, needed, "its tensors")
    write_checkpoint(config.out, tensors, replace(info, config=without_folders(info.config)))
    compare_file(config.out, tensors)
    validation = to_home(validation)
    return validation, pooled_p_d(models, [validation])[0]


def _drawn(train: RestorationBatches, count: int, until: float) -> Iterator[Batch]:
    """Batches up to `count`; after `until` only as long as a kind is missing."""
    missing = set(range(len(train.kinds)))
    for number in tqdm(range(count), unit="batch", disable=None):
        if not missing and time.perf_counter() > until:
            return
        item = train[number]
        missing -= set(item.labels["label"].tolist())
        yield train.finish(item, home())


def read_back(config: Config, fixed: dict[str, Tensor], written: Tensor) -> Path:
    """Check that the file reads P_D as training did; returns its path.

    Raises:
        ValueError: It does not.
    """
    models, _ = open_models(replace(config.model, init=(config.out,)))
    difference = (pooled_p_d(models, [fixed])[0] - written).abs().max()
    if difference > 0.05:
        raise ValueError(f"{config.out}: P_D read back differs by {difference:.3f} from training")
    size = config.out.stat().st_size / 1e6
    log.info("%s: %.1f MB, P_D read back within %.4f", config.out, size, difference)
    return config.out


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--scores: {path} is not JSON: {error}") from error
    if not isinstance(scores, dict):
        raise ValueError(f"--scores: {path} holds a {type(scores).__name__}, give a JSON object")
    return scores


def without_folders(settings: Any) -> Any:
    """Settings with the last part of each path only: a shared file tells nothing of a disk."""
    if isinstance(settings, Mapping):
        return {name: without_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [without_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) else settings


def _part(key: str) -> str:
    """File prefix of a key: two components for `base.` and `decoder.`, else one."""
    count = 2 if key.startswith(("base.", "decoder.")) else 1
    return ".".join(key.split(".")[:count]) + "."


if __name__ == "__main__":
    run_program(main, Config, __doc__)
