"""Seconds and bytes."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diff_restorer.native import has_native_bf16


def on_gpu() -> bool:
    """Whether the host will compute on a GPU."""
    return torch.cuda.is_available()


def computes_bf16() -> bool:
    """Whether the device does so in hardware."""
    return has_native_bf16(torch.device("cuda" if on_gpu() else "cpu"))


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes, with all work of the device done."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a busy machine slows all alike.

    Args:
        functions: Name -> what to measure; each runs once before, to warm up.
        rounds: Measured calls of each.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """Most memory in use while the `with` block ran, beyond what was in use before.

    On a GPU what torch allocated there; else the process's own pages, looked at every few
    milliseconds. Pages of mapped files do not count: the system takes them back when it likes.
    """

    gb: float
    """Of the finished block, in 10^9 bytes."""

    def __enter__(self) -> PeakMemory:
        self._before, self._peak = self._used(), 0
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if on_gpu():
            _wait()
            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
        self.gb = max(0, self._peak - self._before) / 1e9

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._used())

    @staticmethod
    def _used() -> int:
        if on_gpu():
            return torch.cuda.memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
