"""How a time box is shared out to the stages of Nano."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from .keeping import Slot

SHARES = {
    "autoencoder": 0.10,
    "vision": 0.12,
    "control": 0.20,
    "latents": 0.04,
    "decoder_start": 0.12,
    "decoder": 0.37,
    "export": 0.05,
}
"""Of a box that trains every stage. The decoder decides on quality; stage 1 is good early."""


class Timetable:
    """Hands out the slots of a box one after the other.

    A stage that took longer than its slot takes that from the next one, so that the box is kept;
    what one leaves is not given away, so that every slot stays as long when a run goes on.
    """

    def __init__(self, minutes: float, stages: Sequence[str], began: float) -> None:
        """Begins at `began`, of `time.perf_counter`; with 0 minutes slots have no end. Stages of
        `SHARES` that are not among those named give theirs to the others."""
        self._whole = 60 * minutes
        self._shares = {name: share for name, share in SHARES.items() if name in stages}
        self._end = began

    def minutes(self, name: str) -> float:
        """Length of a stage's slot; 0 is without end."""
        if not self._whole:
            return 0.0
        return self._whole / 60 * self._shares[name] / sum(self._shares.values())

    def slot(self, name: str) -> Slot:
        """The slot of the stage that begins now."""
        now = time.perf_counter()
        if not self._whole:
            return Slot(name, now, math.inf)
        began = min(now, self._end)
        self._end = began + 60 * self.minutes(name)
        return Slot(name, began, self._end)
