"""What Ray costs: `tools.restore --ray` with actors that sleep in place of ComfyUI, or with it.

python -m benchmarks.cluster [--photos 100000] [--actors 2] [--seconds 0] [--ray local]
python -m benchmarks.cluster --photos 101 --restore

The first prints photos, wall seconds, CPU seconds of this process and the memory that it holds, as
it goes. The second restores small photos on one local server and on one actor, ten by ten in turn,
so that what else a machine does slows both; then on two actors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image

if "--ray" not in sys.argv:  # local: as in tools.restore, before Ray is imported
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from tools import cluster, restore
from tools.batch import Batch, Options, Server
from tools.host import Host
from tools.jobs import Job, plan
from tools.restoration import NANO_WORKFLOW, with_preset
from tools.workflow import Workflow, load_workflow

ROWS = 20
"""That are printed."""
SIDE = 64
BLOCK = 10


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


def sleep(count: int, actors: int, seconds: float, address: str) -> None:
    """Gives names to actors that sleep."""
    options = restore.parse([".", "--ray", address, "--actors", str(actors), str(actors)])
    options.per_node = actors  # however few cores there are
    begun, cpu = time.monotonic(), time.process_time()
    lines = cluster.Actors(Sleeper, (seconds,), options).stream(list_names, count=count)
    made = (line for line in lines if line["status"] != "listed")
    for done, _ in enumerate(islice(made, count), 1):
        if done == 1:
            begun, cpu = time.monotonic(), time.process_time()
        if done in (1, count) or done % max(1, count // ROWS) == 0:
            wall, used = time.monotonic() - begun, time.process_time() - cpu
            memory = psutil.Process().memory_info().rss // 10**6
            tell(f"{done} photos, {wall:.1f} s, CPU {used:.2f} s, {memory} MB")


def on_actors(photos: Path, out: Path, actors: int) -> Iterator[cluster.Line]:
    """Restores photos as they are asked for; nothing is at work between two of them."""
    number = str(actors)
    options = restore.parse([str(photos), "--ray", "local", "--actors", number, number])
    options.per_node = actors
    places = cluster.Place.of(photos), cluster.Place.of(out)
    listing = {"photos": places[0], "out": places[1], "recursive": False}
    restorers = cluster.Actors(cluster.Restorer, (*places, fast(), options), options)
    lines = restorers.stream(cluster.list_photos, **listing)
    return (line for line in lines if line["status"] != "listed")


def fast() -> Workflow:
    return with_preset(load_workflow(NANO_WORKFLOW), "fast")


def timed(lines: Callable[[], list[cluster.Line]]) -> float:
    """Seconds that it takes to restore some photos, all of which have to be."""
    begun = time.monotonic()
    for line in lines():
        if line["status"] != "done":
            raise RuntimeError(f"{line['source']}: {line['error']}")
    return time.monotonic() - begun


def compare(count: int, folder: Path) -> None:
    """Restores the same photos on a local server and on one actor, in turn; then on two."""
    photos, noise = folder / "photos", np.random.default_rng(0)
    photos.mkdir()
    for index in range(count):
        picture = Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        picture.save(photos / f"{index:05}.png")
    jobs = plan([photos], folder / "local")
    local, one = list[float](), list[float]()
    with Host() as host:
        made = on_actors(photos, folder / "one", 1)

        def on_host(block: Sequence[Job]) -> list[cluster.Line]:
            Batch([Server(host.url)], fast(), block, Options()).run()
            return [job.report() for job in block]

        for block in [jobs[:1], *(jobs[at : at + BLOCK] for at in range(1, count, BLOCK))]:
            local.append(timed(lambda block=block: on_host(block)) / len(block))
            one.append(timed(lambda block=block: list(islice(made, len(block)))) / len(block))
    del local[0], one[0], made  # the first of each is slow; its actor makes room
    overhead = statistics.median(b / a for a, b in zip(local, one, strict=True)) - 1
    tell(f"local server: {statistics.mean(local):.3f} s per photo in {len(local)} blocks")
    tell(f"one actor: {statistics.mean(one):.3f} s per photo, {overhead:+.1%} in the median block")
    made = on_actors(photos, folder / "two", 2)
    timed(lambda: list(islice(made, BLOCK)))
    two = timed(lambda: list(islice(made, count - BLOCK))) / (count - BLOCK)
    tell(
        f"two actors: {two:.3f} s per photo, {statistics.mean(one) / two:.2f} times as fast as one"
    )


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--ray", default="local")
    parser.add_argument("--restore", action="store_true", help="with ComfyUI")
    given = parser.parse_args()
    with cluster.connected(given.ray):
        if given.restore:
            with TemporaryDirectory() as folder:
                compare(given.photos, Path(folder))
        else:
            sleep(given.photos, given.actors, given.seconds, given.ray)


if __name__ == "__main__":
    main()
