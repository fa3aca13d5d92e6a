"""Which photos a run restores, where the results go, and what is done already."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tools.client import ClientError, Workflow
from tools.photo import file_digest
from tools.photo_writer import read_record

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".avif")
"""Photos in a folder; a file that is named itself may have any."""

Status = Literal["pending", "done", "skipped", "failed"]


@dataclass
class Job:
    """One photo and what became of it; the entries of the report."""

    source: Path
    output: Path
    status: Status = "pending"
    """``skipped``: an earlier run did it. ``pending``: the run was stopped before."""
    server: str | None = None
    kind: str | None = None
    """The most probable degradation."""
    probabilities: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float | None = None
    """From queueing to the end, of the attempt that succeeded."""
    attempts: int = 0
    """How often it was given to a server."""
    bits: int | None = None
    """Per channel of the output."""
    notes: list[str] = field(default_factory=list[str])
    """What of the photo is not carried over."""
    error: str | None = None

    def fail(self, error: str) -> None:
        self.status, self.error = "failed", error

    def report(self) -> dict[str, Any]:
        return {**vars(self), "source": str(self.source), "output": str(self.output)}

    def take_over(self, record: dict[str, Any]) -> None:
        """Marks it as skipped, with what the record of its output says."""
        self.status = "skipped"
        for name in ("kind", "probabilities", "seconds", "bits", "notes"):
            setattr(self, name, record[name])

    def record(self, photo: str, workflow: str) -> dict[str, Any]:
        """What its output says about itself, by which `settle` and `find_photos` know it."""
        return {
            "source": self.source.name,
            "photo": photo,
            "workflow": workflow,
            "kind": self.kind,
            "probabilities": self.probabilities,
            "seconds": self.seconds,
            "bits": self.bits,
            "notes": self.notes,
        }


def digest_workflow(workflow: Workflow, max_side: int) -> str:
    """Names a workflow and the largest side by content."""
    text = json.dumps([workflow, max_side], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plan(named: Sequence[Path], out: Path, *, recursive: bool = False) -> list[Job]:
    """Lists the photos of files and folders, each once, with the files that their results go to.

    The photo ``trip/day1/sea.jpg`` of the folder ``trip`` goes to ``<out>/day1/sea_restored.png``.
    Photos whose results would have one name get their own ending into it; where that does not help
    they fail, and no photo is ever the output of another.

    Args:
        named: Photos and folders.
        out: Folder of the results; as a part of one of the folders it is left out.
        recursive: Look into the folders' folders.

    Returns:
        Jobs, pending or failed.

    Raises:
        ClientError: A folder cannot be read, or there is no photo at all in the folders.
    """
    jobs: dict[Path, Job] = {}
    for path in named:
        found = find_photos(path, out, recursive=recursive) if path.is_dir() else [path]
        for photo in found:
            below = photo.parent.relative_to(path) if path.is_dir() else Path()
            jobs.setdefault(photo.resolve(), Job(photo, out / below / result_name(photo)))
    if not jobs:
        folders = ", ".join(map(str, named))
        hint = "" if recursive else " (--recursive looks into its folders, too)"
        raise ClientError(f"no photo in {folders}{hint}. Accepted are {' '.join(SUFFIXES)}")
    for twins in _twins(jobs.values()):
        for job in twins:
            job.output = job.output.with_name(result_name(job.source, whole=True))
    for twins in _twins(jobs.values()):
        sources = " and ".join(str(job.source) for job in twins)
        for job in twins:
            job.fail(
                f"{sources} would both become {job.output}. Restore them in two runs, each with "
                "its own --out, or name a folder that holds both, with --recursive"
            )
    for source, job in jobs.items():
        if not source.exists():
            job.fail(f"there is no photo {job.source}")
        elif (other := jobs.get(job.output.resolve())) is not None:
            job.fail(f"its result would replace the photo {other.source}: choose another --out")
    return list(jobs.values())


def find_photos(folder: Path, out: Path, *, recursive: bool = False) -> Iterator[Path]:
    """Yields the photos of a folder in the order of their names; never a result of this program.

    Raises:
        ClientError: The folder cannot be read.
    """

    def complain(error: OSError) -> None:
        raise ClientError(f"the folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=complain):
        below = (name for name in sorted(folders) if recursive and not name.startswith("."))
        folders[:] = [name for name in below if Path(place, name).resolve() != out.resolve()]
        for path in (Path(place, name) for name in sorted(files)):
            hidden = path.name.startswith(".")
            if not hidden and path.suffix.lower() in SUFFIXES and read_record(path) is None:
                yield path


def result_name(photo: Path, *, whole: bool = False) -> str:
    """``sea_restored.png``, or ``.tif`` for a TIFF file; ``whole`` keeps the photo's own ending."""
    suffix = ".tif" if photo.suffix.lower() in (".tif", ".tiff") else ".png"
    return f"{photo.name if whole else photo.stem}_restored{suffix}"


def settle(job: Job, workflow: str, *, overwrite: bool) -> None:
    """Skips a photo whose output is there; fails it if something else is.

    Args:
        job: A pending job.
        workflow: From `digest_workflow`.
        overwrite: Restore every photo again and replace what is there.
    """
    if overwrite or not job.output.exists():
        return
    record = read_record(job.output)
    try:
        digest = file_digest(job.source)
    except OSError as error:
        return job.fail(f"{job.source} cannot be read: {error.strerror}")
    if record is None:
        reason = "is no result of this program"
    elif record["photo"] != digest:
        reason = f"was made from another photo ({record['source']}), or from it before it changed"
    elif record["workflow"] != workflow:
        reason = "was made by another workflow, --preset or --max-side"
    else:
        return job.take_over(record)
    return job.fail(
        f"{job.output} is there and {reason}. Choose another --out, or pass --overwrite"
    )


def _twins(jobs: Iterable[Job]) -> list[list[Job]]:
    groups: defaultdict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[os.path.normcase(job.output)].append(job)
    return [group for group in groups.values() if len(group) > 1]
