"""The exponential moving average (EMA) of the weights, which is what is validated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averages of a module's trainable parameters.

    `torch.optim.swa_utils.AveragedModel` copies the whole module, frozen parts and all; this one
    keeps the tensors alone and takes its arithmetic from there.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Starts at the present weights.

        Args:
            module: Without the wrapper of `Accelerator.prepare`, which would be in the names.
            decay: Weight of the past, in [0, 1).
        """
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._averages = {name: live.detach().clone() for name, live in self._live.items()}
        self._blend = get_ema_multi_avg_fn(decay)
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step; the first step's are taken as they are."""
        averages = list(self._averages.values())
        live: list[Tensor] = list(self._live.values())
        if self._updates:
            self._blend(averages, live, self._updates)  # pyright: ignore[reportArgumentType]
        else:
            torch._foreach_copy_(averages, live)
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averages."""
        live = {name: value.detach().clone() for name, value in self._live.items()}
        self.adopt()
        try:
            yield
        finally:
            self.adopt(live)

    @torch.no_grad()
    def copied(self) -> dict[str, Tensor]:
        """The averages as they are now, for `adopt`."""
        return {name: value.clone() for name, value in self._averages.items()}

    @torch.no_grad()
    def adopt(self, averages: Mapping[str, Tensor] | None = None) -> None:
        """The module's weights become the averages, those of now or earlier ones."""
        for name, value in (averages or self._averages).items():
            self._live[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many steps are in them."""
        return {"updates": self._updates, "averages": self._averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._updates = int(state["updates"])
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])
