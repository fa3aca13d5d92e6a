"""The loop that all stages share: steps, EMA, checkpoints, logs, validation."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn

from . import config as record
from .checkpoints import Checkpoints, state_bytes, write_failure
from .common import Precision, mixed_precision
from .course import GAP_SECONDS, Course, Rhythm, TimeCourse, require_one_length
from .data import Batch, Batches, BatchNumbers, load
from .interruption import Interruption
from .plots import draw_curves
from .progress import RunLog, peak_memory
from .stepping import Loss, Signs, Stepper

log = logging.getLogger(__name__)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


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
    """A time box, from reading the photos to the last file, on whatever machine: warm-up and decay
    go by time, and a run that goes on has the time that was left."""
    batch_size: int = 8
    """Samples per process and batch."""
    accumulate: int = 1
    """Batches per process that make one step: as if the batch, or the machine, were larger."""
    lr: float = 1e-4
    """Peak learning rate."""
    muon: float = 0.0
    """Muon in place of AdamW for the weights between features, where a stage has such (stage 2 of a
    decoder with a detail path): size of its steps in units of the learning rate. 0: AdamW moves
    all."""
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
    loss: Loss
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
    hidden: tuple[Tensor, ...] = ()
    """Weights of `trainable` that Muon may move."""
    check: Callable[[Path], None] | None = None
    """Raises an error that names the file where it reads back other than it was exported."""
    parts: tuple[str, ...] = ()
    """File prefixes of what the file holds."""


def count_steps(config: LoopConfig, photos: int, processes: int) -> LoopConfig:
    """`config` with `steps` filled in, unless it has a time box, for a data set of so many photos
    and so many processes that share a step. Raises ValueError where not exactly one length is
    given."""
    require_one_length(config.steps, config.epochs, config.minutes)
    if config.epochs <= 0:
        return config
    batch = config.batch_size * config.accumulate * processes
    return replace(config, steps=math.ceil(config.epochs * photos / batch))


def maybe_compile(function: FunctionT, config: LoopConfig) -> FunctionT:
    """`torch.compile` the tensor part of a loss where the run asks for it."""
    return cast(FunctionT, torch.compile(function)) if config.compile else function


def run(
    stage: Stage,
    data: Batches,
    config: LoopConfig,
    program: Any = None,
    began: float | None = None,
) -> Path:
    """Train `stage`; resume from the newest checkpoint in `config.out` if there is one; returns the
    path of the exported file.

    Under `accelerate launch`, processes share each step: W processes see and compute what one
    process with W times the `accumulate` does.

    Args:
        program: The program's whole config dataclass, for config.toml and the exported file.
        began: When the time box began, of `time.perf_counter`; now.

    Raises:
        NonFiniteError: Names the loss term, input or parameter that is not finite.
        DiskError: Too little disk for the checkpoints, or writing failed.
        ResumeError: There are checkpoints, and none can be read.
        ValueError: The time box is too short for one step.
        SystemExit: The run was interrupted (Ctrl-C, SIGTERM); its state is saved.
    """
    trained = _Run(stage, data, config, program or config, in_files=True)
    trained.train(began or time.perf_counter())
    return trained.exported


def fit(
    stage: Stage,
    data: Batches,
    config: LoopConfig,
    program: Any = None,
    began: float | None = None,
) -> Spent:
    """Train `stage` as `run` does, but keep all in memory: `stage.trainable` becomes the average.
    Returns where the time went.

    The run folder gets the tables, curves and sheets alone. After an error or an interruption, the
    weights are the averages of the last validation.
    """
    torch.backends.cudnn.benchmark = True  # faster; nothing has to come out the same again
    trained = _Run(stage, data, config, program or config, in_files=False)
    return trained.train(began or time.perf_counter())


@dataclass(frozen=True)
class Spent:
    """Where the time of a run went."""

    seconds: float
    """In all."""
    parts: dict[str, float]
    """Seconds of data, forward and backward, optimizer, validation, export."""
    steps: int
    samples: int
    """That were trained on."""
    peak_bytes: float
    """Largest use of memory by the process so far."""
    pieces: int = 1
    """That batches were computed in at the end; more than 1 where the GPU had no room for one."""


class _Run:
    """One run: a stage as `accelerator` wraps it, and the run folder."""

    def __init__(
        self, stage: Stage, data: Batches, config: LoopConfig, program: Any, *, in_files: bool
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line per file and checkpoint
        set_seed(config.seed)
        self.accelerator = accelerator = _start_accelerate(config)
        config = count_steps(config, len(data), accelerator.num_processes)
        self.stage, self.data, self.config = stage, data, config
        settings = record.settings(program)
        self.provenance = {record.table_name(type(program)): settings}  # in the exported file
        self.exported = config.out / "export.safetensors"
        size = state_bytes(stage.trainable)
        checkpoints = Checkpoints(accelerator, config.out, size, settings) if in_files else None
        self.checkpoints = checkpoints
        if accelerator.is_main_process:
            if checkpoints is not None:
                checkpoints.prepare()
            config.out.mkdir(parents=True, exist_ok=True)
        self.program = program
        self.stepper = Stepper(accelerator, stage, config)
        self.average, self.clock = self.stepper.average, self.stepper.clock
        self.kept = {} if in_files else self.average.copied()
        accelerator.register_for_checkpointing(self.average)
        self.batch = config.batch_size * config.accumulate * accelerator.num_processes

    def train(self, began: float) -> Spent:
        """All steps that are still to be done."""
        config = self.config
        start, extra = self.checkpoints.resume() if self.checkpoints is not None else (0, {})
        if self.accelerator.is_main_process:  # now that it is known to go with what is there
            record.write(self.program, config.out / "config.toml")
        if config.minutes:
            course = TimeCourse(config.minutes, config.decay, start, extra.get("course", {}), began)
        else:
            course = Course(start, config.steps, config.warmup, config.decay)
        self.course = course
        self.stepper.means.state = extra.get("means", {})
        self.log = RunLog(
            config.out,
            main=self.accelerator.is_main_process,
            course=course,
            samples_per_step=self.batch,
            device=self.accelerator.device,
            means=self.stepper.means,
            clock=self.clock,
            tensorboard=config.tensorboard,
        )
        if course.finished and not self.exported.exists():
            self._validate(again=True)
        elif isinstance(course, TimeCourse) and not course.opened:
            self._validate(again=start > 0)
            self._save()
        try:
            self._steps()
        except BaseException:
            if self.checkpoints is None:
                self.average.adopt(self.kept)
            raise
        self.log.close()
        if self.checkpoints is None:
            self.average.adopt()
        return Spent(
            seconds=time.perf_counter() - began,
            parts=self.clock.seconds(),
            steps=course.step - start,
            samples=(course.step - start) * self.batch,
            peak_bytes=peak_memory(self.accelerator.device),
            pieces=self.stepper.pieces,
        )

    def _steps(self) -> None:
        """To the end, with validations and checkpoints where they are due."""
        config, course = self.config, self.course
        batches = self._batches()
        gap = GAP_SECONDS if config.minutes else 0.0
        looks = Rhythm(config.validate_every, config.validate_minutes, gap)
        saves = Rhythm(config.checkpoint_every, config.checkpoint_minutes, gap)
        with Interruption() as interruption:
            while not course.finished:
                done = course.step + 1
                stop = bool(interruption.signal)
                signs = Signs(stop, saves.due(done), looks.due(done), course.ends())
                taken = self._step(batches, signs)
                if taken is None:
                    batches = self._batches()
                    continue
                signs, last = taken, course.finished
                if done % config.log_every == 0 or last:
                    self.log.log(self.stepper.lr)
                # Before the checkpoint: a run that goes on from it has this row already.
                if signs.look or last or (signs.stop and self.checkpoints is None):
                    self._validate()
                    looks.done()
                if signs.save or signs.stop or last:
                    self._save()
                    saves.done()
                if signs.stop and not last:
                    saved = f"is saved in {config.out}: the same command goes on from there"
                    log.warning(
                        "interrupted at %s, which %s",
                        course,
                        saved if self.checkpoints is not None else "is kept",
                    )
                    raise SystemExit(128 + (interruption.signal or signal.SIGTERM))

    def _step(self, batches: Iterator[Batch], signs: Signs) -> Signs | None:
        """One optimizer step; nothing where the GPU had no room for its batch."""
        course, stepper = self.course, self.stepper
        if self.stage.begin_step is not None:
            self.stage.begin_step(course.step)
        try:
            signs, place = stepper.take(course.step, course.rate(), batches, signs, course.reached)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1 or 2 * stepper.pieces > self.config.batch_size:
                raise
        else:
            course.advance(signs.ends, place)
            self.log.advance()
            return signs
        stepper.split()  # out of `except`, whose traceback holds the batch
        torch.cuda.empty_cache()
        log.warning(
            "out of memory: each batch of %d is computed in %d pieces from now on; "
            "--loop.batch-size %d with --loop.accumulate %d would do the same from the start",
            *(self.config.batch_size, stepper.pieces, self.config.batch_size // stepper.pieces),
            stepper.pieces * self.config.accumulate,
        )
        return None

    def _save(self) -> None:
        """A checkpoint, where there are files."""
        if self.checkpoints is None:
            return
        extra = {"means": self.stepper.means.state, "course": self.course.state}
        timed = self.clock.part("checkpoint")
        with self.log.paused(), self.course.closing("checkpoint"), timed:
            self.checkpoints.save(self.course.step, extra)

    def _batches(self) -> Iterator[Batch]:
        """Endless batches on the device, from the first of the step to come on."""
        config, accelerator = self.config, self.accelerator
        first = self.course.step * config.accumulate
        numbers = BatchNumbers(first, accelerator.process_index, accelerator.num_processes)
        return load(self.data.sized(config.batch_size), numbers, accelerator.device, config.workers)

    def _validate(self, *, again: bool = False) -> None:
        """Validate and export with averaged weights, on the main process."""
        out, step = self.config.out, self.course.step
        with self.log.paused(), self.course.closing("validation"), self.average.applied():
            if self.accelerator.is_main_process:
                with self.clock.part("validation"), self.accelerator.autocast():
                    scores = self.stage.validate(step, out / "sheets")
                if self.checkpoints is not None:
                    with self.clock.part("export"):
                        self._export(self.checkpoints)
                if not again:
                    with self.clock.part("validation"):
                        self.log.validated(step, scores)
                        draw_curves([out], out / "curves.png")
            self.accelerator.wait_for_everyone()
        if self.checkpoints is None:
            self.kept = self.average.copied()

    def _export(self, checkpoints: Checkpoints) -> None:
        exported = self.exported
        try:
            with checkpoints.writing() as folder:
                self.stage.export(folder / exported.name, self.provenance)
                if self.stage.check is not None:
                    self.stage.check(folder / exported.name)
                (folder / exported.name).replace(exported)
        except (OSError, SafetensorError) as error:
            raise write_failure(self.config.out, exported.name, error) from error


def _start_accelerate(config: LoopConfig) -> Accelerator:
    # Else a second stage in this process could not have another precision.
    AcceleratorState._reset_state()
    return Accelerator(
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
