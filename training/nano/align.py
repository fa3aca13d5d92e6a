"""Give a finished Nano new eyes: `python -m training.nano.align --help`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import DataConfig, ModelConfig, checkpoint_info, home, open_data, open_models
from ..config import run_program, settings
from ..models import clip_tokens

log = logging.getLogger(__name__)
Affine = tuple[Tensor, Tensor]
"""Matrix (D, D) and offset (D,): x -> x @ matrix.T + offset."""


@dataclass(frozen=True)
class Config:
    """Join a trained-on vision encoder with networks that were trained on the one before.

    Tokens and P_D of the new encoder drift from those that UNet, control and decoder have learnt to
    read. A linear map back, fitted by least squares on training samples, is multiplied into the
    first layer of the semantic branch, and into the last one of the degradation branch, so that
    nothing else has to change; the classifier gets its inverse.
    """

    out: Path
    """File to write: all parts of `old` with the eyes of `new`."""
    old: Path
    """Complete file of Nano."""
    new: Path
    """File of the vision stage, trained on from `old`."""
    data: DataConfig
    samples: int = 1080
    """Degraded photos to fit on, in whole batches."""
    batch_size: int = 36
    """Photos at once."""
    ridge: float = 1e-3
    """How strongly the maps are drawn towards the identity, in units of the tokens' variance."""
    seed: int = 0
    """Of the samples."""


def fit(inputs: Tensor, targets: Tensor, ridge: float) -> Affine:
    """The affine map from inputs to targets, (N, D) each, with the least squared error; `ridge`
    weighs the squared distance between its matrix and the identity."""
    middle_in, middle_out = inputs.mean(0), targets.mean(0)
    x, y = (inputs - middle_in).double(), (targets - middle_out).double()
    weight = ridge * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=torch.double)
    matrix = torch.linalg.solve(x.T @ x + weight, x.T @ y + weight).T
    left = (y - x @ matrix.T).square().sum() / y.square().sum()
    log.info("the map explains %.1f %% of the variance", 100 * (1 - float(left)))
    matrix = matrix.float()
    return matrix, middle_out - matrix @ middle_in


@torch.no_grad()
def fold(prompt: Any, tokens: Affine, degradation: Affine) -> None:
    """Multiply the maps of P_CLIP and of P_D into a `PromptProcessor`."""
    first, last, classifier = prompt.semantic[0], prompt.degradation[-1], prompt.classifier
    matrix, offset = tokens
    _set(first, first.weight @ matrix, first.bias + first.weight @ offset)
    matrix, offset = degradation
    _set(last, matrix @ last.weight, matrix @ last.bias + offset)
    inverse = torch.linalg.solve(matrix.T, classifier.weight.T).T
    _set(classifier, inverse, classifier.bias - inverse @ offset)


def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


@torch.no_grad()
def main(config: Config) -> Path:
    """Look at samples with both encoders, fit, fold and write."""
    old, parts = open_models(ModelConfig(init=(config.old,)))
    new, _ = open_models(ModelConfig(init=(config.old, config.new)))
    new.prompt.semantic.load_state_dict(old.prompt.semantic.state_dict())
    data = replace(config.data, crop=64, crops_per_part=1, validation_samples=1)
    train, _ = open_data(data, old.sizes, config.seed, old.types, {"native_view"})
    train = train.sized(config.batch_size)
    count = -(-config.samples // config.batch_size)
    seen: dict[str, list[Tensor]] = {name: [] for name in ("old", "new", "old P_D", "new P_D")}
    right = torch.zeros(2)
    for batch in (train.finish(train[number], home()) for number in range(count)):
        named = []
        for name, models in (("old", old), ("new", new)):
            tokens = clip_tokens(models.vision, batch["native_view"])
            prompt = models.prompt(tokens)
            # A part of the tokens is enough; the pooled P_D counts as much as all of them.
            some = prompt.degradation[:, ::6]
            pooled = prompt.pooled[:, None].expand_as(some)
            seen[name].append(tokens[:, ::6].flatten(0, 1).cpu())
            seen[f"{name} P_D"].append(torch.cat([some, pooled], 1).flatten(0, 1).cpu())
            named.append(batch["kinds"].gather(1, prompt.logits.argmax(1, keepdim=True))[:, 0] > 0)
        right += torch.stack(named).sum(dim=1).cpu()
        both = torch.logical_and(*named).cpu()  # elsewhere the drift is what training was for
        for name in ("old P_D", "new P_D"):
            whole = seen[name][-1].unflatten(0, (len(both), -1))
            seen[name][-1] = whole[both].flatten(0, 1)
    share = 100 * right / (count * config.batch_size)
    log.info("right: %.1f %% before, %.1f %% now", *share.tolist())
    joined = {name: torch.cat(values) for name, values in seen.items()}
    tokens = fit(joined["new"], joined["old"], config.ridge)
    degradation = fit(joined["new P_D"], joined["old P_D"], config.ridge)
    fold(new.prompt.cpu(), tokens, degradation)
    info = checkpoint_info(new, {"nano.align": settings(config)})
    new.save(config.out, tuple(sorted(parts)), info, torch.float32)
    return config.out


if __name__ == "__main__":
    run_program(main, Config, __doc__)
