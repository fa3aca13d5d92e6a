"""Names what became NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn


def describe(
    step: int,
    parts: list[dict[str, Tensor]],
    learned: Set[str],
    batch: dict[str, Tensor],
    module: nn.Module,
    updated: bool = False,
) -> str:
    """Name what is not finite on this process: its causes where they can be seen, too.

    Args:
        step: Of the run.
        parts: The terms of each batch.
        learned: Terms with a gradient; others may be NaN where a batch says nothing of them.
        batch: The last one.
        module: What trains.
        updated: Whether its weights have taken the step in, so that they are to blame for nothing.
    """

    def bad(tensors: Iterator[tuple[str, Tensor | None]]) -> list[str]:
        bad = [n for n, t in tensors if t is not None and not torch.isfinite(t).all()]
        return [*bad[:3], *(["..."] if len(bad) > 3 else [])]

    wrong = [n for n in parts[0] if not all(torch.isfinite(part[n]).all() for part in parts)]
    terms = [name for name in wrong if name in learned]
    gradients = bad((n, p.grad) for n, p in module.named_parameters())
    inputs = bad(iter(batch.items()))
    weights = [] if updated else bad((n, p.detach()) for n, p in module.named_parameters())
    if "loss" in terms:
        what = ", ".join(terms)
    else:
        what = f"gradient of {', '.join(gradients) or 'a parameter, on another process,'}"
    why = "; lower --loop.lr or raise --loop.warmup"
    if weights:
        why = f", and weight {', '.join(weights)} is not"
    if inputs:
        why = f", and input {', '.join(inputs)} is not: look at the data"
    return f"step {step}: {what} is not finite{why}. Checkpoints are from before it."
