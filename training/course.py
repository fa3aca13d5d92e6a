"""How far a run is: counted in steps, or in the seconds of its time box."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .config import LENGTHS

WARMUP_SHARE, WARMUP_STEPS = 0.03, 20
"""Warm-up of a time box: a share of it, but no fewer steps, as AdamW's second moments need some."""
MARGIN, SPARE_SECONDS = 1.25, 1.0
"""What ends a box may take this much longer than last time, as curves have grown since."""
GAP_SECONDS = 60.0
"""A time box validates and saves at most this often."""


def learning_rate(place: float, length: float, warmup: float, decay: bool) -> float:
    """Linear warm-up, then constant, or cosine to zero with `decay`; as a share of the peak.

    What is done (`place`), the `length` of the run and that of its warm-up are in one unit, steps
    or seconds.
    """
    if place < warmup:
        return min(1.0, (place + 1) / warmup)
    if not decay:
        return 1.0
    done = (place - warmup) / max(1, length - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Course:
    """A run of a number of steps: asked before each, told after it; `str` says where it is.

    Clocks of several processes differ. So what this one says of the step to come is a wish, of
    which `advance` is told what all have agreed on.
    """

    unit = "steps"

    def __init__(self, step: int, length: float, warmup: float, decay: bool) -> None:
        """Goes on from `step` steps; `length` and `warmup` as `learning_rate` has them."""
        self.step, self.length = step, length
        self._warmup, self._decay = warmup, decay
        self._start, self._began = step, time.perf_counter()

    def __str__(self) -> str:
        return f"step {self.step} of {self.length}"

    def rate(self) -> float:
        """Learning rate of the step to come, as a share of the peak."""
        return learning_rate(self.place, self.length, self._warmup, self._decay)

    @contextmanager
    def closing(self, what: str) -> Iterator[None]:
        """Around what also ends a run, so that a box knows how long that takes."""
        yield

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside the step (JSON)."""
        return {}

    @property
    def place(self) -> float:
        """What is done, in the unit of `length`; the same for all processes."""
        return self.step

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.length

    def ends(self) -> bool:
        """Whether the step to come is the last."""
        return self.step + 1 >= self.length

    def reached(self) -> float:
        """The place after this step, by this process's clock."""
        return self.step + 1

    def advance(self, ends: bool, place: float) -> None:
        """A step is done, maybe the run (`ends`); `place` is what the main process reached."""
        self.step += 1

    def seconds_left(self) -> float:
        """Until the run is over, as far as that can be foreseen."""
        elapsed = time.perf_counter() - self._began
        return elapsed / max(1, self.step - self._start) * (self.length - self.step)


class TimeCourse(Course):
    """A run of so many minutes, of which validation, export and checkpoint are a part.

    It ends early enough for what comes last, by what that took before; so the run validates and
    saves once before its first step.
    """

    unit = "s"

    def __init__(
        self, minutes: float, decay: bool, step: int, state: Mapping[str, Any], began: float
    ) -> None:
        """Goes on with the time that `state` leaves, from `began` on (of `time.perf_counter`)."""
        length = 60 * minutes
        super().__init__(step, length, WARMUP_SHARE * length, decay)
        self._minutes, self._fresh = minutes, step == 0
        self._spent = float(state.get("seconds", 0.0))
        self._ended = state.get("ended", 0.0) >= length  # of a shorter box: goes on
        self._costs: dict[str, float] = dict(state.get("costs", {}))
        self._began = self._step_began = began
        self._steps: deque[float] = deque(maxlen=8)
        self._place = self._at(self._spent)

    def __str__(self) -> str:
        return f"step {self.step}"

    def rate(self) -> float:
        return min(super().rate(), (self.step + 1) / WARMUP_STEPS)

    @property
    def place(self) -> float:
        return self._place

    @property
    def finished(self) -> bool:
        return self._ended

    @property
    def opened(self) -> bool:
        """Whether it is known how long the end takes."""
        return bool(self._costs)

    def reached(self) -> float:
        return self._at(self._seconds())

    def ends(self) -> bool:
        self._step_began = time.perf_counter()
        longest = max(self._steps, default=0.0)
        # One more step after the next would not fit: the next is the last.
        return self._seconds() + 2 * longest + self._reserve >= self.length

    def advance(self, ends: bool, place: float) -> None:
        """As in general; raises ValueError where the first step of all left no time for the end."""
        self.step += 1
        self._steps.append(time.perf_counter() - self._step_began)
        if self._fresh and self.step == 1 and self._seconds() + self._reserve > self.length:
            enough = 2 * (self._seconds() + self._reserve) + 20 * self._steps[0]
            raise ValueError(
                f"--loop.minutes {self._minutes:g}: too short, nothing was trained: before the "
                f"first step {self._seconds() - self._steps[0]:.1f} s went by, one step took "
                f"{self._steps[0]:.1f} s, the end would take {self._reserve:.1f} s; give at least "
                f"{math.ceil(enough / 6) / 10:g}"
            )
        self._ended = ends or place >= self.length
        self._place = self.length if self._ended else place

    @contextmanager
    def closing(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._costs[what] = time.perf_counter() - began

    @property
    def state(self) -> dict[str, Any]:
        ended = {"ended": self.length} if self._ended else {}
        return {"seconds": self._seconds(), "costs": self._costs, **ended}

    def seconds_left(self) -> float:
        return 0.0 if self.finished else max(0.0, self.length - self._seconds())

    def _seconds(self) -> float:
        return self._spent + time.perf_counter() - self._began

    def _at(self, seconds: float) -> float:
        """The place after so many seconds: at `length` where the end must begin."""
        return self.length * min(1.0, seconds / max(1e-9, self.length - self._reserve))

    @property
    def _reserve(self) -> float:
        return MARGIN * sum(self._costs.values()) + SPARE_SECONDS


class Rhythm:
    """When validation or a checkpoint is due: every so many steps or minutes."""

    def __init__(self, steps: int, minutes: float, gap: float = 0.0) -> None:
        """Counts from now; `minutes` of 0 leave it to the steps, `gap` seconds always pass."""
        self._steps, self._minutes, self._gap = steps, minutes, gap
        self.done()

    def done(self) -> None:
        """It has happened."""
        self._last = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether it is, once `step` steps are done."""
        since = time.perf_counter() - self._last
        return since >= self._gap and (step % self._steps == 0 or 0 < 60 * self._minutes < since)


def require_one_length(steps: int, epochs: float, minutes: float) -> None:
    """Raises ValueError where not one of a run's lengths is given."""
    given = {
        f"--loop.{name} {value:g}"
        for name, value in zip(LENGTHS, (steps, epochs, minutes), strict=True)
        if value > 0
    }
    if len(given) != 1:
        raise ValueError(
            f"{', '.join(f'--loop.{name}' for name in LENGTHS)}: "
            f"found {' and '.join(sorted(given)) or 'none'}; give one of them"
        )
