"""Muon: steps whose directions all count alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.loop import run
from training.muon import Muon, orthogonalized

from .toys import Points, config, same, stage


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = 1e-3 * torch.randn(shape, generator=generator)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 2
    turned = u.T @ orthogonalized(matrix) @ v.T
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.3
    assert (turned - turned.diagonal().diag()).abs().max() < 0.05  # of bf16


def test_a_step_is_as_large_as_told_and_goes_against_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.01, size=0.5).step()
    step = weight.detach().clone()
    assert float(step.square().mean().sqrt()) == pytest.approx(0.005, rel=0.2)
    assert float((step * weight.grad).sum()) < 0
    weight.grad = None
    Muon([weight], lr=0.01, size=0.5).step()
    assert torch.equal(weight, step)


def test_only_hidden_weights_move_otherwise(tmp_path: Path) -> None:
    def trained(muon: float) -> dict[str, torch.Tensor]:
        toy = stage()
        run(toy, Points(), config(tmp_path / str(muon), steps=1, muon=muon, ema=0.0))
        return toy.trainable.state_dict()

    with_adamw, with_muon = trained(0.0), trained(0.5)
    differ = {name for name, value in with_adamw.items() if not value.equal(with_muon[name])}
    assert differ == {"0.weight"}


def test_where_a_stage_has_no_such_weights_adamw_moves_all(tmp_path: Path) -> None:
    toy = replace(stage(), hidden=())
    run(toy, Points(), config(tmp_path / "without", steps=1, muon=0.5, ema=0.0))
    expected = stage()
    run(expected, Points(), config(tmp_path / "adamw", steps=1, ema=0.0))
    assert same(toy.trainable.state_dict(), expected.trainable.state_dict())
