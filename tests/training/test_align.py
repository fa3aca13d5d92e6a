"""New eyes for networks that were trained on old ones."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diff_restorer.prompt_processor import PromptProcessor, PromptProcessorConfig
from training.nano.align import fit, fold


def near_identity(width: int) -> torch.Tensor:
    return torch.eye(width) + 0.2 * torch.randn(width, width) / width**0.5


def test_the_map_is_found() -> None:
    torch.manual_seed(0)
    matrix, offset, inputs = near_identity(8), torch.randn(8), torch.randn(500, 8)
    found, shift = fit(inputs, inputs @ matrix.T + offset, ridge=0.0)
    assert torch.allclose(found, matrix, atol=1e-4)
    assert torch.allclose(shift, offset, atol=1e-4)


def test_a_strong_ridge_is_the_identity() -> None:
    inputs = torch.randn(500, 8)
    found, _ = fit(inputs, torch.randn(500, 8), ridge=1e6)
    assert torch.allclose(found, torch.eye(8), atol=1e-3)


def test_drifted_tokens_are_read_as_before() -> None:
    """Tokens and P_D move by affine maps; P_S, P_D and the logits come out as before."""
    torch.manual_seed(0)
    prompt: Any = PromptProcessor(PromptProcessorConfig(8, 12, 6, 3)).requires_grad_(False)
    old, tokens = copy.deepcopy(prompt), torch.randn(40, 5, 8)
    token_map, pd_map = (near_identity(8), torch.randn(8)), (near_identity(6), torch.randn(6))
    drifted = tokens @ torch.linalg.inv(token_map[0]).T - token_map[1]  # what the new encoder gives
    first, last = prompt.degradation[0], prompt.degradation[-1]
    first.weight.copy_(first.weight @ token_map[0])
    first.bias.copy_(first.bias + first.weight @ token_map[1])
    last.weight.copy_(pd_map[0] @ last.weight)
    last.bias.copy_(pd_map[0] @ last.bias + pd_map[1])
    inverse = torch.linalg.inv(pd_map[0])
    prompt.classifier.weight.copy_(prompt.classifier.weight @ inverse)
    prompt.classifier.bias.copy_(prompt.classifier.bias - prompt.classifier.weight @ pd_map[1])

    before, moved = old(tokens), prompt(drifted)
    assert torch.allclose(moved.logits, before.logits, atol=1e-4)
    assert not torch.allclose(moved.degradation, before.degradation, atol=0.1)
    fold(
        prompt,
        fit(drifted.flatten(0, 1), tokens.flatten(0, 1), 0.0),
        fit(moved.degradation.flatten(0, 1), before.degradation.flatten(0, 1), 0.0),
    )
    after = prompt(drifted)
    assert torch.allclose(after.semantic, before.semantic, atol=1e-3)
    assert torch.allclose(after.degradation, before.degradation, atol=1e-3)
    assert torch.allclose(after.logits, before.logits, atol=1e-3)
