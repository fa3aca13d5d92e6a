"""The training loop: exact resume, EMA, interruption, full disks and losses that are not finite."""

from __future__ import annotations

import csv
import importlib
import itertools
import logging
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import tomllib
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diff_restorer.checkpoint import CheckpointInfo, CheckpointKeysError, write_checkpoint
from training.average import Average
from training.checkpoints import compare_file
from training.course import learning_rate
from training.errors import DiskError, NonFiniteError, ResumeError
from training.loop import Stage, run
from training.plots import draw_curves, read_curves
from training.progress import Means, Table, read_table

from .toys import TIMED, Points, config, same, stage, untimed


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("step_*"))


def stopped(out: Path, batch: int = 6, **changes: object) -> None:
    """A run that ends without warning at its `batch`-th batch."""
    with pytest.raises(KeyboardInterrupt):
        run(stage(stop_at=batch), Points(), config(out, **changes))


@pytest.mark.parametrize(("log_every", "muon"), [(1, 0.0), (4, 0.0), (1, 0.5)])
def test_stop_and_resume_equals_a_straight_run_bit_for_bit(
    tmp_path: Path, log_every: int, muon: float
) -> None:
    changes = {"steps": 9, "log_every": log_every, "validate_every": 3, "muon": muon}
    straight = run(stage(), Points(), config(tmp_path / "straight", **changes))
    stopped(tmp_path / "resumed", **changes)
    assert checkpoints(tmp_path / "resumed") == ["step_0000002", "step_0000004"]
    before = untimed(tmp_path / "resumed" / "metrics.csv")
    assert before[-1]["step"] == {1: "5", 4: "4"}[log_every]  # step 5 will come again
    resumed = run(stage(), Points(), config(tmp_path / "resumed", **changes))
    assert same(load_file(straight), load_file(resumed))
    for name in ("metrics.csv", "validation.csv"):
        assert untimed(straight.parent / name) == untimed(resumed.parent / name)
    assert [row["step"] for row in read_table(straight.parent / "validation.csv")] == list("369")


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(stage(), Points(), config(tmp_path))
    weights, rows = load_file(first), (tmp_path / "metrics.csv").read_text()
    assert run(stage(stop_at=1), Points(), config(tmp_path)) == first
    first.unlink()
    assert same(load_file(run(stage(stop_at=1), Points(), config(tmp_path))), weights)
    assert (tmp_path / "metrics.csv").read_text() == rows
    assert len(read_table(tmp_path / "validation.csv")) == 1


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    """Up to rounding and dropout's and noise's own numbers, which come per batch."""
    seen = {}
    for size, accumulate in ((2, 4), (8, 1)):
        watched = stage()
        watched.loss = mock.Mock(wraps=watched.loss)
        settings = config(tmp_path / str(size), steps=2, batch_size=size, accumulate=accumulate)
        run(watched, Points(), settings)
        seen[size] = torch.cat([call.args[0]["x"] for call in watched.loss.call_args_list])
    assert torch.equal(seen[2], seen[8])


def test_the_exported_weights_are_the_average_and_not_the_last(tmp_path: Path) -> None:
    fitted = stage()
    averaged = load_file(run(fitted, Points(), config(tmp_path)))
    live = fitted.trainable.state_dict()
    assert not torch.equal(averaged["0.weight"], live["0.weight"])
    torch.testing.assert_close(averaged["0.weight"], live["0.weight"], atol=0.1, rtol=0)


def test_a_part_can_wait_for_its_turn(tmp_path: Path) -> None:
    waiting = stage()
    first, told = waiting.trainable.get_parameter("0.weight"), list[int]()
    start = first.detach().clone()
    kept: list[bool] = []

    def begin_step(step: int) -> None:
        told.append(step)
        kept.append(torch.equal(first, start))
        first.requires_grad_(step >= 3)

    waiting.begin_step = begin_step
    run(waiting, Points(), config(tmp_path, accumulate=2))
    assert told == list(range(6))
    assert kept == [True, True, True, True, False, False]


