"""Restores photos and folders through ComfyUI servers that have Diff-Restorer.

python -m tools.restore photo.jpg more.png             starts a ComfyUI of its own
python -m tools.restore photos --recursive --out restored
python -m tools.restore photos --server http://127.0.0.1:8188 --server http://10.0.0.7:8188
python -m tools.restore s3://bucket/photos --out s3://bucket/restored --ray auto

Results are PNG files, and TIFF files for TIFF photos. They keep EXIF, ICC profile, resolution,
transparency and 8 or 16 bits per channel, and are upright. A run that was stopped goes on where it
was when it is called again. The report in the folder of the results says what became of each photo.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.batch import Batch, Options, Server, server_of
from tools.client import AsyncClient
from tools.ending import in_words, say
from tools.errors import ClientError, ServerUnreachableError, WorkflowError
from tools.host import Host, exit_on_termination
from tools.jobs import Job, digest_workflow, make_room, plan, reserve, settle
from tools.photo_writer import whole
from tools.restoration import INPUT_TITLE, NANO_WORKFLOW, OUTPUT_TITLE, PRESETS, with_preset
from tools.terminal import Display, summarise, tell_others
from tools.workflow import Workflow, find_node, load_workflow

REPORT_NAME = "diff-restorer-report.json"


async def find_servers(urls: Sequence[str], workflow: Workflow) -> list[Server]:
    """Checks servers, each once; one that cannot run the workflow is left out of several.

    Raises the error of the only one, or one for all, if there is none to wait for.
    """

    async def fault_of(client: AsyncClient) -> ClientError | None:
        try:
            await client.check()
            await client.require_nodes(workflow)
        except ClientError as error:
            return error

    clients = {client.server: client for client in map(AsyncClient, urls)}
    found = dict(zip(clients, await asyncio.gather(*map(fault_of, clients.values())), strict=True))
    faults = [fault for fault in found.values() if fault]
    able = {name: fault for name, fault in found.items() if not isinstance(fault, WorkflowError)}
    if all(able.values()):
        if len(faults) == 1 or not able:
            raise faults[0]
        reasons = "".join(f"\n{fault}" for fault in faults)
        raise ServerUnreachableError(f"no ComfyUI answers at any of {', '.join(able)}:{reasons}")
    for fault in faults:
        say(f"error: {fault}")
    return [Server(clients[name].url, answers=fault is None) for name, fault in able.items()]


def write_report(path: Path, jobs: Sequence[Job], workflow: Path, seconds: float) -> None:
    """Writes what became of each photo as JSON, at once or not at all."""
    counts = Counter(job.status for job in jobs)
    report = {
        "workflow": str(workflow),
        "seconds": round(seconds, 3),
        "counts": {status: counts[status] for status in ("done", "skipped", "failed", "pending")},
        "photos": [job.report() for job in jobs],
    }
    with whole(path) as stream:
        stream.write(f"{json.dumps(report, indent=2)}\n".encode())


def run(options: argparse.Namespace) -> int:
    """Restores what the options of `parse` name; 0 if every photo is done, else 1."""
    begun = time.monotonic()
    workflow = load_workflow(options.workflow)
    find_node(workflow, "LoadImage", INPUT_TITLE)
    find_node(workflow, "SaveImage", OUTPUT_TITLE)
    if options.preset:
        workflow = with_preset(workflow, options.preset)
    if options.ray:
        if options.ray == "local":  # where Ray would listen on the machine's outward addresses
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            from tools import cluster
        except ImportError as error:
            raise ClientError(f'--ray needs Ray ({error}): pip install "ray[data]"') from error
        return cluster.run(options, workflow)
    jobs = plan(options.photos, options.out, recursive=options.recursive, tell=tell_others)
    with reserve(options.out):
        return _restore_all(options, workflow, jobs, begun)


def _restore_all(
    options: argparse.Namespace, workflow: Workflow, jobs: Sequence[Job], begun: float
) -> int:
    digest = digest_workflow(workflow, options.max_side)
    for job in jobs:
        if job.status == "pending":
            settle(job, digest, overwrite=options.overwrite)
        if job.status == "pending":
            make_room(job)
    display = Display(sum(job.status == "pending" for job in jobs))
    for job in jobs:
        display.tell(job)

    def restore_on(servers: Sequence[Server]) -> None:
        batch_options = Options(options.max_side, options.wait, options.attempts)
        Batch(servers, workflow, jobs, batch_options).run(display.show)

    try:
        if all(job.status != "pending" for job in jobs):
            pass
        elif options.server:
            restore_on(asyncio.run(find_servers(options.server, workflow)))
        else:
            say("Starting ComfyUI ...")
            with Host(cpu=not options.gpu, log=options.out / "host.log") as host:
                restore_on([server_of(host)])
    finally:
        display.bar.close()
        counts = Counter(job.status for job in jobs)
        report = options.report or options.out / REPORT_NAME
        try:
            write_report(report, jobs, options.workflow, time.monotonic() - begun)
            say(f"{summarise(counts)} Report: {report}")
        except OSError as error:
            reason = f"No report: {report} cannot be written: {error.strerror}"
            say(f"{summarise(counts)} {reason}")
    return 1 if counts["failed"] else 0


def _place(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.restore", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument

    def number(name: str, least: float, help: str, **settings: Any) -> None:
        kind = type(least)

        def read(text: str) -> Any:
            value = kind(text)
            if not value >= least:
                raise argparse.ArgumentTypeError(f"{text} is too small: {least:g} is the least")
            return value

        read.__name__ = kind.__name__  # argparse's word for what it expects
        add(name, type=read, help=help, **settings)

    add("photos", nargs="+", type=_place, metavar="photo", help="photos and folders of photos")
    add("--recursive", action="store_true", help="look into the folders' folders, too")
    add("--out", type=_place, default=Path("restored"), metavar="DIR", help="default: restored")
    add("--overwrite", action="store_true", help="restore all again, replace what is in --out")
    add("--report", type=Path, metavar="FILE", help=f"default: {REPORT_NAME} in --out")
    text = "a running ComfyUI, for several give it several times; without it one is started"
    add("--server", action="append", metavar="URL", help=text)
    add("--gpu", action="store_true", help="let the ComfyUI that is started use a GPU")
    text = "restore one folder, a path or a URI, on all nodes of this Ray cluster; or auto"
    add("--ray", metavar="ADDRESS", help=text)
    text = "ComfyUIs on the smallest node (default: one, or with --gpu one per GPU)"
    number("--per-node", 1, text, metavar="N")
    text = "ComfyUIs in all, for clusters that grow (default: as many as there is room for)"
    number("--actors", 1, text, nargs=2, metavar=("MIN", "MAX"))
    add("--workflow", type=Path, default=NANO_WORKFLOW, metavar="FILE", help="in API format")
    add("--preset", choices=sorted(PRESETS), help="sampler settings for Nano, not the workflow's")
    number("--max-side", 0, "shrink larger photos first", default=0, metavar="PIXELS")
    text = "how long a server that stopped answering may take to come back (default %(default)g)"
    number("--wait", 0.0, text, default=Options.wait, metavar="SECONDS")
    text = "fail a photo during which its server died N times (default %(default)s)"
    number("--attempts", 1, text, default=Options.attempts, metavar="N")
    options = parser.parse_args(arguments)
    uris = [place for place in (*options.photos, options.out) if isinstance(place, str)]
    if options.ray is None and (uris or options.per_node or options.actors):
        parser.error("URIs, --per-node and --actors are for a cluster: name it with --ray")
    if options.ray is not None and (options.server or len(options.photos) > 1):
        parser.error("--ray takes one folder of photos, and no --server: its nodes start their own")
    least, most = options.actors or (1, 1)
    if least > most:
        parser.error(f"--actors {least} {most}: the least comes first, then the most")
    return options


@in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.restore``."""
    options = parse(arguments)
    exit_on_termination()
    try:
        return run(options)
    except KeyboardInterrupt:
        say("The same command goes on from here.")
        raise


if __name__ == "__main__":
    sys.exit(main())
