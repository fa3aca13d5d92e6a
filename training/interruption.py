"""Ctrl-C and SIGTERM as a request to stop after the present step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class Interruption:
    """Within a `with` block, the first signal is noted; the next one acts as it always did."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came; 0 before."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        log.warning("%s: stopping after this step", signal.Signals(number).name)


def leave_group(_: int = 0) -> None:
    """For data processes: Ctrl-C, `timeout` and `accelerate launch` signal the process group, and
    the main process needs its data until it has saved. Signals to this very process still act."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
