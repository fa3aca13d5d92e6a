"""Time boxes: all inside the box, what is left after a kill, and boxes that are too short."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from training import loop
from training.course import WARMUP_SHARE, Rhythm
from training.loop import Stage, run
from training.progress import read_table

from .toys import Points, config, stage

SLACK = 1.5
"""Seconds that this machine may lose to other work."""


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def slow(step: float = 0.0, validation: float = 0.0, at_step: Callable[[int], None] | None = None):
    """The toy stage, whose steps and validations take at least so many seconds."""
    made = stage()
    loss, validate = made.loss, made.validate
    seen = 0

    def slow_loss(batch: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
        nonlocal seen
        seen += 1
        time.sleep(step)
        if at_step is not None:
            at_step(seen)
        return loss(batch, generator)

    def slow_validate(number: int, folder: Path) -> dict[str, float]:
        time.sleep(validation)
        return validate(number, folder)

    made.loss, made.validate = slow_loss, slow_validate
    return made


def boxed(made: Stage, out: Path, seconds: float, **changes: Any) -> Path:
    return run(made, Points(), config(out, steps=0, minutes=seconds / 60, **changes))


def told(out: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the box."""
    newest = max(out.glob("step_*"))
    return json.loads((newest / "state.json").read_text())["extra"]["course"]


def test_validation_export_and_checkpoint_are_inside_the_box(tmp_path: Path) -> None:
    taken = timed(lambda: boxed(slow(0.05, validation=2), tmp_path, 7))
    assert 5 < taken < 7 + SLACK
    rows = read_table(tmp_path / "metrics.csv")
    validations = [row["step"] for row in read_table(tmp_path / "validation.csv")]
    assert validations == ["0", rows[-1]["step"]]
    assert (tmp_path / f"step_{int(rows[-1]['step']):07d}").exists()
    left = [float(row["eta_s"]) for row in rows]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0


def test_the_learning_rate_goes_by_time(tmp_path: Path) -> None:
    boxed(slow(0.02), tmp_path, 3, lr=1.0, warmup=10**9)
    rows = read_table(tmp_path / "metrics.csv")
    rates = [float(row["lr"]) for row in rows]
    peak = rates.index(max(rates))
    assert 3 - float(rows[peak]["eta_s"]) < 3 * WARMUP_SHARE + 1.5  # the opening comes before it
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.1
    spent = [3 - float(row["eta_s"]) for row in rows[:-1]]
    half = next(place for place, seconds in enumerate(spent) if seconds > spent[-1] / 2)
    assert rates[half] == pytest.approx(0.5, abs=0.15)


def test_an_interrupted_box_has_the_time_that_was_left(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    def first() -> None:
        with pytest.raises(SystemExit):
            boxed(slow(0.05, at_step=interrupt), tmp_path, 4)

    before = timed(first)
    assert 1 < told(tmp_path)["seconds"] < before
    after = timed(lambda: boxed(slow(0.05), tmp_path, 4))
    assert 3 < before + after < 4 + 2 * SLACK
    assert told(tmp_path)["ended"] == pytest.approx(4)


def test_a_killed_box_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GAP_SECONDS", 0.0)

    def kill(step: int) -> None:
        if step == 15:
            raise KeyboardInterrupt

    rhythm = {"checkpoint_every": 10, "validate_every": 1000}
    with pytest.raises(KeyboardInterrupt):
        boxed(slow(0.05, at_step=kill), tmp_path, 6, **rhythm)
    assert (tmp_path / "step_0000010").exists()
    spent = told(tmp_path)["seconds"]
    assert 0.5 < spent < 3
    assert timed(lambda: boxed(slow(0.05), tmp_path, 6, **rhythm)) < 6 - spent + SLACK


def test_a_box_of_the_past_is_not_trained_again_but_a_longer_one_goes_on(tmp_path: Path) -> None:
    boxed(stage(), tmp_path, 2)
    last = max(tmp_path.glob("step_*"))
    boxed(stage(stop_at=1), tmp_path, 2)
    assert max(tmp_path.glob("step_*")) == last
    boxed(stage(), tmp_path, 3)
    assert max(tmp_path.glob("step_*")) > last


def test_a_box_validates_and_saves_at_most_once_a_minute(tmp_path: Path) -> None:
    boxed(stage(), tmp_path, 2, checkpoint_every=1, validate_every=1, validate_minutes=1e-9)
    assert len(read_table(tmp_path / "validation.csv")) == 2
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_minutes_make_validations_due_where_steps_are_counted(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=3, validate_every=100, validate_minutes=1e-9)
    run(stage(), Points(), settings)
    assert [row["step"] for row in read_table(tmp_path / "validation.csv")] == list("123")


def test_a_rhythm_keeps_its_gap() -> None:
    assert Rhythm(2, 0).due(4)
    assert not Rhythm(2, 0).due(5)
    assert Rhythm(2, 1e-9).due(5)
    assert not Rhythm(2, 1e-9, gap=60).due(4)


def test_a_box_too_short_for_one_step_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--loop\.minutes 0\.00833333: too short") as error:
        boxed(slow(0.5), tmp_path, 0.5)
    found = re.search(r"one step took (\d\.\d) s.*give at least (\d\.?\d*)$", str(error.value))
    assert found is not None
    assert float(found[1]) == pytest.approx(0.5, abs=0.3)
    enough = 60 * float(found[2])
    assert timed(lambda: boxed(slow(0.5), tmp_path, enough)) < enough + SLACK
    assert len(read_table(tmp_path / "metrics.csv")) > 5
