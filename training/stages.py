"""Stages that train parts of `Models`: how their files are written, and how a program runs one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import compare_file
from .common import checkpoint_info, open_models
from .data import Batches
from .loop import Stage, run
from .models import Models
from .stepping import Loss

Build = Callable[[Models, set[str], Any], tuple[Stage, Batches]]
"""(models, file prefixes that they have, settings of the program) -> what trains, and on what."""


def stage_of(
    models: Models,
    parts: Iterable[str],
    trainable: nn.Module,
    loss: Loss,
    validate: Callable[[int, Path], dict[str, float]],
    begin_step: Callable[[int], None] | None = None,
    opponents: tuple[nn.Module, ...] = (),
    hidden: tuple[Tensor, ...] = (),
) -> Stage:
    """A stage whose file holds the `parts` of `models`, in fp32 and read back bit for bit."""
    prefixes = tuple(parts)

    def export(path: Path, settings: dict[str, Any]) -> None:
        models.save(path, prefixes, checkpoint_info(models, settings), torch.float32)

    def check(path: Path) -> None:
        compare_file(path, models.file_tensors(prefixes, torch.float32))

    return Stage(
        *(trainable, loss, validate, export, begin_step, opponents),
        hidden=hidden,
        check=check,
        parts=prefixes,
    )


def run_stage(
    build: Build, config: Any, needed: tuple[str, ...] = (), began: float | None = None
) -> Path:
    """Train a program's stage from the files of `config.model.init`, in files.

    Args:
        build: The program's.
        config: Its settings, with `loop`, `data` and `model`.
        needed: File prefixes that it cannot start without.
        began: When its time box began, of `time.perf_counter`; now.
    """
    began = began or time.perf_counter()
    models, loaded = open_models(config.model, needed, config.loop.seed)
    return run(*build(models, loaded, config), config.loop, config, began)
