"""Photos as programs and nodes read them, and the records that results carry."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from tests.e2e.graph import make_photo
from tests.fuzz.cases import NUMBERS, WORDS, Case, FaultError, Step, raised_by_the_pack, some
from tests.fuzz.toys import check_picture
from tools import photo, photo_writer
from tools.errors import ClientError
from tools.jobs import Job, settle

DEEP, RESULTS = ("png 16", "tif 16"), ("result png", "result tif")
FORMATS = ("png", "jpg", "tif", "webp", "gif", "bmp", *DEEP, *RESULTS)
MODES = ("RGB", "RGBA", "L", "LA")
TAGS = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 284, 317, 338, 339, 34665, 34675)
RECORD = {"version": 1, "photo": "0" * 64, "workflow": "0" * 64, "source": "a.jpg"}


class Photos:
    """Damaged photos and results, for the reader of programs, of a node, and for a second run."""

    def __init__(self, pack: ModuleType, folder: Path) -> None:
        self.pack, self.folder = pack, folder
        self.made: dict[str, bytes] = {}
        self.good = folder / "good.png"
        make_photo(24, 16).save(self.good)
        self.expected = photo.read(self.good).color

    def make(self, random: Random) -> Case:
        def step() -> Step:
            place, length = random.random(), random.choice([1, 2, 4, 16, 300])
            junk = base64.b64encode(random.randbytes(length)).decode()
            return random.choice(
                [
                    ["bit", place, random.randrange(8)],
                    ["bit", place**4, random.randrange(8)],
                    ["put", place, junk],
                    ["put", place**4, base64.b64encode(b"\xff" * length).decode()],
                    ["insert", place, junk],
                    ["remove", place, length],
                    ["cut", place],
                    ["record", random.choice([*WORDS, *NUMBERS, [], {}])],
                    [
                        "record",
                        RECORD | {random.choice(list(RECORD)): random.choice([*NUMBERS, *WORDS])},
                    ],
                    ["tag", random.choice(TAGS), random.choice([*NUMBERS, *WORDS])],
                ]
            )

        mode = random.choice(MODES)
        return {"format": random.choice(FORMATS), "mode": mode, "steps": some(random, step)}

    def run(self, case: Case) -> None:
        kind = case["format"]
        path = self.folder / f"case.{kind.replace('result ', '').split()[0]}"
        self._write(path, kind, case["mode"], case["steps"])
        job = Job(self.good, path)
        settle(job, "0" * 64, overwrite=False)
        if job.status not in ("pending", "skipped", "failed"):
            raise FaultError(f"settled as {job.status}")
        failed: Exception | None = None
        try:
            found = photo.read(path)
            # Pillow opens no TIFF of 16-bit grey with alpha.
            deep_grey = found.grey and found.alpha is not None and found.bits == 16
            for again in map(self.folder.joinpath, ("again.png", "again.tif")[: 2 - deep_grey]):
                photo_writer.write(again, found, RECORD)
                if photo_writer.read_record(again) != RECORD:
                    raise FaultError("the record is another one")
        except photo.PhotoError as error:
            failed = error
        check_picture(self.pack.nodes.folders.load_photo(path))
        if failed is not None:
            raise failed

    def _write(self, path: Path, kind: str, mode: str, steps: list[Step]) -> None:
        late = [step for step in steps if step[0] not in ("record", "tag")]
        early = [step for step in steps if step[0] in ("record", "tag")]
        data = bytearray(self._good(path.suffix, kind, mode, early))
        for what, place, *rest in late:
            at = int(place * len(data))
            if what == "bit" and data:
                data[min(at, len(data) - 1)] ^= 1 << rest[0]
            elif what == "cut":
                del data[at:]
            elif what == "remove":
                del data[at : at + rest[0]]
            elif what in ("put", "insert"):
                junk = base64.b64decode(rest[0])
                data[at : at + (len(junk) if what == "put" else 0)] = junk
        path.write_bytes(data)

    def _good(self, suffix: str, kind: str, mode: str, steps: list[Step]) -> bytes:
        key = f"{kind} {mode} {json.dumps(steps)}"
        if key not in self.made:
            path = self.folder / f"made{suffix}"
            picture = make_photo(24, 16, mode=mode)
            record: Any = RECORD
            exif = Image.Exif()
            exif[274] = 6
            for what, *rest in steps:
                if what == "record":
                    record = rest[0]
                elif isinstance(rest[1], str) or type(rest[1]) is int:
                    exif[rest[0]] = rest[1]
            try:
                encoded = exif.tobytes()
            except Exception:  # Pillow writes no such tag
                encoded = b""
            if kind.startswith("result") or kind.endswith("16"):
                picture.save(self.folder / "plain.png")
                plain = photo.read(self.folder / "plain.png")
                if kind.endswith("16"):
                    color = photo.to_bits(plain.color, 16)
                    alpha = None if plain.alpha is None else photo.to_bits(plain.alpha, 16)
                    plain = replace(plain, color=color, alpha=alpha)
                photo_writer.write(path, plain, record)
            else:
                mode = mode if suffix in (".png", ".tif") else "RGB"
                stream = io.BytesIO()
                name = Image.registered_extensions()[suffix]
                picture.convert(mode).save(stream, name, exif=encoded)
                path.write_bytes(stream.getvalue())
            self.made[key] = path.read_bytes()
        return self.made[key]

    def named(self, error: Exception) -> bool:
        return isinstance(error, ClientError) or (
            isinstance(error, ValueError) and raised_by_the_pack(error)
        )

    def run_next(self) -> None:
        if not np.array_equal(photo.read(self.good).color, self.expected):
            raise FaultError("the next photo is another one")
