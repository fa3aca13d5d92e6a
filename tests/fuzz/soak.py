"""Mixed prompts on one server for long: python -m tests.fuzz.soak [--prompts 1000] [--out DIR].

Restorations of several sizes with several nodes, some of which fail or are interrupted. Each kind
of restoration comes again and again and is to give the very same picture. Prints how many differ
and how the server's memory grows; draws it to soak.png and writes soak.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from tests.e2e.graph import Graph, Runner, make_photo
from tools.client import Progress
from tools.ending import in_words
from tools.errors import ExecutionError, PromptInterruptedError, PromptRejectedError
from tools.host import Host, exit_on_termination

PROCESSOR, CONTROL = "DiffRestorerPromptProcessor", "DiffRestorerDegradationControl"
DECODE = "DiffRestorerAwareVAEDecode"
SIZES = ((64, 64), (96, 72), (72, 96), (130, 70), (160, 128))
FAIL, INTERRUPT = 0.15, 0.15
"""Shares of the prompts."""
WARM = 0.2
"""Share at the beginning in which memory may still grow: caches and the allocator fill."""


@dataclass
class Record:
    """What happened."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    different: list[str] = field(default_factory=list)
    """Restorations that gave another picture than before."""
    memory: list[float] = field(default_factory=list)
    """GB of the server after each prompt; not-a-number where the system does not tell."""

    @property
    def slope(self) -> float:
        """GB in 1000 prompts, once warm."""
        used = np.array(self.memory[int(WARM * len(self.memory)) :])
        told = np.flatnonzero(~np.isnan(used))
        return float(np.polyfit(told, used[told], 1)[0] * 1000) if len(told) > 1 else 0.0


class Soak:
    """Prompts by chance, on a server with the pack."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self.runner, self.random, self.record = runner, Random(seed), Record()
        self.photos = [
            runner.upload(make_photo(*size, seed=number), f"soak {number}.png")
            for number, size in enumerate(SIZES)
        ]
        self.known: dict[str, str] = {}

    def step(self) -> None:
        """One prompt."""
        name, graph = self._restoration()
        chance = self.random.random()
        if chance < FAIL:
            self._fail(graph)
        elif chance < FAIL + INTERRUPT:
            self._interrupt(graph)
        else:
            self._restore(name, graph)
        self.record.memory.append(self.runner.host.memory() or float("nan"))

    def _restoration(self) -> tuple[str, Graph]:
        """One of some dozens, and its name."""
        photo, seed = self.random.choice(self.photos), self.random.randrange(2)
        steps, change = self.random.choice([1, 3]), self.random.choice(list(CHANGES))
        graph = Graph.load(photo=photo).set("KSampler", seed=seed, steps=steps)
        CHANGES[change](graph)
        return f"{photo}, {change}, {steps} steps, seed {seed}", graph

    def _restore(self, name: str, graph: Graph) -> None:
        (picture,) = self.runner.pictures(graph)
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        self.record.repeats += name in self.known
        if self.known.setdefault(name, digest) != digest:
            self.record.different.append(name)
        self.record.outcomes["restored"] += 1

    def _fail(self, graph: Graph) -> None:
        node, name, value = self.random.choice(FAULTS)
        try:
            self.runner.run(graph.set(node, **{name: value}))
        except (ExecutionError, PromptRejectedError):
            self.record.outcomes["refused"] += 1
        else:
            raise RuntimeError(f"{node} took {value} as {name}")

    def _interrupt(self, graph: Graph) -> None:
        """In the sampler, or a little later."""
        wanted = graph.node(self.random.choice(["KSampler", DECODE]))

        def cancel(progress: Progress) -> None:
            if progress.node == wanted:
                self.runner.client.cancel(progress.prompt_id)

        graph.set("KSampler", steps=8, seed=self.random.randrange(10**6))
        try:
            self.runner.run(graph, cancel)
            self.record.outcomes["done before its interrupt"] += 1
        except PromptInterruptedError:
            self.record.outcomes["interrupted"] += 1


def tile(graph: Graph) -> list[Any]:
    """Sample in tiles; the link to their degradation, which the decode has, too."""
    nano, read = graph.node("DiffRestorerNanoLoader"), graph.node(PROCESSOR)
    tiled = graph.add("DiffRestorerTiledDiffusion", model=[nano, 0], degradation=[read, 2],
                      tile_size=64, overlap=16, locality=1.0)  # fmt: skip
    graph.set("KSampler", model=[tiled, 0])
    graph.set(DECODE, degradation=[tiled, 2])
    return [tiled, 2]


def edit(graph: Graph, degradation: list[Any], weight: float, *readers: str) -> None:
    """Mix noise into a degradation on its way to the nodes of these classes."""
    edited = graph.add("DiffRestorerEditDegradation", degradation=degradation, type="noise",
                       mode="mix", weight=weight)  # fmt: skip
    for reader in readers:
        graph.set(reader, degradation=[edited, 0])


CHANGES: dict[str, Callable[[Graph], Any]] = {
    "plain": lambda graph: None,
    "guided": lambda graph: graph.set("KSampler", cfg=2.0),
    "not abstaining": lambda graph: graph.set("DiffRestorerNanoLoader", abstain=False),
    "exact tiles": lambda graph: graph.set(DECODE, tile_size=64),
    "fast tiles": lambda graph: graph.set(DECODE, tile_size=64, overlap=16, tiling="fast"),
    "tiled": tile,
    "edited": lambda graph: edit(graph, [graph.node(PROCESSOR), 2], 0.5, CONTROL, DECODE),
}
FAULTS = (
    (PROCESSOR, "semantic_strength", "nan"),
    (CONTROL, "start_percent", "nan"),
    (DECODE, "tile_size", 65),
    (DECODE, "tiling", "none"),
    ("LoadImage", "image", "nowhere.png"),
    ("KSampler", "sampler_name", "none"),
)


def draw(record: Record, path: Path) -> None:
    """The server's memory over the prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(record.memory, linewidth=0.8)
    repeats = f"{record.repeats} repeats, {len(record.different)} different"
    slope = f"{record.slope:+.3f} GB in 1000 prompts"
    axis.set_title(f"{len(record.memory)} prompts, {repeats}, {slope}")
    axis.set_xlabel("prompt")
    axis.set_ylabel("memory of the server, GB")
    axis.set_ylim(bottom=0)
    figure.savefig(path)


@in_words
def main(
    prompts: int = 1000, minutes: float = math.inf, out: Path = Path("soak_out"), seed: int = 0
) -> int:
    """Ends after that many prompts, and after these minutes at the latest."""
    exit_on_termination()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with Host(log=out / "host.log") as host:
        soak = Soak(Runner(host), seed)
        for _ in tqdm(range(prompts), unit="prompt", disable=None):
            if time.monotonic() - begun > 60 * minutes:
                break
            soak.step()
    record = soak.record
    record.seconds = time.monotonic() - begun
    found = vars(record) | {"slope": record.slope}
    (out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(record, out / "soak.png")
    outcomes = ", ".join(f"{count} {what}" for what, count in record.outcomes.items())
    sys.stdout.write(
        f"{len(record.memory)} prompts in {record.seconds:.0f} s: {outcomes}\n"
        f"{record.repeats} repeats, {len(record.different)} different\n"
        f"memory: {record.slope:+.4f} GB in 1000 prompts\n{out / 'soak.png'}\n"
    )
    return 1 if record.different else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
