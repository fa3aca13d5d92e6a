"""Restores a folder of photos on all nodes of a Ray cluster: ``tools.restore --ray``.

A task lists the folder, actors that each keep a ComfyUI restore what it lists, and the lines of
the report come back. Ray Data moves the lines, starts and replaces actors, and gives the photos of
those that died to others.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.data
import ray.exceptions
from pyarrow import fs

from tools.batch import Batch, Event, Options, server_of
from tools.client import ClientError, Workflow
from tools.environment import ROOT
from tools.host import Host
from tools.jobs import Job, digest_workflow, part_twins, result_name, result_record, settle, sort_of
from tools.photo_writer import NO_SPACE, PART_PREFIX, OutputError
from tools.restoration import UPLOADS
from tools.terminal import Display, say, summarise, tell_others

REPORT_NAME = "diff-restorer-report.jsonl"
IN_FLIGHT = 2
"""Photos that an actor holds: it restores one, and the next is there when it ends."""
FAILED_STARTS = 10
"""Of ComfyUI, one after another on whatever node, until the run ends."""
NOT_SENT = ("/.git", "/docs", "/tests", "/training", "/benchmarks")
"""What no node needs of this repository."""
Lines = dict[str, list[str]]


@dataclass(frozen=True)
class Place:
    """A folder on any file system that pyarrow knows."""

    uri: str
    """Without password and options, for messages and reports."""
    files: fs.FileSystem
    path: str

    @classmethod
    def of(cls, named: str | Path) -> Place:
        """The place of a path or a URI.

        Raises:
            ClientError: pyarrow knows no such file system.
        """
        if isinstance(named, Path):
            path = str(named.absolute())
            return cls(path, fs.LocalFileSystem(), path)
        try:
            files, path = fs.FileSystem.from_uri(named)
        except (ValueError, OSError) as error:
            scheme = named.partition("://")[0]
            raise ClientError(
                f"{scheme}:// is no place that can be opened: {error}. "
                "Accepted are paths, file://, s3:// and gs://"
            ) from error
        return cls(f"{named.partition('://')[0]}://{path}".rstrip("/"), files, path)

    def at(self, below: Path) -> str:
        return f"{self.path}/{below.as_posix()}"

    def name(self, below: Path) -> str:
        return f"{self.uri}/{below.as_posix()}"

    def exists(self, below: Path) -> bool:
        return self.files.get_file_info(self.at(below)).type != fs.FileType.NotFound

    def fetch(self, below: Path, to: Path) -> None:
        fs.copy_files(self.at(below), str(to), self.files, fs.LocalFileSystem())

    def put(self, file: Path, below: Path) -> None:
        """Copies a file there, which appears complete or not at all."""
        folder = self.at(below.parent)
        part = f"{folder}/{PART_PREFIX}{uuid.uuid4().hex}"
        self.files.create_dir(folder)
        try:
            fs.copy_files(str(file), part, fs.LocalFileSystem(), self.files)
            self.files.move(part, self.at(below))
        except BaseException:
            with suppress(OSError):
                self.files.delete_file(part)
            raise


def list_photos(_: object, photos: Place, out: Place, *, recursive: bool) -> Iterator[Lines]:
    """Yields the photos of a folder as pending lines, then how many; holds one folder at a time.

    Pictures of other endings come as ``left out``, what cannot be read as ``failed``.
    """
    folders, listed = [Path()], 0
    while folders:
        folder = folders.pop()
        jobs: list[Job] = []
        try:
            found = photos.files.get_file_info(fs.FileSelector(photos.at(folder)))
        except OSError as error:
            found = []
            jobs.append(Job(folder, folder, "failed", error=f"it cannot be read: {error}"))
        for info in found:
            try:
                below = folder / info.base_name
            except UnicodeDecodeError as error:
                reason = f"a name in this folder is no text: {error}"
                jobs.append(Job(folder, folder, "failed", error=reason))
                continue
            sort = sort_of(below.name)
            if info.type == fs.FileType.Directory:
                linked = isinstance(photos.files, fs.LocalFileSystem) and os.path.islink(info.path)
                of_results = photos.files.equals(out.files) and info.path == out.path
                if recursive and not (linked or of_results or below.name.startswith(".")):
                    folders.append(below)
            elif info.type == fs.FileType.File and sort == "photo":
                jobs.append(Job(below, folder / result_name(below)))
            elif info.type == fs.FileType.File and sort == "other":
                yield _line(status="left out", ending=below.suffix.lower())
        part_twins(jobs)
        listed += len(jobs)
        for job in sorted(jobs, key=lambda job: job.source):
            yield _line(**job.report())
    yield _line(status="listed", count=listed)


def _line(**fields: Any) -> Lines:
    return {"line": [json.dumps(fields)]}


class Restorer:
    """An actor: a ComfyUI of its own, to which it gives one photo at a time.

    Args:
        photos: The folder of the photos.
        out: The folder of the results.
        workflow: In API format.
        options: Of the batch.
        overwrite: Restore what is done again.
        cpu: As for `Host`.

    Raises:
        HostError: ComfyUI does not start.
    """

    def __init__(
        self,
        photos: Place,
        out: Place,
        workflow: Workflow,
        options: Options,
        *,
        overwrite: bool,
        cpu: bool,
    ) -> None:
        self.photos, self.out = photos, out
        self.workflow, self.options = workflow, options
        self.digest = digest_workflow(workflow, options.max_side)
        self.overwrite = overwrite
        self.host = Host(cpu=cpu)
        keeper = ThreadPoolExecutor(1)  # ComfyUI ends with the thread that starts it
        keeper.submit(self.host.__enter__).result()
        atexit.register(self.host.stop)
        self.server = server_of(self.host, keeper)
        self.name = f"{ray.get_runtime_context().get_node_id()[:8]} {self.host.url}"

    def __call__(self, batch: dict[str, Any]) -> Lines:
        (line,) = batch["line"]
        return _line(**self.restore(json.loads(line)))

    def restore(self, line: dict[str, Any]) -> dict[str, Any]:
        """Restores the photo of a pending line; gives back any other line."""
        if line["status"] != "pending":
            return line
        source, output = Path(line["source"]), Path(line["output"])
        with TemporaryDirectory(prefix="diff-restorer-") as folder:
            job = Job(Path(folder, "photo", source.name), Path(folder, "result", output.name))
            job.source.parent.mkdir()
            job.output.parent.mkdir()
            try:
                if not self._restore(job, source, output):
                    return {"status": "result"}
            except OutputError as error:
                return {"status": "full", "error": f"{error} (node {self.name})"}
            finally:
                self._clear()
        for copy, place in (
            (job.source, self.photos.name(source)),
            (job.output, self.out.name(output)),
        ):
            job.error = job.error and job.error.replace(str(copy), place)
        server = self.name if job.attempts else None
        return replace(job, source=source, output=output, server=server).report()

    def _restore(self, job: Job, source: Path, output: Path) -> bool:
        """Restores a copy on this node, and sends the result; whether it is a photo at all."""
        try:
            self.photos.fetch(source, job.source)
        except OSError as error:
            job.fail(f"{job.source} cannot be read: {error}")
            return True
        if result_record(job.source) is not None:
            return False
        try:
            if not self.overwrite and self.out.exists(output):
                self.out.fetch(output, job.output)
            settle(job, self.digest, overwrite=self.overwrite)
            Batch([self.server], self.workflow, [job], self.options).run()
            if job.status == "done":
                self.out.put(job.output, output)
        except OSError as error:
            reason = f"{self.out.name(output)} cannot be written: {error}"
            if error.errno in NO_SPACE:
                raise OutputError(reason) from error
            job.fail(reason)
        return True

    def _clear(self) -> None:
        """Removes what the photo left in ComfyUI's folders, which a long run would fill."""
        for folder in (f"input/{UPLOADS}", "output"):
            for file in (self.host.base / folder).glob("*.*"):
                file.unlink(missing_ok=True)


