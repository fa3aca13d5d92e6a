"""Muon: gradient steps whose directions all count alike."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from diff_restorer.native import has_native_bf16

_MOMENTUM, _FLOOR = 0.95, 1e-12
_QUINTIC = 3.4445, -4.7750, 2.0315
"""Coefficients of one step of the Newton-Schulz iteration that takes singular values to about 1."""


class Muon(torch.optim.Optimizer):
    """Momentum with all singular values of each weight's step at about one.

    For weights between features, such as those of convs in the middle of a network, which count as
    matrices of (outputs, inputs * height * width). AdamW moves what is left.

    Source: Muon (https://kellerjordan.github.io/posts/muon/); step sizes that AdamW's learning
    rates fit as in Moonlight (arXiv 2502.16982), where `size` is 0.2.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, size: float, weight_decay: float = 0.0
    ) -> None:
        """Takes weights of two dimensions or more.

        Args:
            size: Root mean square of a step, in units of `lr`; AdamW's are 0.2 to 0.4.
            weight_decay: As AdamW's.
        """
        super().__init__(params, {"lr": lr, "size": size, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    step = self._direction(weight, weight.grad) * group["size"]
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-group["lr"])

    def _direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Of Nesterov's momentum, with a root mean square of about 1."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        matrix = orthogonalized(gradient.lerp(momentum, _MOMENTUM).flatten(1))
        return matrix.reshape(weight.shape) * max(matrix.shape) ** 0.5


@functools.cache
def _dtype(device: torch.device) -> torch.dtype:
    # Emulated, bf16 took 17 times as long as fp32 (192 x 1,728), and most of a step.
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix (N, M) with singular values of 0.7 to 1.2 in place of its own; computed in bf16
    where the device computes in it.

    Singular values below a thousandth of the Frobenius norm stay smaller.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(_dtype(matrix.device))
    x = x / (x.norm() + _FLOOR)
    a, b, c = _QUINTIC
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
