"""The detail path by itself, at toy width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diff_restorer import DetailConfig, DetailPath
from diff_restorer.local import LocalPooled

CONFIG = DetailConfig((8, 12, 16), (1, 2, 1, 1, 1), (4, 6, 8), context_width=10, kinds=3)


def detail_path() -> DetailPath:
    """With no layer at zero, and heads that go by the first three channels of P_D."""
    torch.manual_seed(0)
    path = DetailPath(CONFIG).requires_grad_(False)
    nn.init.normal_(path.out.weight, std=0.1)
    nn.init.eye_(path.kind.weight)
    nn.init.zeros_(path.kind.bias)
    return path


def test_shrinkage_and_tone_go_by_kinds() -> None:
    path: Any = detail_path()
    path.toned.weight[0, 1], path.thresholds[1].weight[:, 2] = 5, 5
    path.out.weight.zero_()
    none, tone, noise = (path.condition(sure_of(*k), torch.rand(1, 51)) for k in ((), (1,), (2,)))
    photo = torch.rand(1, 3, 32, 48)
    assert torch.equal(path.shrunk(photo, none), photo)
    assert torch.equal(path.shrunk(photo, tone), photo)
    assert not torch.equal(path.shrunk(photo, noise), photo)
    assert not run(path, none).any()
    assert run(path, tone).any()


def run(path: DetailPath, condition: Tensor | LocalPooled) -> Tensor:
    """What it adds to a photo of 32 x 48 pixels."""
    torch.manual_seed(1)
    sizes = {level: (2 * level + 2, 32 >> level, 48 >> level) for level in (1, 2, 3)}
    encoded = {level: torch.randn(1, *size) for level, size in sizes.items()}
    return path(torch.rand(1, 3, 32, 48), encoded, encoded, condition)


def sure_of(*kinds: int) -> Tensor:
    """Pooled P_D that is sure of these kinds, and that there are no others."""
    pooled = torch.full((1, CONFIG.context_width), -100.0)
    pooled[:, list(kinds)] = 100.0
    return pooled


def test_sizes_are_read_back_from_weights() -> None:
    assert DetailConfig.from_state_dict(DetailPath(CONFIG).state_dict()) == CONFIG


def test_a_head_counts_where_its_kind_is() -> None:
    path, tone = detail_path(), torch.rand(1, 51)
    conditions = [path.condition(sure_of(*kinds), tone) for kinds in ((), (1,), (0, 2))]
    before = [run(path, condition) for condition in conditions]
    assert not before[0].any()
    path.out.weight[12:24] *= 2  # the second head
    path.out.bias[12:24] *= 2
    after = [run(path, condition) for condition in conditions]
    torch.testing.assert_close(after[1], 2 * before[1])
    assert torch.equal(after[2], before[2])


def test_heads_go_by_the_place() -> None:
    path, tone = detail_path(), torch.rand(1, 51)
    tiles = torch.stack([sure_of(), sure_of(1)], dim=2)[:, :, None]  # (1, C, 1 row, 2 columns)
    columns = torch.zeros(2, 6)
    columns[0, :3], columns[1, 3:] = 1, 1
    local = path.condition(LocalPooled(tiles, torch.ones(1, 4), columns), tone)
    found = run(path, local)
    assert not found[..., :24].any()
    assert found[..., 24:].any()