def shares(per_node: int | None, *, gpu: bool) -> tuple[dict[str, float], int]:
    """What an actor takes of a node, and how many the cluster holds now.

    Args:
        per_node: Actors on the smallest node; ``None`` for one per GPU, or one per node of CPUs.
        gpu: Whether they share GPUs or CPUs.
    """
    kind = "GPU" if gpu else "CPU"
    nodes = [each["Resources"].get(kind, 0) for each in ray.nodes() if each["Alive"]]
    smallest = min(filter(None, nodes), default=1)
    share = smallest / (per_node or (smallest if gpu else 1))
    share = int(share) if share > 1 else share  # Ray has no 1.5 GPUs
    return {f"num_{kind.lower()}s": share}, max(1, sum(int(size / share) for size in nodes))


def run(options: argparse.Namespace, workflow: Workflow, reserved: Any) -> int:
    """Restores a folder; 0 if every photo is done, else 1.

    Args:
        options: From `tools.restore.parse`, with ``ray``.
        workflow: In API format.
        reserved: Keeps other runs out of a local folder, as `tools.restore.reserve`.

    Raises:
        ClientError: Nothing can be restored.
    """
    (named,) = options.photos
    photos, out = Place.of(named), Place.of(options.out)
    if photos.files.get_file_info(photos.path).type != fs.FileType.Directory:
        raise ClientError(f"there is no folder {photos.uri}: --ray takes one folder of photos")
    local = isinstance(options.out, Path)
    report = options.report or (options.out / REPORT_NAME if local else Path(REPORT_NAME))
    with reserved(options.out) if local else nullcontext(), report.open("w") as lines:
        try:
            counts = _restore_all(options, workflow, photos, out, lines)
        finally:
            say(f"Report: {report}")
    if not counts["listed"] - counts["result"]:
        raise ClientError(f"no photo in {photos.uri}")
    return 1 if counts["failed"] or counts["lost"] else 0