def test_the_average_is_the_formula() -> None:
    module = nn.Linear(2, 1, bias=False)
    average = Average(module, 0.75)
    values = [torch.full((1, 2), float(value)) for value in (3, 7, 1)]
    for value in values:
        module.weight.data.copy_(value)
        average.update()
    expected = 0.75 * (0.75 * values[0] + 0.25 * values[1]) + 0.25 * values[2]
    with average.applied():
        assert torch.equal(module.weight.data, expected)
    assert torch.equal(module.weight.data, values[2])
    assert module.weight.requires_grad


@pytest.mark.parametrize("bad", ["loss", "gradient", "input", "weight"])
def test_what_is_not_finite_is_named(tmp_path: Path, bad: str) -> None:
    broken = stage(scale=float("nan") if bad == "loss" else 1.0)
    data = Points()
    expected = "step 0: loss is not finite; lower --loop.lr"
    if bad == "gradient":
        # The square root's slope at 0 is infinite, and 0 times that is NaN.
        model = cast(nn.Sequential, broken.trainable)
        bias = cast(nn.Linear, model[3]).bias
        broken.loss = lambda batch, _: {
            "loss": model(batch["x"]).square().mean() + (0 * bias).sqrt().sum()
        }
        expected = r"step 0: gradient of 3\.bias is not finite"
    elif bad == "input":
        data.__class__ = type(
            "Broken", (Points,), {"sample": lambda s, i: torch.full((4,), torch.inf)}
        )
        expected = "step 0: loss.* is not finite, and input x, y is not: look at the data"
    elif bad == "weight":
        broken.trainable.get_parameter("0.weight").data[0, 0] = torch.nan
        expected = r"step 0: loss.* is not finite, and weight 0\.weight is not"
    with pytest.raises(NonFiniteError, match=expected):
        run(broken, data, config(tmp_path))
    assert not checkpoints(tmp_path)


def test_terms_that_say_nothing_are_left_out_of_the_mean(tmp_path: Path) -> None:
    run(stage(), Points(), config(tmp_path, batch_size=1, steps=8))
    rows = read_table(tmp_path / "metrics.csv")
    assert {row["even"] == "" for row in rows} == {True, False}
    assert all(row["even"] in ("", row["loss"]) for row in rows)
    means = Means()
    means.add("a", 0.0, 0)
    assert means.take()["a"] != means.take().get("a", 0)  # NaN, then nothing


def test_terms_without_gradient_are_not_blamed(tmp_path: Path) -> None:
    broken = stage(scale=float("nan"))
    with pytest.raises(NonFiniteError, match="step 0: loss is not finite"):
        run(broken, Points(), config(tmp_path, batch_size=1))  # `even` may be NaN, too


def test_a_run_goes_on_with_another_accumulation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 1, which is no multiple of the new number of batches per step."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(stage(stop_at=2), Points(), config(out, checkpoint_every=1))
    before = load_file(out / "step_0000001" / "model.safetensors")["trainable.0.weight"]
    with caplog.at_level(logging.WARNING, "training"):
        run(stage(), Points(), config(out, batch_size=1, accumulate=2, checkpoint_every=1))
    assert "accumulate 1 -> 2; batch_size 2 -> 1" in caplog.text
    for step in (5, 6):
        after = load_file(out / f"step_{step:07d}" / "model.safetensors")["trainable.0.weight"]
        assert not torch.equal(before, after)
        before = after


