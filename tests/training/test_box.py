"""Time boxes: all inside the box, what is left after a kill, and boxes that are too short."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import loop
from training.course import WARMUP_SHARE, WARMUP_STEPS, Rhythm
from training.errors import NonFiniteError
from training.loop import Stage, fit, run
from training.progress import read_table

from .toys import Points, config, same, stage


class HandClock:
    """Seconds that only a test moves, so that no other work makes a box late."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """Stands for `time.perf_counter`."""
    clock = HandClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def slow(
    clock: HandClock,
    step: float = 0.05,
    validations: tuple[float, ...] = (0.0,),
    at_step: Callable[[int], None] | None = None,
) -> Stage:
    """The toy stage, whose steps take so many seconds, as do its first validations and the rest."""
    made = stage()
    loss, validate = made.loss, made.validate
    seen = looks = 0

    def slow_loss(batch: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
        nonlocal seen
        seen += 1
        clock.seconds += step
        if at_step is not None:
            at_step(seen)
        return loss(batch, generator)

    def slow_validate(number: int, folder: Path) -> dict[str, float]:
        nonlocal looks
        clock.seconds += validations[min(looks, len(validations) - 1)]
        looks += 1
        return validate(number, folder)

    made.loss, made.validate = slow_loss, slow_validate
    return made


def boxed(made: Stage, out: Path, seconds: float, **changes: Any) -> Path:
    return run(made, Points(), config(out, steps=0, minutes=seconds / 60, **changes))


def told(out: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the box."""
    newest = max(out.glob("step_*"))
    return json.loads((newest / "state.json").read_text())["extra"]["course"]


def test_validation_export_and_checkpoint_are_inside_the_box(
    tmp_path: Path, clock: HandClock
) -> None:
    boxed(slow(clock, validations=(2.0, 3.0)), tmp_path, 12)
    assert 11 < clock.seconds <= 12
    rows = read_table(tmp_path / "metrics.csv")
    validations = [row["step"] for row in read_table(tmp_path / "validation.csv")]
    assert validations == ["0", rows[-1]["step"]]
    assert (tmp_path / f"step_{int(rows[-1]['step']):07d}").exists()
    left = [float(row["eta_s"]) for row in rows]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0


def test_the_learning_rate_goes_by_time(tmp_path: Path, clock: HandClock) -> None:
    boxed(slow(clock, 0.02), tmp_path, 8, lr=1.0, warmup=10**9)
    rows = read_table(tmp_path / "metrics.csv")
    rates = [float(row["lr"]) for row in rows]
    peak = rates.index(max(rates))
    assert peak == max(WARMUP_STEPS, round(8 * WARMUP_SHARE / 0.02)) - 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01
    spent = [8 - float(row["eta_s"]) for row in rows[:-1]]
    half = next(place for place, seconds in enumerate(spent) if seconds > spent[-1] / 2)
    assert rates[half] == pytest.approx(0.5, abs=0.03)


def test_an_interrupted_box_has_the_time_that_was_left(tmp_path: Path, clock: HandClock) -> None:
    def interrupt(step: int) -> None:
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        boxed(slow(clock, at_step=interrupt), tmp_path, 9)
    assert told(tmp_path)["seconds"] == pytest.approx(21 * 0.05)  # the next step was agreed on
    boxed(slow(clock), tmp_path, 9)
    assert 7.5 < clock.seconds <= 9
    assert told(tmp_path)["ended"] == pytest.approx(9)


