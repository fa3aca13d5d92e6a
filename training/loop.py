"""The loop that all stages share: steps, EMA, checkpoints, logs, validation."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import config as record
from .average import Average
from .checkpoints import Checkpoints, state_bytes, write_failure
from .common import Precision, mixed_precision
from .course import GAP_SECONDS, Course, Rhythm, StepCourse, TimeCourse, require_one_length
from .data import Batch, Batches, BatchNumbers, load, seeded
from .errors import NonFiniteError
from .interruption import Interruption
from .nonfinite import describe
from .plots import draw_curves
from .progress import Progress

log = logging.getLogger(__name__)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

READ_EVERY = 20
"""A GPU is waited for once in so many steps, to read what they measured; a CPU is never ahead."""


@dataclass(frozen=True)
class LoopConfig:
    """Settings that every stage has."""

    out: Path
    """Run folder: metrics.csv, curves.png, sheets/, step_XXXXXXX/, export.safetensors."""
    steps: int = 0
    """Optimizer steps. Give one of steps, epochs and minutes."""
    epochs: float = 0.0
    """Passes over the photos."""
    minutes: float = 0.0
    """A time box, from the first validation to the last file, on whatever machine: warm-up and
    decay go by time, and a run that goes on has the time that was left. Reading the photos comes
    before it."""
    batch_size: int = 8
    """Samples per process and batch."""
    accumulate: int = 1
    """Batches per process that make one step: as if the batch, or the machine, were larger."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up; a time box has its own."""
    decay: bool = True
    """Cosine decay to zero after warm-up; else constant."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    ema: float = 0.999
    """Decay of the exponential moving average that is validated and exported."""
    clip: float = 1.0
    """Gradient norm limit; 0 is none."""
    precision: Precision = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else no. fp16 needs a GPU."""
    compile: bool = False
    """torch.compile the networks: two minutes at the start, then up to twice as fast."""
    seed: int = 0
    """Seed of data, noise and weights."""
    workers: int = 1
    """Data processes."""
    threads: int = 0
    """CPU threads of the networks; 0 leaves torch's choice."""
    log_every: int = 50
    """Steps between rows of metrics.csv, which are means over these steps."""
    checkpoint_every: int = 500
    """Steps between full-state checkpoints (the last two are kept)."""
    checkpoint_minutes: float = 15.0
    """Minutes after which a checkpoint is due, too; 0 leaves it to the steps."""
    validate_every: int = 500
    """Steps between validations."""
    validate_minutes: float = 0.0
    """Minutes after which a validation is due, too; 0 leaves it to the steps. A time box validates
    and saves at most once a minute."""
    tensorboard: bool = False
    """Write TensorBoard's event files as well (pip install tensorboard)."""


@dataclass
class Stage:
    """What a program trains: a module, a loss on it, and a way to look at it."""

    trainable: nn.Module
    """Moved, wrapped and saved by the loop; parameters without `requires_grad` stay as they are."""
    loss: Callable[[Batch, torch.Generator], dict[str, Tensor]]
    """(batch, generator), both on the module's device -> {"loss": ..., other scalars to log}. A
    scalar other than `loss` may be NaN where the batch says nothing of it: it is left out."""
    validate: Callable[[int, Path], dict[str, float]]
    """(step, sheet folder) -> scores, run with EMA weights; draws its sheet."""
    export: Callable[[Path, dict[str, Any]], None]
    """(path, {program: settings}) -> writes the file that the next stage or the nodes load, of EMA
    weights."""
    begin_step: Callable[[int], None] | None = None
    """Told the number of each step before its first batch; may switch `requires_grad` off for a
    time, of parameters that have it when the run starts."""
    opponents: tuple[nn.Module, ...] = ()
    """Parts of `trainable` that do not share gradients, as a GAN's two sides: each one's norm is
    limited by itself. None: the norm of the whole is."""
    check: Callable[[Path], None] | None = None
    """Raises an error that names the file where it reads back other than it was exported."""


