"""What goes wrong in the middle of a run, as the host says it; imported by tests, not before it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import pytest
from torch import nn


@contextmanager
def interrupted_at(module: nn.Module) -> Generator[None]:
    """The user stops the run as this module is evaluated, and the run ends by that."""

    def interrupt(*_: Any) -> None:
        comfy.model_management.interrupt_current_processing()

    handle = module.register_forward_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            yield
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)


@contextmanager
def out_of_memory_at(module: nn.Module, times: float = 1) -> Generator[None]:
    """The device has no memory for this module the first `times` that it is evaluated."""
    failures = 0

    def fail(*_: Any) -> None:
        nonlocal failures
        failures += 1
        if failures <= times:
            raise comfy.model_management.OOM_EXCEPTION("toy")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