def test_a_killed_box_goes_on_from_its_last_checkpoint(
    tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GAP_SECONDS", 0.0)

    def kill(step: int) -> None:
        if step == 15:
            raise KeyboardInterrupt

    rhythm = {"checkpoint_every": 10, "validate_every": 1000}
    with pytest.raises(KeyboardInterrupt):
        boxed(slow(clock, at_step=kill), tmp_path, 9, **rhythm)
    assert (tmp_path / "step_0000010").exists()
    assert told(tmp_path)["seconds"] == pytest.approx(0.5)
    clock.seconds = 0.0
    boxed(slow(clock), tmp_path, 9, **rhythm)
    assert 7 < clock.seconds <= 8.5


def test_a_box_of_the_past_is_not_trained_again_but_a_longer_one_goes_on(
    tmp_path: Path, clock: HandClock
) -> None:
    boxed(slow(clock), tmp_path, 8)
    last = max(tmp_path.glob("step_*"))
    boxed(stage(stop_at=1), tmp_path, 8)
    assert max(tmp_path.glob("step_*")) == last
    boxed(slow(clock), tmp_path, 12)
    assert max(tmp_path.glob("step_*")) > last


def test_a_box_validates_and_saves_at_most_once_a_minute(tmp_path: Path, clock: HandClock) -> None:
    often = {"checkpoint_every": 1, "validate_every": 1, "validate_minutes": 1e-9}
    boxed(slow(clock, 5.0), tmp_path, 220, **often)
    rows = read_table(tmp_path / "validation.csv")
    assert [row["step"] for row in rows] == ["0", "13", "26", "39", "43"]
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_0000039", "step_0000043"}


def test_minutes_make_validations_due_where_steps_are_counted(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=3, validate_every=100, validate_minutes=1e-9)
    run(stage(), Points(), settings)
    assert [row["step"] for row in read_table(tmp_path / "validation.csv")] == list("123")


def test_a_rhythm_keeps_its_gap() -> None:
    assert Rhythm(2, 0).due(4)
    assert not Rhythm(2, 0).due(5)
    assert Rhythm(2, 1e-9).due(5)
    assert not Rhythm(2, 1e-9, gap=60).due(4)


def test_a_box_too_short_for_one_step_says_what_to_give(tmp_path: Path, clock: HandClock) -> None:
    with pytest.raises(ValueError, match=r"--loop\.minutes 0\.00833333: too short") as error:
        boxed(slow(clock, 0.5), tmp_path, 0.5)
    found = re.search(r"one step took 0\.5 s.*give at least (\d\.?\d*)$", str(error.value))
    assert found is not None
    clock.seconds, enough = 0.0, 60 * float(found[1])
    boxed(slow(clock, 0.5), tmp_path, enough)
    assert clock.seconds <= enough
    assert len(read_table(tmp_path / "metrics.csv")) > 20


def test_in_memory_the_weights_become_the_average_and_no_file_is_between(tmp_path: Path) -> None:
    settings = config(tmp_path / "files", steps=9)
    exported = load_file(run(stage(), Points(), settings))
    kept = stage()
    spent = fit(kept, Points(), config(tmp_path / "memory", steps=9))
    assert same(kept.trainable.state_dict(), exported)
    names = {path.name for path in (tmp_path / "memory").iterdir()}
    assert names == {"config.toml", "metrics.csv", "validation.csv", "curves.png"}
    assert (spent.steps, spent.samples) == (9, 18)
    parts = {"data", "forward and backward", "optimizer", "validation"}
    assert spent.parts.keys() == parts
    assert 0 < sum(spent.parts.values()) < spent.seconds


def test_an_error_in_memory_costs_no_more_than_since_the_last_validation(tmp_path: Path) -> None:
    def bad_from(step: int) -> Stage:
        made = stage()
        loss, seen = made.loss, 0

        def broken(batch: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
            nonlocal seen
            seen += 1
            terms = loss(batch, generator)
            return terms | {"loss": terms["loss"] * (torch.nan if seen > step else 1)}

        made.loss = broken
        return made

    expected = stage()
    fit(expected, Points(), config(tmp_path / "good", steps=6, validate_every=3, decay=False))
    broken = bad_from(8)
    with pytest.raises(NonFiniteError, match="step 8: loss is not finite"):
        fit(broken, Points(), config(tmp_path / "bad", steps=99, validate_every=3, decay=False))
    assert same(broken.trainable.state_dict(), expected.trainable.state_dict())


class Counted(Points):
    """Points that say which part each is, as photos do."""

    def finish(self, item: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return super().finish(item, device) | {"part": torch.arange(self.batch_size)}


def test_a_batch_without_room_is_halved_once_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps stay those of whole batches, also where the first of a step had room."""

    def plain(room: int, lucky: int = 0) -> Stage:
        model, seen = nn.Linear(4, 1), 0
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.zero_()

        def loss(batch: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
            nonlocal seen
            seen += 1
            if seen > lucky and len(batch["x"]) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"loss": (model(batch["x"]) - batch["y"]).square().mean()}

        def export(path: Path, _: dict[str, Any]) -> None:
            save_file(model.state_dict(), path)

        return Stage(model, loss, lambda *_: {"x": 0.0}, export)

    settings = {"batch_size": 8, "accumulate": 2, "workers": 1}
    whole = load_file(run(plain(8), Counted(), config(tmp_path / "whole", **settings)))
    with caplog.at_level(logging.WARNING, "training"):
        halved = load_file(run(plain(2), Counted(), config(tmp_path / "halved", **settings)))
    told = [line for line in caplog.messages if line.startswith("out of memory")]
    assert len(told) == 2
    assert told[-1].endswith(
        "each batch of 8 is computed in 4 pieces from now on; --loop.batch-size 2 with "
        "--loop.accumulate 8 would do the same from the start"
    )
    torch.testing.assert_close(halved, whole, rtol=0, atol=1e-6)
    late = load_file(run(plain(4, lucky=1), Counted(), config(tmp_path / "late", **settings)))
    torch.testing.assert_close(late, whole, rtol=0, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        run(plain(0), Counted(), config(tmp_path / "none", **settings))
