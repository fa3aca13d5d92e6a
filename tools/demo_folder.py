"""A folder of photos over two servers, one of which dies half-way and comes back.

python -m tools.demo_folder [--out demo_folder_out]

Makes the photos, starts both servers on 127.0.0.1, restores the folder with ``tools.restore``,
kills one server while it works on a photo, starts it again, and checks that every photo is restored
once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tools import restore
from tools.batch import Event
from tools.demo import SAMPLES, degrade_photo, psnr
from tools.ending import in_words
from tools.host import Host, exit_on_termination
from tools.photo import read_photo

SUFFIXES = (".png", ".jpg", ".tif")


class CheckError(RuntimeError):
    """The run did not do what this program shows."""


class Accident:
    """Kills a server in the middle of a photo, once half of all photos are done.

    Args:
        host: The server.
        photos: How many photos there are.
    """

    def __init__(self, host: Host, photos: int) -> None:
        self.host = host
        self.half = photos // 2
        self.done = 0
        self.victim: Path | None = None
        """The photo that was in flight."""

    def watch(self, event: Event) -> None:
        if event.job is None:
            return
        if event.progress is None:
            self.done += 1
        # At the first steps of the sampler, so that its picture cannot be there yet.
        elif (
            self.victim is None
            and self.done >= self.half
            and event.job.server == self.host.url
            and 0 < event.progress.step < event.progress.steps / 2
        ):
            self.victim = event.job.source
            print(f"--- killing {self.host.url} while it restores {self.victim.name}", flush=True)
            self.host.kill()
            self.host.restart()
            print(f"--- {self.host.url} is started again", flush=True)


def make_photos(folder: Path, count: int, max_side: int) -> dict[Path, Image.Image]:
    """Writes degraded photos as PNG, JPEG (stored lying, with EXIF) and TIFF in turn.

    Returns:
        File -> the clean photo.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean: dict[Path, Image.Image] = {}
    for index in range(count):
        # 3 and 8 have no common divisor: another kind for a photo each time that it comes.
        sample = SAMPLES[(3 * index + index // len(SAMPLES)) % len(SAMPLES)]
        sample = replace(sample, photo=SAMPLES[index % len(SAMPLES)].photo, seed=100 + index)
        photo = read_photo(sample.photo, max_side)
        suffix = SUFFIXES[index % len(SUFFIXES)]
        path = folder / f"{index + 1:02} {sample.photo.stem}, {sample.kind}{suffix}"
        degraded = degrade_photo(photo, sample)
        if suffix == ".jpg":
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            degraded.rotate(90, expand=True).save(path, quality=95, exif=exif)
        else:
            degraded.save(path)
        clean[path] = photo
    return clean


def check(
    report: dict[str, Any], clean: dict[Path, Image.Image], accident: Accident, saved: int
) -> None:
    """Compares the report with the files and with what the servers saved.

    Raises:
        CheckError: The first thing that is wrong.
    """
    entries = {Path(entry["source"]): entry for entry in report["photos"]}
    if accident.victim is None:
        raise CheckError("no server was killed: it had no photo in the second half")
    wanted = {"done": len(clean), "skipped": 0, "failed": 0, "pending": 0}
    if report["counts"] != wanted or set(entries) != set(clean):
        raise CheckError(f"the report has {report['counts']}, not {wanted}")
    if saved != len(clean):
        raise CheckError(f"the servers saved {saved} pictures for {len(clean)} photos")
    for path, entry in entries.items():
        attempts = 2 if path == accident.victim else 1
        if entry["attempts"] != attempts:
            raise CheckError(f"{path.name} had {entry['attempts']} attempts, not {attempts}")
        with Image.open(entry["output"]) as restored:
            if restored.size != clean[path].size:
                raise CheckError(f"{path.name} became {restored.size}, not {clean[path].size}")


def summarise(report: dict[str, Any], clean: dict[Path, Image.Image]) -> None:
    """Prints who did how much, and how well."""
    shares = Counter(entry["server"] for entry in report["photos"])
    for server, photos in sorted(shares.items()):
        print(f"{server}: {photos} photos")
    before = [psnr(read_photo(path), photo) for path, photo in clean.items()]
    after = [
        psnr(read_photo(Path(entry["output"])), clean[Path(entry["source"])])
        for entry in report["photos"]
    ]
    print(f"mean {np.mean(before):.2f} -> {np.mean(after):.2f} dB")


def run(out: Path, count: int, max_side: int, cpu: bool) -> None:
    """Makes, restores and checks the photos.

    Raises:
        CheckError, ClientError, HostError: Something went wrong.
    """
    clean = make_photos(out / "photos", count, max_side)
    command = [str(path) for path in clean] + ["--out", str(out / "restored")]
    print("Starting two ComfyUI servers ...", flush=True)
    with (
        Host(cpu=cpu, log=out / "first.log") as first,
        Host(cpu=cpu, log=out / "second.log") as second,
    ):
        servers = ["--server", first.url, "--server", second.url]
        accident = Accident(second, count)
        restore.run(restore.parse([*command, *servers, "--overwrite"]), accident.watch)
        saved = [path for host in (first, second) for path in (host.base / "output").glob("*.png")]
        report = json.loads((out / "restored" / restore.REPORT_NAME).read_text())
        check(report, clean, accident, len(saved))
        # There is nothing left to do, even for servers that are there.
        restore.run(restore.parse([*command, *servers]))
        again = json.loads((out / "restored" / restore.REPORT_NAME).read_text())
        if again["counts"]["skipped"] != count:
            raise CheckError(f"the second run has {again['counts']}, not {count} skipped")
    summarise(report, clean)
    print(
        f"Checked: {count} photos restored, none twice; "
        f"{accident.victim.name if accident.victim else None} was in flight when its server died "
        "and was restored afterwards; a second run had nothing to do."
    )


@in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.demo_folder``."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_folder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("demo_folder_out"), metavar="DIR")
    parser.add_argument("--photos", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--max-side", type=int, default=256, metavar="PIXELS")
    parser.add_argument("--gpu", action="store_true", help="let both servers use a GPU")
    options = parser.parse_args(arguments)
    exit_on_termination()
    run(options.out, options.photos, options.max_side, not options.gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
