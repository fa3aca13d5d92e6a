"""Restores a folder of photos on all nodes of a Ray cluster: ``tools.restore --ray``.

A task lists the folder, actors that each keep a ComfyUI restore what it lists, and the lines of
the report come back.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from pyarrow import fs
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from tools.batch import Batch, Event, Options, server_of
from tools.ending import say
from tools.environment import ROOT
from tools.errors import ClientError
from tools.host import Host
from tools.jobs import (
    Job,
    digest_workflow,
    part_twins,
    reserve,
    result_name,
    result_record,
    settle,
    sort_of,
)
from tools.photo_writer import NO_SPACE, PART_PREFIX, OutputError
from tools.terminal import Display, summarise, tell_others
from tools.workflow import Workflow

REPORT_NAME = "diff-restorer-report.jsonl"
FAILED_STARTS = 10
"""Of ComfyUI, one after another on whatever node, that end the run."""
WAITING = 1000
"""Lines that are listed and not yet given out."""
LISTING = {
    "num_cpus": 0,
    "num_returns": "streaming",
    "_generator_backpressure_num_objects": WAITING,
}
NOT_SENT = ["/docs", "/tests"]
"""What no node needs of this repository."""
LOCAL = fs.LocalFileSystem()
Line = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder on any file system that pyarrow knows."""

    uri: str
    """Without password and options, for messages and reports."""
    files: fs.SubTreeFileSystem

    @classmethod
    def of(cls, named: str | Path) -> Place:
        """The place that a path or a URI names; raises `ClientError` if pyarrow cannot open it."""
        if isinstance(named, Path):
            path = os.path.abspath(named)
            return cls(path, fs.SubTreeFileSystem(path, LOCAL))
        scheme = named.partition("://")[0]
        try:
            files, path = fs.FileSystem.from_uri(named)
        except (ValueError, OSError) as error:
            raise ClientError(
                f"a URI with {scheme}:// cannot be opened: {error}. Accepted are paths, file://, "
                "s3:// and gs://"
            ) from error
        return cls(f"{scheme}://{path}".rstrip("/"), fs.SubTreeFileSystem(path, files))

    def name(self, below: str | Path) -> str:
        return f"{self.uri}/{below}"

    def put(self, file: Path, below: Path) -> None:
        """Copies a file there, which appears complete or not at all."""
        part = str(below.with_name(f"{PART_PREFIX}{uuid.uuid4().hex}"))
        self.files.create_dir(str(below.parent))
        try:
            fs.copy_files(str(file), part, LOCAL, self.files)
            self.files.move(part, str(below))
        except BaseException:
            with suppress(OSError):
                self.files.delete_file(part)
            raise


def list_photos(photos: Place, out: Place, *, recursive: bool) -> Iterator[Line]:
    """Yields the photos of a folder as pending lines, then how many; holds one folder at a time.

    Pictures of other endings come as ``left out``, what cannot be read as ``failed``.
    """
    folders, listed = [Path()], 0
    local = photos.files.base_fs.equals(LOCAL)
    while folders:
        folder = folders.pop()
        jobs, faults = list[Job](), list[str]()
        try:
            found = photos.files.get_file_info(fs.FileSelector(str(folder)))
        except OSError as error:
            found = []
            faults.append(f"cannot be read: {error}")
        for info in found:
            try:
                below = folder / info.base_name
            except UnicodeDecodeError as error:
                faults.append(f"has a file whose name is no UTF-8; rename it: {error}")
                continue
            sort = sort_of(below.name)
            if info.type == fs.FileType.File and sort == "photo":
                jobs.append(Job(below, folder / result_name(below)))
            elif info.type == fs.FileType.File and sort == "other":
                yield {"status": "left out", "ending": below.suffix.lower()}
            elif info.type == fs.FileType.Directory and recursive and below.name[0] != ".":
                linked = local and os.path.islink(Path(photos.files.base_path, below))
                if not linked and photos.name(below) != out.uri:
                    folders.append(below)
        part_twins(jobs)
        for fault in faults:
            reason = f"{photos.name(folder)} {fault}"
            jobs.append(Job(folder, folder, "failed", error=reason))
        listed += len(jobs)
        yield from (job.report() for job in sorted(jobs, key=lambda job: job.source))
    yield {"status": "listed", "count": listed}


