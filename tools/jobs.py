"""Which photos a run restores, where the results go, and what is done already."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tools.errors import ClientError
from tools.photo import file_digest
from tools.photo_writer import PART_PREFIX, decodes, read_record
from tools.workflow import Workflow

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".avif"),
    *(".gif", ".jp2", ".j2k", ".jpx", ".mpo", ".ppm", ".pgm", ".tga"),
)
"""Photos in a folder; a file that is named itself may have any."""
OTHER_PICTURES = (
    *(".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".psd", ".xcf", ".exr", ".hdr", ".svg", ".pdf"),
)
"""What people keep beside their photos and Pillow does not read, or not as a photo."""
LOCK_NAME = ".diff-restorer.lock"
STALE_SECONDS = 3600.0
"""Then a part is of a run that was killed, and not of one whose --out lies within this one."""
LONGEST_NAME = 255
"""Bytes that file systems allow for one name."""
RECORD_VERSION = 1
TAKEN_OVER: dict[str, Any] = {
    "kind": str | None,
    "probabilities": dict,
    "seconds": int | float,
    "bits": int,
    "notes": list,
}
"""What the job that finds a record takes from it."""
RECORD_FIELDS = {"source": str, "photo": str, "workflow": str, **TAKEN_OVER}

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

    def record(self, photo: str, workflow: str) -> dict[str, Any]:
        """What its output says about itself, by which `settle` and `find_photos` know it."""
        return {
            "version": RECORD_VERSION,
            "source": self.source.name,
            "photo": photo,
            "workflow": workflow,
            **{name: getattr(self, name) for name in TAKEN_OVER},
        }


def result_record(path: Path) -> dict[str, Any] | None:
    """The record of a result, or ``None``; other programs write notes of their own."""
    record = read_record(path)
    if record is None or record.get("version") != RECORD_VERSION:
        return None
    fits = all(isinstance(record.get(name), kinds) for name, kinds in RECORD_FIELDS.items())
    return record if fits else None


def digest_workflow(workflow: Workflow, max_side: int) -> str:
    """Names a workflow and the largest side by content."""
    return hashlib.sha256(json.dumps([workflow, max_side], sort_keys=True).encode()).hexdigest()


def plan(
    named: Sequence[Path],
    out: Path,
    *,
    recursive: bool = False,
    tell: Callable[[Path, Counter[str]], None] = lambda folder, others: None,
) -> list[Job]:
    """Lists the photos of files and folders, each once, with the files that their results go to.

    The photo ``trip/day1/sea.jpg`` of the folder ``trip`` goes to ``<out>/day1/sea_restored.png``.
    Photos whose results would have one name get their own ending into it; where that does not help
    they fail, and no photo is ever the output of another. Where ``out`` is part of one of the
    folders it is left out, and a folder that cannot be read is a job that failed. ``tell`` gets the
    endings of other pictures in a folder. Raises `ClientError` if there is no photo at all.
    """
    jobs: dict[Path, Job] = {}
    faults: dict[Path, Job] = {}
    for path in named:
        # Not Path's own methods, which raise for names that are too long and links in a circle.
        folder = os.path.isdir(path)
        found = find_photos(path, out, recursive=recursive) if folder else Found([path])
        for photo in found.photos:
            below = photo.parent.relative_to(path) if folder else Path()
            jobs.setdefault(_real(photo), Job(photo, out / below / result_name(photo)))
        for fault in found.faults:
            place = Path(fault.filename)
            faulty = faults.setdefault(_real(place), Job(place, out / place.relative_to(path)))
            faulty.fail(f"the folder {place} cannot be read: {fault.strerror}")
        tell(path, found.others)
    if not (jobs or faults):
        folders = ", ".join(map(str, named))
        hint = "" if recursive else " (--recursive looks into its folders, too)"
        raise ClientError(f"no photo in {folders}{hint}. Accepted are {' '.join(SUFFIXES)}")
    part_twins(jobs.values())
    for source, job in jobs.items():
        if not os.path.exists(source):
            job.fail(f"there is no photo {job.source}")
        elif not os.path.isfile(source):
            job.fail(f"{job.source} is no file: it is a pipe or a device. Save the photo as a file")
        elif (other := jobs.get(_real(job.output))) is not None:
            job.fail(f"its result would replace the photo {other.source}: choose another --out")
    return [*jobs.values(), *faults.values()]


@dataclass(frozen=True)
class Found:
    """What there is in a folder."""

    photos: list[Path]
    """In the order of their names; never a result of this program."""
    others: Counter[str] = field(default_factory=Counter[str])
    """Endings of pictures that are no photos to us -> how many."""
    faults: list[OSError] = field(default_factory=list[OSError])
    """Of folders that cannot be read."""


def find_photos(folder: Path, out: Path, *, recursive: bool = False) -> Found:
    """Looks into a folder, but for ``out`` and what is hidden."""
    found = Found([])
    for place, folders, files in os.walk(folder, onerror=found.faults.append):
        below = (name for name in sorted(folders) if recursive and not name.startswith("."))
        folders[:] = [name for name in below if _real(Path(place, name)) != _real(out)]
        for path in (Path(place, name) for name in sorted(files)):
            sort = sort_of(path.name)
            if sort is None or not os.path.isfile(path):
                continue
            if sort == "other":
                found.others[path.suffix.lower()] += 1
            elif result_record(path) is None:
                found.photos.append(path)
    return found


def sort_of(name: str) -> Literal["photo", "other"] | None:
    """Whether a name is that of a photo, of a picture of other kinds, or of neither."""
    if name.startswith("."):
        return None
    ending = Path(name).suffix.lower()
    return "photo" if ending in SUFFIXES else "other" if ending in OTHER_PICTURES else None


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def result_name(photo: Path, *, whole: bool = False, apart: str = "") -> str:
    """``sea_restored.png``, or ``.tif`` for a TIFF file; ``whole`` keeps the photo's own ending.

    A name that would become too long is cut, and told apart by a digest of it, or of ``apart``.
    """
    name = photo.name if whole else photo.stem
    end = f"_restored{'.tif' if photo.suffix.lower() in ('.tif', '.tiff') else '.png'}"
    if apart or len(os.fsencode(name + end)) > LONGEST_NAME:
        end = f"~{hashlib.sha256(os.fsencode(apart or name)).hexdigest()[:8]}{end}"
        while len(os.fsencode(name + end)) > LONGEST_NAME:
            name = name[:-1]
    return name + end


def settle(job: Job, workflow: str, *, overwrite: bool) -> None:
    """Skips a pending photo whose output is there; fails it if something else is.

    The workflow is named by `digest_workflow`.
    """
    if overwrite or not os.path.exists(job.output):
        return
    record = result_record(job.output)
    if record is not None and not decodes(job.output):
        return  # what is left of a crash is restored again
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
        return vars(job).update({name: record[name] for name in TAKEN_OVER}, status="skipped")
    return job.fail(
        f"{job.output} is there and {reason}. Choose another --out, or pass --overwrite"
    )


@contextmanager
def reserve(out: Path) -> Iterator[None]:
    """Makes the folder of the results and keeps other runs out of it, or raises `ClientError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_NAME).open("ab")
    except OSError as error:
        raise ClientError(
            f"--out {out} cannot be written: {error.strerror}. Choose another folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in out.rglob(f"{PART_PREFIX}*"):
                if time.time() - part.lstat().st_mtime > STALE_SECONDS:
                    part.unlink(missing_ok=True)
        except BlockingIOError as error:
            raise ClientError(
                f"another run writes to --out {out}. Wait for its end or choose another folder"
            ) from error
        except OSError:
            pass  # a file system without locks; temporary names are unique all the same
        yield


def make_room(job: Job) -> None:
    """Makes the folder of a result; fails the photo if nothing can be written there."""
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(job.output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        job.fail(f"{job.output} cannot be written: {error.strerror}. Choose another --out")


def part_twins(jobs: Collection[Job]) -> None:
    """Tells results of one name apart by the photos' endings; fails those where that is no help.

    Names that differ in case alone, which are one name to many disks, get a digest of themselves.
    """
    for twins in _twins(jobs):
        for job in twins:
            job.output = job.output.with_name(result_name(job.source, whole=True))
    for twins in _twins(jobs):
        common = os.path.commonpath([job.output for job in twins])
        for job in twins:
            if job.output != Path(common):
                apart = os.path.relpath(job.output, common)
                job.output = job.output.with_name(result_name(job.source, whole=True, apart=apart))
    for twins in _twins(jobs):
        sources = " and ".join(str(job.source) for job in twins)
        for job in twins:
            job.fail(
                f"{sources} would both become {job.output}. Restore them in two runs, each with "
                "its own --out, or name a folder that holds both, with --recursive"
            )


def _twins(jobs: Iterable[Job]) -> list[list[Job]]:
    groups: defaultdict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        # As macOS and exFAT compare names; case and spelling of accents make no difference.
        groups[unicodedata.normalize("NFC", str(job.output)).casefold()].append(job)
    return [group for group in groups.values() if len(group) > 1]