class _LossModule(nn.Module):
    """The trainable module whose forward is the loss: what DDP and FSDP can synchronise."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.trainable = stage.trainable
        self._loss = stage.loss

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return self._loss(batch, generator)


def count_steps(config: LoopConfig, photos: int, processes: int) -> LoopConfig:
    """`config` with `steps` filled in, unless it has a time box.

    Args:
        photos: Length of the data set.
        processes: How many share one step.

    Raises:
        ValueError: Not exactly one of steps, epochs and minutes is given.
    """
    require_one_length(config.steps, config.epochs, config.minutes)
    if config.epochs <= 0:
        return config
    batch = config.batch_size * config.accumulate * processes
    return replace(config, steps=math.ceil(config.epochs * photos / batch))


def maybe_compile(function: FunctionT, config: LoopConfig) -> FunctionT:
    """`torch.compile` the tensor part of a loss where the run asks for it."""
    return cast(FunctionT, torch.compile(function)) if config.compile else function


def run(stage: Stage, data: Batches, config: LoopConfig, program: Any = None) -> Path:
    """Train `stage`; resume from the newest checkpoint in `config.out` if there is one.

    Under `accelerate launch`, processes share each step: W processes see and compute what one
    process with W times the `accumulate` does.

    Args:
        stage: What to train.
        data: Batches of any number.
        config: Settings of the loop.
        program: The program's whole config dataclass, for config.toml and the exported file.

    Returns:
        Path of the exported file.

    Raises:
        NonFiniteError: Names the loss term, input or parameter that is not finite.
        DiskError: Too little disk for the checkpoints, or writing failed.
        ResumeError: There are checkpoints, and none can be read.
        ValueError: The time box is too short for one step.
        SystemExit: The run was interrupted (Ctrl-C, SIGTERM); its state is saved.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line per file and checkpoint
    set_seed(config.seed)
    accelerator = _start_accelerate(config)
    config = count_steps(config, len(data), accelerator.num_processes)
    return _Run(accelerator, stage, config, program or config).train(data)


class _Signs(NamedTuple):
    """What is to happen after a step: by one process, or by any."""

    stop: bool
    """Save and end, as the user asked."""
    save: bool
    look: bool
    """Validate."""
    ends: bool
    """No step fits after it."""


