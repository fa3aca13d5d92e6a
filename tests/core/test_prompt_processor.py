"""Prompt Processor: shapes, structure of the branches, sizes read back from weights."""

import pytest
import torch
from torch import nn

from diff_restorer import PromptProcessor, PromptProcessorConfig

CONFIGS = [
    PromptProcessorConfig(clip_width=24, hidden_width=16, context_width=12, num_types=3),
    PromptProcessorConfig(clip_width=40, hidden_width=32, context_width=64, num_types=9),
    PromptProcessorConfig(clip_width=8, hidden_width=48, context_width=8, num_types=2),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_are_read_back_from_weights(config: PromptProcessorConfig) -> None:
    state = PromptProcessor(config).state_dict()
    assert PromptProcessorConfig.from_state_dict(state) == config


def test_branches_have_the_layers_of_the_paper() -> None:
    processor = PromptProcessor(CONFIGS[0])
    linear_norm_act = [nn.Linear, nn.LayerNorm, nn.LeakyReLU]
    assert [type(m) for m in processor.semantic] == [*linear_norm_act, *linear_norm_act, nn.Linear]
    assert [type(m) for m in processor.degradation] == [*linear_norm_act, nn.Linear]


def test_outputs_have_the_documented_shapes_and_pooling() -> None:
    processor = PromptProcessor(CONFIGS[0])
    output = processor(torch.randn(2, 5, 24))
    assert output.semantic.shape == output.degradation.shape == (2, 5, 12)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.pooled, output.degradation.mean(dim=1))
    torch.testing.assert_close(output.logits, processor.classifier(output.pooled))


def test_kinds_exclude_each_other_or_do_not() -> None:
    output = PromptProcessor(CONFIGS[0])(torch.randn(2, 5, 24))
    output = output._replace(logits=torch.tensor([[3.0, 3.0, -3.0]]))
    torch.testing.assert_close(output.probabilities(), output.logits.softmax(dim=1))
    assert output.probabilities("bce").gt(0.9).tolist() == [[True, True, False]]


def test_samples_of_a_batch_do_not_mix() -> None:
    processor = PromptProcessor(CONFIGS[0])
    tokens = torch.randn(3, 5, 24)
    together = processor(tokens)
    for index in range(3):
        alone = processor(tokens[index : index + 1])
        torch.testing.assert_close(alone.semantic[0], together.semantic[index])
        torch.testing.assert_close(alone.logits[0], together.logits[index])


def test_every_branch_gets_gradient_from_its_own_output_only() -> None:
    processor = PromptProcessor(CONFIGS[0])
    processor(torch.randn(2, 5, 24)).logits.sum().backward()
    assert all(p.grad is None for p in processor.semantic.parameters())
    assert all(p.grad is not None and p.grad.any() for p in processor.degradation.parameters())
    processor(torch.randn(2, 5, 24)).semantic.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in processor.semantic.parameters())


def test_views_of_each_photo_are_averaged() -> None:
    processor = PromptProcessor(CONFIGS[0])
    output = processor(torch.randn(6, 5, 24))
    photos = output.over_views(2)
    assert torch.equal(photos.semantic, output.semantic)
    for index in range(2):
        views = slice(3 * index, 3 * index + 3)
        torch.testing.assert_close(photos.degradation[index], output.degradation[views].mean(dim=0))
        torch.testing.assert_close(photos.logits[index], output.logits[views].mean(dim=0))
    torch.testing.assert_close(photos.pooled, photos.degradation.mean(dim=1))
    torch.testing.assert_close(photos.logits, processor.classifier(photos.pooled))