class Restorer:
    """An actor: a ComfyUI of its own, to which it gives one photo at a time."""

    def __init__(
        self, photos: Place, out: Place, workflow: Workflow, arguments: argparse.Namespace
    ) -> None:
        self.photos, self.out, self.workflow = photos, out, workflow
        self.options = Options(arguments.max_side, arguments.wait, arguments.attempts)
        self.digest = digest_workflow(workflow, arguments.max_side)
        self.overwrite = arguments.overwrite
        self.host = Host(cpu=not arguments.gpu)
        self.host.__enter__()
        atexit.register(self.host.stop)
        self.server = server_of(self.host)
        self.name = f"{ray.get_runtime_context().get_node_id()[:8]} {self.host.url}"

    def restore(self, line: Line) -> Line:
        """Restores the photo of a pending line, unless it is done or no photo."""
        source, output = Path(line["source"]), Path(line["output"])
        try:
            with TemporaryDirectory(prefix="diff-restorer-") as folder:
                job = Job(Path(folder, source.name), Path(folder, "result", output.name))
                job.attempts = line["attempts"]
                job.output.parent.mkdir()
                if not self._restore(job, source, output):
                    return {"status": "result"}
        except (OutputError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_SPACE:
                raise
            return {"status": "full", "error": f"{error} (node {self.name})"}
        if job.error:
            named = job.error.replace(str(job.output), self.out.name(output))
            job.error = named.replace(str(job.source), self.photos.name(source))
        server = self.name if job.attempts > line["attempts"] else None
        return replace(job, source=source, output=output, server=server).report()

    def _restore(self, job: Job, source: Path, output: Path) -> bool:
        """Restores a copy on this node, and sends the result; whether it is a photo at all."""
        what = f"{self.photos.name(source)} cannot be copied to this node"
        try:
            fs.copy_files(str(source), str(job.source), self.photos.files, LOCAL)
            if result_record(job.source) is not None:
                return False
            what = f"{self.out.name(output)} cannot be written"
            there = self.out.files.get_file_info(str(output)).type != fs.FileType.NotFound
            if there and not self.overwrite:
                fs.copy_files(str(output), str(job.output), self.out.files, LOCAL)
            settle(job, self.digest, overwrite=self.overwrite)
            Batch([self.server], self.workflow, [job], self.options).run()
            if job.status == "done":
                self.out.put(job.output, output)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise OutputError(f"{what}: {error}") from error
            job.fail(f"{what}: {error}")
        return True


def shares(per_node: int | None, *, gpu: bool) -> tuple[dict[str, Any], int]:
    """What an actor takes of a node, and how many the cluster holds now.

    On the smallest node are ``per_node``; ``None`` stands for one per GPU, or one per node of CPUs.
    """
    kind = "GPU" if gpu else "CPU"
    nodes = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
    if not any(nodes):
        hint = ", or stop with Ctrl-C and leave out --gpu" if gpu else ""
        say(f"Waiting for room: no node of the cluster has a {kind}. Add one{hint}.")
    smallest = min(filter(None, nodes), default=1)
    share = smallest / (per_node or (smallest if gpu else 1))
    share = int(share) if share > 1 else share  # Ray has no 1.5 GPUs
    return {f"num_{kind.lower()}s": share}, max(1, sum(int(size / share) for size in nodes))


def run(options: argparse.Namespace, workflow: Workflow) -> int:
    """Restores a folder as `tools.restore.run` does, with a report of lines."""
    (named,) = options.photos
    photos, out = Place.of(named), Place.of(options.out)
    if photos.files.get_file_info("").type != fs.FileType.Directory:
        raise ClientError(f"there is no folder {photos.uri}: --ray takes one folder of photos")
    local = isinstance(options.out, Path)
    report = options.report or (options.out / REPORT_NAME if local else Path(REPORT_NAME))
    counts, others = Counter[str](), Counter[str]()
    # Joined first: a report of before is kept where there is no cluster.
    reserved = reserve(options.out) if local else nullcontext()
    with reserved, connected(options.ray), report.open("w") as written:
        display = Display(None)
        try:
            actors = Actors(Restorer, (photos, out, workflow, options), options)
            listing = {"photos": photos, "out": out, "recursive": options.recursive}
            for line in actors.stream(list_photos, **listing):
                status = line["status"]
                counts[status] += line.get("count", 1)
                if status == "full":
                    raise ClientError(line["error"])
                if status == "left out":
                    others[line["ending"]] += 1
                elif status in ("done", "skipped", "failed"):
                    line["source"] = photos.name(line["source"])
                    line["output"] = out.name(line["output"])
                    written.write(f"{json.dumps(line)}\n")
                    written.flush()
                    display.show(Event(job=Job(**line)))
        except RayError as error:
            raise ClientError(f"the cluster fails: {error}") from error
        finally:
            display.bar.close()
            tell_others(photos.uri, others)
            say(f"{summarise(counts)} Report: {report}")
    settled = sum(counts[status] for status in ("done", "skipped", "failed", "result"))
    if counts["listed"] > settled:
        raise ClientError(
            f"only {settled} photos are restored; Ray's log, in /tmp/ray, says why. The same "
            "command goes on"
        )
    if counts["listed"] == counts["result"]:
        raise ClientError(f"no photo in {photos.uri}")
    return 1 if counts["failed"] else 0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Joins a cluster and sends it this repository; raises `ClientError` if there is none."""
    try:
        ray.init(
            address,
            runtime_env={"working_dir": str(ROOT), "excludes": NOT_SENT},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClientError(
            f"no Ray cluster answers at --ray {address}: {error}. Start one with `ray start "
            "--head`, or name its address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class Actors:
    """Restorers that get a line at a time; one that fails is replaced, and another gets its line.

    Ray Data does the same, but keeps statistics of every photo, so that it grows with them; and
    there the photos of an actor that died wait until Ray finds room for it.
    """

    def __init__(
        self, restorer: type, arguments: Sequence[Any], options: argparse.Namespace
    ) -> None:
        share, room = shares(options.per_node, gpu=options.gpu)
        self.restorer, self.arguments = ray.remote(**share)(restorer), arguments
        self.least, self.most = options.actors or (room, room)
        self.attempts: int = options.attempts
        self.running: dict[Any, tuple[Any, Line | None]] = {}
        """What is awaited of which actor, and of which line; of none while it starts."""
        self.idle: list[Any] = []
        self.pending: deque[Line] = deque()
        self.failed_starts = 0

    def stream(self, lister: Callable[..., Iterator[Line]], **named: Any) -> Iterator[Line]:
        """What they make of the pending lines of a task, and its other lines, as they come.

        Raises `ClientError` if no actor starts, and `RayError` if the task fails.
        """
        lines: Any = ray.remote(**LISTING)(lister).remote(**named)
        self._start(self.least)
        while lines or self.pending or any(line for _, line in self.running.values()):
            while self.idle and self.pending:
                actor, line = self.idle.pop(), self.pending.popleft()
                self.running[actor.restore.remote(line)] = actor, line
            starting = any(line is None for _, line in self.running.values())
            if (lines or self.pending) and not (self.idle or starting):
                self._start(min(len(self.running), self.most - len(self.running)))
            (ready,), _ = ray.wait([*self.running, *([lines] if self.idle and lines else [])])
            if ready in self.running:
                made = self._collect(ready)
            else:
                made: Any = ray.get(next(lines))
                lines = None if made["status"] == "listed" else lines
            if made and made["status"] == "pending":
                self.pending.appendleft(made)
            elif made:
                yield made

    def _start(self, count: int) -> None:
        for _ in range(count):
            actor = self.restorer.remote(*self.arguments)
            self.running[actor.__ray_ready__.remote()] = actor, None

    def _collect(self, ready: Any) -> Line | None:
        """The line that an actor made, or has left behind; ``None`` if it only started, or not."""
        actor, line = self.running.pop(ready)
        try:
            made: Any = ray.get(ready)
        except (RayActorError, OutOfMemoryError, RayTaskError) as error:
            ray.kill(actor)  # it may only be out of reach, or on a node that fails everything
            self._start(1)
            if line is None:
                self.failed_starts += 1
                if self.failed_starts >= FAILED_STARTS:
                    raise ClientError(f"{FAILED_STARTS} actors did not start: {error}") from error
                return None
            attempts = line["attempts"] + 1
            died = {"status": "failed", "error": f"its actor died {attempts} times: {error}"}
            return line | {"attempts": attempts} | (died if attempts >= self.attempts else {})
        self.failed_starts = 0
        self.idle.append(actor)
        return made if line else None