class _Run:
    """One run: a stage as `accelerator` wraps it, and the run folder."""

    def __init__(
        self, accelerator: Accelerator, stage: Stage, config: LoopConfig, program: Any
    ) -> None:
        self.accelerator, self.stage, self.config = accelerator, stage, config
        self.settings = record.settings(program)
        self.told = {record.table_name(type(program)): self.settings}  # in the exported file
        self.exported = config.out / "export.safetensors"
        size = state_bytes(stage.trainable)
        self.checkpoints = Checkpoints(accelerator, config.out, size, self.settings)
        if accelerator.is_main_process:
            self.checkpoints.prepare()
            record.write(program, config.out / "config.toml")
        learned = [p for p in stage.trainable.parameters() if p.requires_grad]
        gpu = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            learned, lr=config.lr, weight_decay=config.weight_decay, fused=gpu or None
        )
        self.read_every = READ_EVERY if gpu else 1
        self.unread: list[tuple[int, Tensor]] = []
        self.module, self.optimizer = accelerator.prepare(_LossModule(stage), optimizer)
        _reject_nested_shards(self.module)
        self.average = Average(accelerator.unwrap_model(self.module), config.ema)
        accelerator.register_for_checkpointing(self.average)

    def train(self, data: Batches) -> Path:
        """All steps that are still to be done."""
        config, accelerator = self.config, self.accelerator
        start, extra = self.checkpoints.resume()
        self.course = course = _course(config, start, extra)
        self.progress = Progress(
            config.out,
            main=accelerator.is_main_process,
            course=course,
            samples_per_step=config.batch_size * config.accumulate * accelerator.num_processes,
            device=accelerator.device,
            tensorboard=config.tensorboard,
            means=extra.get("means"),
        )
        if course.finished and not self.exported.exists():
            self._validate(again=True)
        elif isinstance(course, TimeCourse) and not course.opened:
            self._validate(again=start > 0)
            self._save()
        batches = self._batches(data, start)
        gap = GAP_SECONDS if config.minutes else 0.0
        looks = Rhythm(config.validate_every, config.validate_minutes, gap)
        saves = Rhythm(config.checkpoint_every, config.checkpoint_minutes, gap)
        with Interruption() as interruption:
            while not course.finished:
                done = course.step + 1
                stop = bool(interruption.signal)
                signs = _Signs(stop, saves.due(done), looks.due(done), course.ends())
                signs, last = self._step(batches, signs), course.finished
                if done % config.log_every == 0 or last:
                    self.progress.log(self.optimizer.param_groups[0]["lr"])
                # Before the checkpoint: a run that goes on from it has this row already.
                if signs.look or last:
                    self._validate()
                    looks.done()
                if signs.save or signs.stop or last:
                    self._save()
                    saves.done()
                if signs.stop and not last:
                    log.warning(
                        "interrupted at %s, which is saved in %s: the same command goes on from "
                        "there",
                        *(course, config.out),
                    )
                    raise SystemExit(128 + (interruption.signal or signal.SIGTERM))
        self.progress.close()
        return self.exported

    def _save(self) -> None:
        """A checkpoint."""
        extra = {"means": self.progress.means.state, "course": self.course.state}
        with self.progress.paused(), self.course.closing("checkpoint"):
            self.checkpoints.save(self.course.step, extra)

    def _batches(self, data: Batches, start: int) -> Iterator[Batch]:
        """Endless batches on the device, from the first of step `start` on."""
        config, accelerator = self.config, self.accelerator
        numbers = BatchNumbers(
            start * config.accumulate, accelerator.process_index, accelerator.num_processes
        )
        return load(data.sized(config.batch_size), numbers, accelerator.device, config.workers)

    def _step(self, batches: Iterator[Batch], signs: _Signs) -> _Signs:
        """One optimizer step; returns what any process wants to happen after it."""
        config, accelerator, step = self.config, self.accelerator, self.course.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self.course.rate()
        if self.stage.begin_step is not None:
            self.stage.begin_step(step)
        parts: list[dict[str, Tensor]] = []
        learned: set[str] = set()  # terms that have a gradient
        batch: Batch = {}
        accelerator.step = 0  # counts batches, also those of a run with another `accumulate`
        for micro in range(config.accumulate):
            with self.progress.waiting():
                batch = next(batches)
            # The same numbers however a step's batches are shared out to processes.
            place = micro * accelerator.num_processes + accelerator.process_index
            seed = seeded(config.seed, 2, step, place).initial_seed()
            generator = torch.Generator(accelerator.device).manual_seed(seed)
            torch.manual_seed(seed)  # dropout
            with accelerator.accumulate(self.module):
                with accelerator.autocast():
                    terms: dict[str, Tensor] = self.module(batch, generator)
                accelerator.backward(terms["loss"])
            learned |= {name for name, value in terms.items() if value.requires_grad}
            parts.append({name: value.detach() for name, value in terms.items()})
        accelerator.unscale_gradients()
        sides = self.stage.opponents or (self.stage.trainable,)
        norms = [_gradient_norm(side) for side in sides]
        row, signs, place = self._share(_measured(parts, norms), signs)
        self.unread.append((step, row))
        if len(self.unread) >= self.read_every or any(signs) or (step + 1) % config.log_every == 0:
            self._read(parts, learned, batch)
        for side, norm in zip(sides, norms, strict=True):
            if config.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(side.parameters(), config.clip, norm)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.average.update()
        elif accelerator.scaler is not None and accelerator.scaler.get_scale() < 1:
            raise NonFiniteError(describe(step, parts, learned, batch, self.stage.trainable))
        self.optimizer.zero_grad(set_to_none=True)
        self.course.advance(signs.ends, place)
        if self.course.finished:
            self._read(parts, learned, batch)
        self.progress.advance()
        return signs

    def _share(self, row: Tensor, signs: _Signs) -> tuple[Tensor, _Signs, float]:
        """The sum of a step's `row` over all processes, what any process wants, and the place that
        the main one has reached; all in one transfer, as each one waits."""
        accelerator = self.accelerator
        place = self.course.reached() if accelerator.is_main_process else 0.0
        if accelerator.num_processes == 1:
            return row, signs, place
        told = torch.tensor([*signs, place], device=row.device)
        shared = cast(Tensor, accelerator.reduce(torch.cat([row, told]), "sum"))
        *wanted, place = shared[len(row) :].tolist()
        return shared[: len(row)], _Signs(*(value > 0 for value in wanted)), place

    def _read(self, parts: list[dict[str, Tensor]], learned: set[str], batch: Batch) -> None:
        """Takes in what the steps since the last reading measured, on all processes.

        Args:
            parts: Terms of each batch of the last of these steps.
            learned: Terms that have a gradient.
            batch: Its last one.

        Raises:
            NonFiniteError: In one of the steps the loss or a gradient was not finite.
        """
        names, means = list(parts[0]), self.progress.means
        processes = self.accelerator.num_processes
        scaled = self.accelerator.scaler is not None  # fp16 overflows, and then skips the step
        rows = torch.stack([row for _, row in self.unread]).tolist() if self.unread else []
        for (step, _), row in zip(self.unread, rows, strict=True):
            norm = row[-1] / processes
            taken = dict(zip(names, zip(row, row[len(names) :], strict=False), strict=False))
            if taken["loss"][1] < self.config.accumulate * processes or not (
                math.isfinite(norm) or scaled
            ):
                raise NonFiniteError(describe(step, parts, learned, batch, self.stage.trainable))
            for name, (total, count) in taken.items():
                means.add(name, total, count)
            if math.isfinite(norm):
                means.add("grad_norm", norm, 1)
        self.unread.clear()

    def _validate(self, *, again: bool = False) -> None:
        """Validate and export with averaged weights, on the main process."""
        out, exported, step = self.config.out, self.exported, self.course.step
        with self.progress.paused(), self.course.closing("validation"), self.average.applied():
            if self.accelerator.is_main_process:
                with self.accelerator.autocast():
                    scores = self.stage.validate(step, out / "sheets")
                try:
                    with self.checkpoints.writing() as folder:
                        self.stage.export(folder / exported.name, self.told)
                        if self.stage.check is not None:
                            self.stage.check(folder / exported.name)
                        (folder / exported.name).replace(exported)
                except (OSError, SafetensorError) as error:
                    raise write_failure(out, exported.name, error) from error
                if not again:
                    self.progress.validated(step, scores)
                    draw_curves([out], out / "curves.png")
            self.accelerator.wait_for_everyone()


