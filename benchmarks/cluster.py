"""What Ray costs: `tools.restore --ray` with actors that sleep in place of ComfyUI.

python -m benchmarks.cluster [--photos 100000] [--actors 2] [--seconds 0] [--ray local]

Prints photos, wall seconds, CPU seconds of this process and the memory that it holds, as it goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from tools import cluster, restore
from tools.jobs import Job

ROWS = 20
"""That are printed."""


def list_names(count: int) -> Iterator[cluster.Line]:
    """As `cluster.list_photos`, of a folder that is not there."""
    for index in range(count):
        job = Job(Path(f"{index // 1000:05}/photo {index}.jpg"), Path(f"photo {index}.png"))
        yield job.report()
    yield {"status": "listed", "count": count}


class Sleeper:
    """In place of `cluster.Restorer`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def restore(self, line: cluster.Line) -> cluster.Line:
        time.sleep(self.seconds)
        return line | {"status": "done"}


def memory() -> int:
    """MB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 10**6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--ray", default="local")
    given = parser.parse_args()
    actors = str(given.actors)
    options = restore.parse([".", "--ray", given.ray, "--actors", actors, actors])
    cluster.connect(options.ray)
    options.per_node = given.actors  # however few cores there are
    begun, cpu = time.monotonic(), time.process_time()
    made = cluster.Actors(Sleeper, (given.seconds,), options).stream(list_names, count=given.photos)
    for done, _ in enumerate(made, 1):
        if done == 1:
            begun, cpu = time.monotonic(), time.process_time()
        if done in (1, given.photos) or done % max(1, given.photos // ROWS) == 0:
            wall, used = time.monotonic() - begun, time.process_time() - cpu
            sys.stdout.write(f"{done} photos, {wall:.1f} s, CPU {used:.2f} s, {memory()} MB\n")
            sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main()
