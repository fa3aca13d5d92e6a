"""Where the time of a run goes, as the device sees it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds by part. Those of a GPU are between marks on its stream, so that work which is
    queued there counts for the part that queued it; reading them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block for that part; blocks are not nested."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._marks.append((name, first, last))
        self._take(wait=False)

    def seconds(self) -> dict[str, float]:
        """Of each part; waits for what is queued on the device."""
        self._take(wait=True)
        return dict(self._seconds)

    def _take(self, *, wait: bool) -> None:
        while self._marks and (wait or self._marks[0][2].query()):
            name, first, last = self._marks.popleft()
            if wait:
                last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1000