def _gradient_norm(side: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in side.parameters() if p.grad is not None])


def _measured(parts: list[dict[str, Tensor]], norms: list[Tensor]) -> Tensor:
    """Sums of the finite values of each term over the batches of a step, their counts, and the
    norm of all gradients, (2 * terms + 1,)."""
    terms = torch.stack([torch.stack([v.float() for v in part.values()]) for part in parts])
    known = terms.isfinite()
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(whole)) if len(whole) > 1 else whole[0]
    sums = torch.where(known, terms, 0).sum(dim=0)
    return torch.cat([sums, known.sum(dim=0), norm.to(sums.device)[None]])


def _course(config: LoopConfig, step: int, extra: dict[str, Any]) -> Course:
    if config.minutes:
        return TimeCourse(config.minutes, config.decay, step, extra.get("course", {}))
    return StepCourse(config.steps, config.warmup, config.decay, step)


def _start_accelerate(config: LoopConfig) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision),
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
        kwargs_handlers=[
            # A part without a gradient (CLIP's last norm, what waits for its turn) is no error.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # The others wait while the main process validates.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.mixed_precision_policy = None  # autocast decides, as without FSDP
    return accelerator


def _reject_nested_shards(module: nn.Module) -> None:
    parts = dict(module.named_modules()).items()
    nested = [name for name, part in parts if name and isinstance(part, FSDPModule)]
    if nested:
        raise ValueError(
            f"fsdp_auto_wrap_policy: found {len(nested)} separately wrapped parts ({nested[0]}, "
            "...); give NO_WRAP, so that the main process can validate by itself"
        )
