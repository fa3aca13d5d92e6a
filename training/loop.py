"""The loop that all stages share: steps, EMA, checkpoints, logs, validation."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import StepSampler

log = logging.getLogger(__name__)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True)
class LoopConfig:
    """Settings that every stage has."""

    out: Path
    """Run folder: metrics.csv, sheets/, step_XXXXXXX/ (full state), export.safetensors."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Samples per process and step."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: bool = True
    """Cosine decay to zero after warm-up; else constant."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    ema: float = 0.999
    """Decay of the exponential moving average that is validated and exported."""
    clip: float = 1.0
    """Gradient norm limit."""
    precision: str = "bf16"
    """accelerate's mixed precision: no, bf16 or fp16."""
    compile: bool = False
    """torch.compile the networks: two minutes at the start, then up to twice as fast."""
    seed: int = 0
    """Seed of data, noise and weights."""
    workers: int = 1
    """Data processes."""
    threads: int = 0
    """CPU threads of the networks; 0 leaves torch's choice."""
    checkpoint_every: int = 500
    """Steps between full-state checkpoints (the last two are kept)."""
    validate_every: int = 500
    """Steps between validations."""


@dataclass
class Stage:
    """What a program trains: a module, a loss on it, and a way to look at it."""

    trainable: nn.Module
    loss: Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
    """(batch, generator) -> {"loss": ..., other scalars to log}."""
    validate: Callable[[int, Path], dict[str, float]]
    """(step, sheet folder) -> scores, run with EMA weights; draws its sheet."""
    export: Callable[[Path, dict[str, Any]], None]
    """(path, config) -> writes the file that the next stage or the nodes load, EMA weights."""
    begin_step: Callable[[int], None] | None = None
    """Told the number of each step before its first batch; may switch `requires_grad`."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite."""


def learning_rate(step: int, config: LoopConfig) -> float:
    """Warm-up, then constant or cosine to zero at `config.steps`; as a share of the peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if not config.decay:
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def maybe_compile(function: FunctionT, config: LoopConfig) -> FunctionT:
    """`torch.compile` the tensor part of a loss where the run asks for it."""
    return cast(FunctionT, torch.compile(function)) if config.compile else function


def run(stage: Stage, dataset: Dataset[dict[str, Tensor]], config: LoopConfig) -> Path:
    """Train `stage`; resume from the newest checkpoint in `config.out` if there is one.

    Returns:
        Path of the exported file.

    Raises:
        NonFiniteError: Names the loss term or the parameter that is not finite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line per file and checkpoint
    set_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    config.out.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"out": str(config.out)}
    (config.out / "config.json").write_text(json.dumps(settings, indent=1))

    params = [p for p in stage.trainable.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, config))
    average = AveragedModel(stage.trainable, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    _, optimizer, schedule = accelerator.prepare(stage.trainable, optimizer, schedule)
    accelerator.register_for_checkpointing(average)

    start = _resume(accelerator, config.out)
    sampler = StepSampler(
        config.seed,
        start_step=start,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            prefetch_factor=4 if config.workers else None,
        )
    )
    bar = tqdm(total=config.steps, initial=start, unit="step", mininterval=5, smoothing=0.05)
    waited, since, window = 0.0, time.perf_counter(), 0
    for step in range(start, config.steps):
        mark = time.perf_counter()
        batch = {key: value.to(accelerator.device) for key, value in next(loader).items()}
        waited += time.perf_counter() - mark
        generator = torch.Generator(accelerator.device).manual_seed(
            hash((config.seed, step, accelerator.process_index))
        )
        if stage.begin_step:
            stage.begin_step(step)
        with accelerator.autocast():
            terms = stage.loss(batch, generator)
        _check_finite(terms, step)
        accelerator.backward(terms["loss"])
        norm = cast(Tensor, accelerator.clip_grad_norm_(params, config.clip))
        if not torch.isfinite(norm):
            raise NonFiniteError(_describe_gradients(stage.trainable, step))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(stage.trainable)
        window += 1
        bar.update()

        done = step + 1
        if done % 50 == 0:
            elapsed = time.perf_counter() - since
            row = {key: round(float(value), 5) for key, value in terms.items()} | {
                "grad_norm": round(float(norm), 4),
                "lr": schedule.get_last_lr()[0],
                "samples_per_s": round(window * config.batch_size / elapsed, 2),
                "wait_share": round(waited / elapsed, 3),
            }
            _log_row(config.out / "metrics.csv", {"step": done, **row})
            bar.set_postfix({k: row[k] for k in ("loss", "samples_per_s", "wait_share")})
            waited, since, window = 0.0, time.perf_counter(), 0
        if done % config.checkpoint_every == 0 or done == config.steps:
            _checkpoint(accelerator, config.out, done)
        if done % config.validate_every == 0 or done == config.steps:
            with _swapped(stage.trainable, average):
                scores = stage.validate(done, config.out / "sheets")
                stage.export(config.out / "export.safetensors", settings)
            _log_row(config.out / "validation.csv", {"step": done, **scores})
            bar.write(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            since, waited, window = time.perf_counter(), 0.0, 0
    bar.close()
    if start >= config.steps:
        with _swapped(stage.trainable, average):
            stage.export(config.out / "export.safetensors", settings)
    return config.out / "export.safetensors"


class _swapped:  # noqa: N801 - reads as a function
    """Hold the averaged weights in the live module for the time of a `with` block."""

    def __init__(self, module: nn.Module, average: AveragedModel) -> None:
        self.pairs = list(zip(module.parameters(), average.module.parameters(), strict=True))

    def __enter__(self) -> None:
        for live, averaged in self.pairs:
            live.data, averaged.data = averaged.data, live.data

    def __exit__(self, *_: object) -> None:
        self.__enter__()


def _check_finite(terms: dict[str, Tensor], step: int) -> None:
    if not torch.isfinite(terms["loss"]):
        bad = [key for key, value in terms.items() if not torch.isfinite(value).all()]
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)} is not finite; lower lr or raise warmup"
        )


def _describe_gradients(module: nn.Module, step: int) -> str:
    bad = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    return f"step {step}: gradient of {', '.join(bad[:3])} is not finite; lower lr or raise warmup"


def _checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write the full state under a temporary name first: a killed process leaves no half one."""
    temporary, final = out / "writing", out / f"step_{step:07d}"
    shutil.rmtree(temporary, ignore_errors=True)
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in sorted(out.glob("step_*"))[:-2]:
            shutil.rmtree(old)


def _resume(accelerator: Accelerator, out: Path) -> int:
    found = sorted(out.glob("step_*"))
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    step = int(found[-1].name.removeprefix("step_"))
    log.info("resumed %s at step %d", out, step)
    return step


def _log_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow(row.values())
