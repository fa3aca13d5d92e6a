"""One optimizer step: its batches, its gradients, and what all processes want after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .average import Average
from .clock import Clock
from .data import Batch, seeded, split, to_device
from .errors import NonFiniteError
from .muon import Muon
from .progress import Means

if TYPE_CHECKING:
    from .loop import LoopConfig, Stage

Loss = Callable[[Batch, torch.Generator], dict[str, Tensor]]


class Signs(NamedTuple):
    """What is to happen after a step: by one process, or by any."""

    stop: bool
    """Save and end, as the user asked."""
    save: bool
    look: bool
    """Validate."""
    ends: bool
    """No step fits after it."""


class _LossModule(nn.Module):
    """The trainable module whose forward is the loss: what DDP can synchronise."""

    def __init__(self, trainable: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trainable = trainable
        self._loss = loss

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return self._loss(batch, generator)


class Stepper:
    """What takes the steps of a run.

    On a GPU the update and the next batch are queued before anything of a step is read, so that the
    GPU never waits for the host.
    """

    def __init__(self, accelerator: Accelerator, stage: Stage, config: LoopConfig) -> None:
        """Wraps the stage's module for `accelerator`; raises ValueError where Muon is asked for in
        fp16, whose overflows skip the step of AdamW alone."""
        trainable = stage.trainable
        self._accelerator, self._trainable = accelerator, trainable
        self._lr, self._clip, self._seed = config.lr, config.clip, config.seed
        self._accumulate, self._sides = config.accumulate, stage.opponents or (trainable,)
        self.pieces = 1
        """Parts of a batch that are computed one after the other."""
        on_gpu = accelerator.device.type == "cuda"
        self._ahead = on_gpu and accelerator.scaler is None
        self._next: Batch | None = None
        learned = [p for p in trainable.parameters() if p.requires_grad]
        hidden = stage.hidden if config.muon else ()
        turned = {id(p) for p in hidden}
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for p in learned if id(p) not in turned],
                lr=config.lr,
                weight_decay=config.weight_decay,
                fused=True if on_gpu else None,
            )
        ]
        if hidden:
            if accelerator.scaler is not None:
                raise ValueError(
                    "--loop.muon: not with --loop.precision fp16; give bf16 or no, or --loop.muon 0"
                )
            optimizers.append(Muon(hidden, config.lr, config.muon, config.weight_decay))
        module = _LossModule(trainable, stage.loss)
        self._module, *self._optimizers = accelerator.prepare(module, *optimizers)
        self.average = Average(accelerator.unwrap_model(self._module), config.ema)
        self.clock = Clock(accelerator.device)
        self.means = Means()

    @property
    def lr(self) -> float:
        """Of the last step."""
        return self._optimizers[0].param_groups[0]["lr"]

    def split(self) -> None:
        """Compute half as much of a batch at once from now on, and start the step again."""
        # Not the optimizers': accelerate's keep gradients until the last batch of a step.
        self._trainable.zero_grad(set_to_none=True)
        self.pieces *= 2
        self._accelerator.gradient_accumulation_steps = self._accumulate * self.pieces
        self._next = None

    def take(
        self,
        step: int,
        rate: float,
        batches: Iterator[Batch],
        signs: Signs,
        reached: Callable[[], float],
    ) -> tuple[Signs, float]:
        """Take a step; raises NonFiniteError, which names what is not finite.

        Args:
            step: Its number.
            rate: Learning rate as a share of the peak.
            batches: From its first batch on.
            signs: What this process wants after it.
            reached: Tells the place of the course after it, by this process's clock.

        Returns:
            What any process wants, and the main process's place.
        """
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr * rate
        parts: list[dict[str, Tensor]] = []
        learned: set[str] = set()  # terms that have a gradient
        batch: Batch = {}
        self._accelerator.step = 0  # counts batches, also those of another `accumulate`
        for micro in range(self._accumulate):
            batch = self._batch(batches)
            with self.clock.part("forward and backward"):
                for piece, some in enumerate(split(batch, self.pieces)):
                    terms = self._gradients(some, step, micro, piece)
                    learned |= {name for name, value in terms.items() if value.requires_grad}
                    parts.append({name: value.detach() for name, value in terms.items()})
        with self.clock.part("optimizer"):
            self._accelerator.unscale_gradients()
            norms = [_gradient_norm(side) for side in self._sides]
            reading = _Reading(self._row(parts, norms, signs, reached))
            if self._ahead:
                self._update(norms)
        if self._ahead:
            self._next = self._batch(batches)
        names, count = list(parts[0]), len(parts) * self._accelerator.num_processes
        values, counts, norm_now, signs, place = self._read(reading.wait(), names)
        scaled = self._accelerator.scaler is not None  # fp16 overflows now and then, and skips
        if counts["loss"] < count or not (math.isfinite(norm_now) or scaled):
            reason = _describe(step, parts, learned, batch, self._trainable, updated=self._ahead)
            raise NonFiniteError(reason)
        if not self._ahead:
            with self.clock.part("optimizer"):
                self._update(norms)
            scaler = self._accelerator.scaler
            if scaler is not None and scaler.get_scale() < 1:  # overflows at every scale
                raise NonFiniteError(_describe(step, parts, learned, batch, self._trainable))
        self._trainable.zero_grad(set_to_none=True)
        for name in values:
            self.means.add(name, values[name], counts[name])
        if math.isfinite(norm_now):
            self.means.add("grad_norm", norm_now, 1)
        return signs, place

    def _batch(self, batches: Iterator[Batch]) -> Batch:
        """The next one, which may be there already."""
        if self._next is not None:
            batch, self._next = self._next, None
            return batch
        with self.clock.part("data"):
            try:
                return next(batches)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    "--loop.batch-size: the device has no room to make a batch of this size; give "
                    "a smaller one, with a larger --loop.accumulate"
                ) from error

    def _gradients(self, batch: Batch, step: int, micro: int, piece: int) -> dict[str, Tensor]:
        """Adds those of one piece of a batch; returns its terms."""
        accelerator = self._accelerator
        # The same numbers however a step's batches are shared out to processes.
        place = micro * accelerator.num_processes + accelerator.process_index
        more = (piece,) if self.pieces > 1 else ()
        seed = seeded(self._seed, 2, step, place, *more).initial_seed()
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        with accelerator.accumulate(self._module):
            with accelerator.autocast():
                terms: dict[str, Tensor] = self._module(batch, generator)
            accelerator.backward(terms["loss"])
        return terms

    def _update(self, norms: list[Tensor]) -> None:
        """Limits each side's gradients, whose norms are known, and takes in the step."""
        if self._clip:
            for side, norm in zip(self._sides, norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(side.parameters(), self._clip, norm)
        for optimizer in self._optimizers:
            optimizer.step()
        self.average.update()

    def _row(
        self,
        parts: list[dict[str, Tensor]],
        norms: list[Tensor],
        signs: Signs,
        reached: Callable[[], float],
    ) -> Tensor:
        """Sums and counts of the finite values of each term over all batches and processes, the
        norm, what any process wants, and the place of the main one, which alone tells it."""
        names = list(parts[0])
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
        terms = torch.stack([torch.stack([part[n].float() for n in names]) for part in parts])
        known = terms.isfinite()
        place = reached() if self._accelerator.is_main_process else 0.0
        wishes = torch.tensor([*signs, place])
        wishes = to_device(wishes.pin_memory() if terms.is_cuda else wishes, terms.device)
        row = torch.cat(
            [torch.where(known, terms, 0).sum(dim=0), known.sum(dim=0), norm[None], wishes]
        )
        return cast(Tensor, self._accelerator.reduce(row, "sum"))

    def _read(
        self, row: list[float], names: list[str]
    ) -> tuple[dict[str, float], dict[str, float], float, Signs, float]:
        """Inverse of `_row`."""
        sums, counts = row[: len(names)], row[len(names) : 2 * len(names)]
        norm, *wanted, place = row[2 * len(names) :]
        return (
            dict(zip(names, sums, strict=True)),
            dict(zip(names, counts, strict=True)),
            norm / self._accelerator.num_processes,
            Signs(*(value > 0 for value in wanted)),
            place,
        )


class _Reading:
    """A row of numbers on its way from the device to the host."""

    def __init__(self, row: Tensor) -> None:
        self._row, self._arrived = row, cast(Any, None)
        if row.is_cuda:
            self._row = torch.empty(row.shape, pin_memory=True).copy_(row, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> list[float]:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._row.tolist()


def _gradient_norm(side: nn.Module) -> Tensor:
    """On the side's device, also where it has no gradients yet."""
    gradients = [p.grad for p in side.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).to(next(side.parameters()).device)


def _describe(
    step: int,
    parts: list[dict[str, Tensor]],
    learned: Set[str],
    batch: dict[str, Tensor],
    module: nn.Module,
    updated: bool = False,
) -> str:
    """Name what is not finite on this process: its causes where they can be seen, too.

    Args:
        parts: The terms of each batch.
        learned: Terms with a gradient; others may be NaN where a batch says nothing of them.
        batch: The last one.
        updated: Whether the weights have taken the step in, so that they are to blame for nothing.
    """

    def bad(tensors: Iterator[tuple[str, Tensor | None]]) -> list[str]:
        bad = [n for n, t in tensors if t is not None and not torch.isfinite(t).all()]
        return [*bad[:3], *(["..."] if len(bad) > 3 else [])]

    wrong = [n for n in parts[0] if not all(torch.isfinite(part[n]).all() for part in parts)]
    terms = [name for name in wrong if name in learned]
    gradients = bad((n, p.grad) for n, p in module.named_parameters())
    inputs = bad(iter(batch.items()))
    weights = [] if updated else bad((n, p.detach()) for n, p in module.named_parameters())
    if "loss" in terms:
        what = ", ".join(terms)
    else:
        what = f"gradient of {', '.join(gradients) or 'a parameter, on another process,'}"
    why = "; lower --loop.lr or raise --loop.warmup"
    if weights:
        why = f", and weight {', '.join(weights)} is not"
    if inputs:
        why = f", and input {', '.join(inputs)} is not: look at the data"
    return f"step {step}: {what} is not finite{why}. Checkpoints are from before it."
