"""What the restore program says: a progress bar, and a line for each photo."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from tools.batch import Event
from tools.ending import printable, say
from tools.jobs import SUFFIXES, Job

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def tell_others(folder: object, counts: Mapping[str, int]) -> None:
    """Says which pictures of a folder are left out, by their endings."""
    if counts:
        listed = ", ".join(f"{count} {ending}" for ending, count in counts.items())
        say(f"{folder}: {listed} left out. Save them as one of {' '.join(SUFFIXES)}")


def summarise(counts: Counter[str]) -> str:
    done, failed = f"{counts['done']} restored", f"{counts['failed']} failed"
    return f"{done}, {counts['skipped']} done before, {failed}."


class Display:
    """A progress bar over all photos, and a line for each; the bar only on a terminal.

    How many there are is ``None`` if nobody knows yet.
    """

    def __init__(self, total: int | None) -> None:
        self.shares: dict[int, float] = {}
        """Of each photo that is with a server: how much is done."""
        self.settled = 0
        self.bar = tqdm(
            total=total,
            bar_format=None if total is None else BAR,
            unit=" photos",
            dynamic_ncols=True,
            disable=None,
        )

    def show(self, event: Event) -> None:
        if event.text:
            self.write(event.text, sys.stderr)
        job = event.job
        if job is None:
            return
        if event.progress:
            share = event.progress.step / max(event.progress.steps, 1)
            # Nodes count one after another; the longest count is the sampler's.
            self.shares[id(job)] = max(share, self.shares.get(id(job), 0.0))
        else:
            self.shares.pop(id(job), None)
            self.settled += 1
            self.tell(job)
        done = self.settled + sum(self.shares.values())
        self.bar.n = min(done, self.bar.total or done)
        self.bar.set_description(f"{self.settled}/{self.bar.total or '?'} photos")

    def tell(self, job: Job) -> None:
        """Writes the line of a settled photo."""
        if job.status == "failed":
            error = str(job.error)
            named = "" if str(job.source) in error else f"{job.source}: "
            self.write(f"error: {named}{error}", sys.stderr)
        elif job.status == "done":
            seen = f", seen as {job.kind}" if job.kind else ""
            notes = "".join(f"; {note}" for note in job.notes)
            self.write(f"{job.output} ({job.seconds:.1f} s{seen}){notes}", sys.stdout)

    def write(self, text: str, stream: Any) -> None:
        self.bar.write(printable(text, stream), file=stream)
