"""The exponential moving average (EMA) of the weights, which is what is validated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averages of a module's trainable parameters; sharded as the parameters are.

    `torch.optim.swa_utils.AveragedModel` copies the module, which a module sharded by FSDP forbids;
    this one keeps the tensors alone and takes its arithmetic from there.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Starts at the present weights.

        Args:
            module: As `Accelerator.prepare` returned it.
            decay: Weight of the past, in [0, 1).
        """
        self._module = module
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._averages = {name: live.detach().clone() for name, live in self._live.items()}
        self._blend = get_ema_multi_avg_fn(decay)
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step; the first step's are taken as they are."""
        averages = [_local(value) for value in self._averages.values()]
        live = [_local(value) for value in self._live.values()]
        if self._updates:
            self._blend(averages, live, self._updates)  # pyright: ignore[reportArgumentType]
        else:
            torch._foreach_copy_(averages, live)
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averages, whole where they are sharded; all processes must enter."""
        whole = {id(self._live[n]): _whole(value) for n, value in self._averages.items()}
        changed: list[tuple[nn.Module, str, nn.Parameter]] = []
        for owner in self._module.modules():
            for name, live in owner._parameters.items():
                if live is not None and (id(live) in whole or isinstance(live, DTensor)):
                    value = whole[id(live)] if id(live) in whole else _whole(live.detach())
                    changed.append((owner, name, live))
                    owner._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            yield
        finally:
            for owner, name, live in changed:
                owner._parameters[name] = live

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
        """Whole tensors; all processes must call it."""
        averages = {name: _whole(value) for name, value in self._averages.items()}
        return {"updates": self._updates, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._updates = int(state["updates"])
        for name, average in self._averages.items():
            value = state["averages"][name]
            if isinstance(average, DTensor):
                value = distribute_tensor(
                    value.to(average.device), average.device_mesh, average.placements
                )
            average.copy_(value)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