def _restore_all(
    options: argparse.Namespace, workflow: Workflow, photos: Place, out: Place, lines: Any
) -> Counter[str]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(
            options.ray,
            runtime_env={"working_dir": str(ROOT), "excludes": [*NOT_SENT]},
            log_to_driver=False,
            logging_level="warning",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClientError(
            f"no Ray cluster answers at --ray {options.ray}: {error}. Start one with `ray start "
            "--head`, or name its address"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: every photo is given out by itself
    context.max_errored_blocks = -1  # what cannot be done is counted below
    context.max_consecutive_actor_init_deaths = FAILED_STARTS
    share, held = shares(options.per_node, gpu=options.gpu)
    least, most = options.actors or (held, held)
    batch_options = Options(options.max_side, options.wait, options.attempts)
    dataset = ray.data.from_items([0]).map_batches(
        functools.partial(list_photos, photos=photos, out=out, recursive=options.recursive),
        num_cpus=0,
    )
    dataset = dataset.map_batches(
        Restorer,
        fn_constructor_args=(photos, out, workflow, batch_options),
        fn_constructor_kwargs={"overwrite": options.overwrite, "cpu": not options.gpu},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=least, max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT
        ),
        max_task_retries=options.attempts - 1,
        **share,
    )
    display, counts, others = Display(None), Counter[str](), Counter[str]()
    try:
        for row in dataset.iter_rows():
            line = json.loads(row["line"])
            status = line["status"]
            counts[status] += line.get("count", 1)
            if status == "left out":
                others[line["ending"]] += 1
            elif status == "full":
                raise ClientError(line["error"])
            elif status in ("done", "skipped", "failed"):
                line["source"] = photos.name(Path(line["source"]))
                line["output"] = out.name(Path(line["output"]))
                lines.write(f"{json.dumps(line)}\n")
                lines.flush()
                display.show(Event(job=Job(**line)))
    except ray.exceptions.RayTaskError as error:
        raise ClientError(str(error.cause)) from error
    finally:
        display.bar.close()
        tell_others(photos.uri, others)
        say(summarise(counts))
        ray.shutdown()
    settled = ("done", "skipped", "failed", "result")
    counts["lost"] = counts["listed"] - sum(counts[status] for status in settled)
    if counts["lost"]:
        say(
            f"error: {counts['lost']} photos were lost with {options.attempts} actors or nodes "
            "each. The same command tries them again"
        )
    return counts