def test_opponents_are_limited_apart(tmp_path: Path) -> None:
    """A side with small gradients keeps them, whatever the other's are."""
    sides = nn.ModuleList([nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)])
    small, large = sides

    def loss(batch: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        return {"loss": (0.01 * small(batch["x"]) + 1000 * large(batch["x"])).mean()}

    def export(path: Path, _: dict[str, Any]) -> None:
        save_file(sides.state_dict(), path)

    playing = Stage(sides, loss, lambda *_: {"x": 0.0}, export, opponents=(small, large))
    run(playing, Points(), config(tmp_path, steps=1))
    moments = torch.load(tmp_path / "step_0000001" / "optimizer.bin")["state"]
    first, second = (float(moments[place]["exp_avg"].norm()) * 10 for place in (0, 1))
    assert second == pytest.approx(1, rel=1e-3)  # `clip`
    assert 0.001 < first < 0.1


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest"])
def test_an_unreadable_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    straight = run(stage(), Points(), config(tmp_path / "straight"))
    out = tmp_path / "damaged"
    stopped(out)
    newest = out / "step_0000004"
    if damage == "cut":
        with (newest / "optimizer.bin").open("r+b") as file:
            file.truncate(1000)
    else:
        (newest / {"missing": "model.safetensors", "no manifest": "state.json"}[damage]).unlink()
    with caplog.at_level(logging.INFO, "training"):
        resumed = run(stage(), Points(), config(out))
    assert f"{newest} cannot be read" in caplog.text
    assert "at step 2" in caplog.text
    assert same(load_file(straight), load_file(resumed))
    assert untimed(straight.parent / "metrics.csv") == untimed(out / "metrics.csv")
    assert (out / "step_0000004.unreadable").exists()


def test_without_any_readable_checkpoint_nothing_is_overwritten(tmp_path: Path) -> None:
    stopped(tmp_path)
    for folder in tmp_path.glob("step_*"):
        (folder / "state.json").write_text("{")
    with pytest.raises(ResumeError, match=r"none of step_0000002, step_0000004 can be read"):
        run(stage(), Points(), config(tmp_path))
    assert checkpoints(tmp_path) == ["step_0000002", "step_0000004"]


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    straight = run(stage(), Points(), config(tmp_path / "straight"))
    out = tmp_path / "killed"
    stopped(out)
    shutil.copytree(out / "step_0000004", out / "writing")
    (out / "writing" / "model.safetensors").write_bytes(b"half")
    assert same(load_file(straight), load_file(run(stage(), Points(), config(out))))


def test_changed_settings_are_named_when_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path)
    with caplog.at_level(logging.WARNING, "training"):
        run(stage(), Points(), config(tmp_path, lr=0.02, steps=8, validate_every=4))
    warning = next(text for text in caplog.messages if "other settings" in text)
    assert warning.endswith("other settings: lr 0.01 -> 0.02")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_state_and_says_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    straight = run(stage(), Points(), config(tmp_path / "straight"))
    out, interrupted = tmp_path / "interrupted", stage()
    loss, before = interrupted.loss, signal.getsignal(number)
    batches = itertools.count(1)

    def loss_and_signal(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        if next(batches) == 3:
            os.kill(os.getpid(), number)
        return loss(batch, generator)

    interrupted.loss = loss_and_signal
    with pytest.raises(SystemExit) as end:
        run(interrupted, Points(), config(out))
    assert end.value.code == 128 + number
    # The signal came during step 3, whose end was the next moment to look.
    assert "interrupted at step 4 of 6" in caplog.text
    assert "the same command goes on" in caplog.text
    assert checkpoints(out)[-1] == "step_0000004"
    assert signal.getsignal(number) is before
    assert same(load_file(straight), load_file(run(stage(), Points(), config(out))))


def test_a_gradient_norm_limit_of_zero_is_none(tmp_path: Path) -> None:
    files = [run(stage(), Points(), config(tmp_path / str(c), clip=c)) for c in (0.0, 1e9, 1e-3)]
    free, wide, tight = map(load_file, files)
    assert same(free, wide)
    assert not same(free, tight)


def test_minutes_make_checkpoints_due(tmp_path: Path) -> None:
    stopped(tmp_path, checkpoint_every=100, checkpoint_minutes=1e-9)
    assert checkpoints(tmp_path) == ["step_0000004", "step_0000005"]


def test_too_little_disk_is_said_before_anything_is_done(tmp_path: Path) -> None:
    big = stage()
    # Four petabytes in the state, in four bytes of memory.
    big.trainable.big = nn.Parameter(torch.zeros(1).expand(10**15))
    with pytest.raises(DiskError, match=r"checkpoints need \d+\.\d\d GB, but \d+\.\d\d GB are"):
        run(big, Points(), config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The system refuses files above a size, with the same sort of error as a full disk."""
    straight = run(stage(), Points(), config(tmp_path / "straight"))
    out = tmp_path / "full"
    stopped(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(DiskError, match=f"{out}: could not write the checkpoint of step 6"):
            run(stage(), Points(), config(out, validate_every=100, steps=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(out) == ["step_0000002", "step_0000004"]
    assert not (out / "writing").exists()
    assert same(load_file(straight), load_file(run(stage(), Points(), config(out))))


def test_an_export_that_reads_back_differently_ends_the_run(tmp_path: Path) -> None:
    wrong = stage()
    model = wrong.trainable
    wrong.export = lambda path, _: save_file(
        {k: v + 1 for k, v in model.state_dict().items()}, path
    )
    with pytest.raises(ValueError, match=r"export\.safetensors: reads back other"):
        run(wrong, Points(), config(tmp_path))
    assert not (tmp_path / "export.safetensors").exists()
    assert not (tmp_path / "writing").exists()


def test_a_file_is_compared_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"control.x": torch.rand(3), "control.y": torch.rand(2)}
    write_checkpoint(path, tensors, CheckpointInfo(types=("noise",), base_model="nano", clip={}))
    compare_file(path, tensors)
    with pytest.raises(ValueError, match=r"a\.safetensors: reads back other .*\(control\.x\)"):
        compare_file(
            path, tensors | {"control.x": tensors["control.x"].nextafter(torch.tensor(2.0))}
        )
    with pytest.raises(CheckpointKeysError, match=r"missing: control\.z"):
        compare_file(path, tensors | {"control.z": torch.zeros(1)})


def test_the_run_folder_holds_settings_logs_and_curves(tmp_path: Path) -> None:
    run(stage(), Points(), config(tmp_path, seed=3, steps=4, log_every=2, validate_every=3))
    settings = tomllib.loads((tmp_path / "config.toml").read_text())
    assert settings["loop"]["seed"] == 3
    rows = read_table(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert list(rows[0]) == ["step", "loss", "even", "grad_norm", "lr", *TIMED]
    assert float(rows[0]["samples_per_s"]) > 0
    assert 0 <= float(rows[0]["wait_share"]) <= 1
    assert 0.01 < float(rows[0]["peak_gb"]) < 100
    assert float(rows[1]["eta_s"]) == 0
    assert [row["step"] for row in read_table(tmp_path / "validation.csv")] == ["3", "4"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    curves = read_curves(tmp_path)
    assert curves["metrics", "lr"][0] == [2, 4]
    assert ("validation", "weight") in curves
    draw_curves([tmp_path, tmp_path], tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text().count("validation: weight") == 1
    with pytest.raises(ValueError, match=r"found no metrics\.csv; give run folders"):
        draw_curves([tmp_path / "sheets"], tmp_path / "none.png")


def test_a_missing_tensorboard_is_named_before_training(tmp_path: Path) -> None:
    try:
        importlib.import_module("tensorboard")
    except ImportError:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            run(stage(), Points(), config(tmp_path, tensorboard=True))
    else:
        run(stage(), Points(), config(tmp_path, tensorboard=True))
        assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_table_drops_later_and_torn_rows_and_takes_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,x\n1,5\n2,6\n3,7\n4")
    table = Table(path, last_step=2)
    table.append({"step": 3, "y": 8})
    with path.open() as file:
        assert list(csv.reader(file)) == [
            ["step", "x", "y"], ["1", "5", ""], ["2", "6", ""], ["3", "", "8"],
        ]  # fmt: skip
    assert Table(path, last_step=9).path.read_text() == path.read_text()


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [learning_rate(step, 100, 10, decay=True) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate(90, 100, 100, decay=False) == pytest.approx(0.91)
    assert learning_rate(0, 5, 0.15, decay=True) == 1.0  # less than the first second of a box
