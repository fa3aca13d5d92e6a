"""The training loop: exact resume, EMA, and losses that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from training.loop import LoopConfig, NonFiniteError, Stage, learning_rate, run


class Points(Dataset[dict[str, Tensor]]):
    """Sample i is a function of i."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": x.sum(dim=0, keepdim=True)}


def config(out: Path, **changes: Any) -> LoopConfig:
    settings = {
        "steps": 6, "batch_size": 2, "lr": 1e-2, "warmup": 2, "precision": "no", "workers": 0,
        "checkpoint_every": 2, "validate_every": 3, "ema": 0.5,
    }  # fmt: skip
    return LoopConfig(out=out, **(settings | changes))


def stage(stop_at: int | None = None, scale: float = 1.0) -> Stage:
    """A linear fit with noise from the step's generator; stops like a killed process."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    seen = 0

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(batch["y"].shape, generator=generator)
        return {"loss": scale * (model(batch["x"]) + noise - batch["y"]).square().mean()}

    def export(path: Path, settings: dict[str, Any]) -> None:
        torch.save(model.state_dict(), path)

    return Stage(model, loss, lambda step, folder: {"score": step}, export)


def test_stop_and_resume_equals_a_straight_run_bit_for_bit(tmp_path: Path) -> None:
    straight = torch.load(run(stage(), Points(), config(tmp_path / "straight")))
    with pytest.raises(KeyboardInterrupt):
        run(stage(stop_at=6), Points(), config(tmp_path / "resumed"))
    assert [path.name for path in sorted((tmp_path / "resumed").glob("step_*"))] == [
        "step_0000002",
        "step_0000004",
    ]
    resumed = torch.load(run(stage(), Points(), config(tmp_path / "resumed")))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_the_exported_weights_are_the_average_and_not_the_last(tmp_path: Path) -> None:
    fitted = stage()
    averaged = torch.load(run(fitted, Points(), config(tmp_path)))
    assert not torch.equal(averaged["weight"], fitted.trainable.state_dict()["weight"])
    torch.testing.assert_close(
        averaged["weight"], fitted.trainable.state_dict()["weight"], atol=0.1, rtol=0
    )


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 0: loss is not finite"):
        run(stage(scale=float("nan")), Points(), config(tmp_path))


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    straight = torch.load(run(stage(), Points(), config(tmp_path / "straight")))
    with pytest.raises(KeyboardInterrupt):
        run(stage(stop_at=6), Points(), config(tmp_path / "killed"))
    (tmp_path / "killed" / "writing").mkdir()
    (tmp_path / "killed" / "writing" / "model.safetensors").write_bytes(b"half")
    resumed = torch.load(run(stage(), Points(), config(tmp_path / "killed")))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_the_run_folder_holds_its_settings(tmp_path: Path) -> None:
    run(stage(), Points(), config(tmp_path, seed=3))
    settings = tomllib.loads((tmp_path / "config.toml").read_text())
    assert settings["loop"]["seed"] == 3
    assert (tmp_path / "validation.csv").read_text().splitlines()[0] == "step,score"


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = LoopConfig(out=Path(), steps=100, warmup=10)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate(90, LoopConfig(out=Path(), decay=False)) == pytest.approx(0.91)
