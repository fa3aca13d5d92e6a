"""Test sets: what they are made of, and the project's own, photos degraded with fixed seeds."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

import diff_restorer.degradations
from diff_restorer.degradations import KINDS, add_gaussian_noise, blur, degrade, jpeg_codec

from ..data import seeded
from ..photos import UNREADABLE, PhotoFile, list_photos, read_photo
from .pictures import digest, file_digest, made_once, read_note, save_picture, to_picture

NOISE_SIGMA = 50
"""Standard deviation of the noise set, of 255 levels."""
JPEG_QUALITY = 10
"""Quality of the JPEG set (Pillow, chroma 4:2:0)."""
SEVERITIES = (0.25, 0.75)
"""The other kinds draw their severity uniformly from here."""
REAL = "pairs/"
"""What the names of sets of real pairs begin with."""
Suite = Literal["own", "independent", "mixes", "harm", "pairs"]
SUITES: tuple[Suite, ...] = get_args(Suite)
"""Suites in the order of the report; but for `own`, their sets are named `<suite>/<name>`."""
DECIDED_ON: Mapping[str, int] = {"CBSD68": 34}
"""Folder of clean photos -> how many of them, in order of names, guided decisions while Nano
was trained. By this convention all real pairs did, too, and no other photo."""


def suite_of(name: str) -> Suite:
    """The suite that a set belongs to, by its name."""
    for suite in SUITES:
        if name.startswith(f"{suite}/"):
            return suite
    return "own"


@dataclass(frozen=True)
class Case:
    """One photo of one test set."""

    set: str
    """A kind, or a suite, `/` and a name."""
    name: str
    """Of the photo, without its suffix."""
    kind: str | None
    """What the photo suffers from; None where a folder of pairs has a name of its own."""
    gt: Path
    """The clean photo."""
    lq: Path
    """The degraded photo, of the same size."""
    severity: float | None = None
    """What `degrade` was told; None where that does not apply."""
    decided_on: bool = False
    """Whether decisions were made on this photo while Nano was trained."""

    @property
    def id(self) -> str:
        """Unique name, fit for a relative path."""
        return f"{self.set}/{self.name}"


@dataclass
class Cases:
    """Test cases, and what could not become one."""

    cases: list[Case] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """File -> reason."""
    missing: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Package that is not installed and why it is not -> how many cases are left out for it."""

    def add(self, others: Cases) -> None:
        """Takes over what another suite found."""
        self.cases.extend(others.cases)
        self.failed.update(others.failed)
        self.missing.update(others.missing)


class MissingPackageError(Exception):
    """An optional package cannot be used: its name, and the reason."""


@dataclass(frozen=True)
class CleanPhoto:
    """A photo to make test cases of."""

    name: str
    file: PhotoFile
    decided_on: bool
    """As in `Case`."""


@dataclass(frozen=True)
class Recipe:
    """How the photos of one test set are made from clean ones."""

    set: str
    kind: str | None
    """As in `Case`."""
    make: Callable[[Tensor, str, int], tuple[Tensor, float | None]]
    """(1, 3, H, W) in [0, 1], name of the photo and seed -> degraded photo and severity."""
    code: str
    """Digest of what `make` runs: other code makes the photos again."""
    is_reference: bool = False
    """What is made is scored against itself, not against the photo that it was made from."""


def clean_photos(folder: Path) -> list[CleanPhoto]:
    """The photos of a folder, text list or CSV manifest, by name; raises ValueError where there is
    none, or two have one name."""
    files = list_photos(folder)
    names = [Path(file.name).stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder} has several photos named {', '.join(twice[:3])}")
    place = folder.resolve()
    decided = DECIDED_ON.get((place if place.is_dir() else place.parent).name, 0)
    entries = enumerate(zip(names, files, strict=True))
    return [CleanPhoto(name, file, index < decided) for index, (name, file) in entries]


def untouched(photos: Sequence[CleanPhoto], limit: int) -> list[CleanPhoto]:
    """The first `limit` photos (0: all) that guided no decision; of all, where every one did."""
    return ([photo for photo in photos if not photo.decided_on] or list(photos))[: limit or None]


def degradations_digest() -> str:
    """Digest of the code of the project's own degradations."""
    return file_digest(*sorted(Path(diff_restorer.degradations.__file__).parent.glob("*.py")))


def read_upright(file: PhotoFile) -> Tensor:
    """A photo file as (1, 3, H, W) float32 in [0, 1], turned upright."""
    return read_photo(file)[None].float() / 255


def make_lq(kind: str, image: Tensor, name: str, seed: int) -> tuple[Tensor, float | None]:
    """Degrades a photo (1, 3, H, W) in [0, 1] for the test set of `kind`.

    Result and severity are a function of (seed, kind, name, image); the severity is None for noise,
    JPEG and clean, which have no choice.
    """
    generator = seeded(seed, zlib.crc32(kind.encode()), zlib.crc32(name.encode()))
    if kind == "noise":
        return add_gaussian_noise(image, torch.tensor([NOISE_SIGMA / 255]), generator), None
    if kind == "jpeg":
        return jpeg_codec(image, torch.tensor([float(JPEG_QUALITY)])), None
    if kind == "clean":
        return image, None
    low, high = SEVERITIES
    severity = low + (high - low) * float(torch.rand((), generator=generator))
    if kind == "blur":  # one kernel over the photo, as in the sets that were published first
        return blur(image, torch.tensor([severity]), generator, uneven_share=0.0), severity
    return degrade(kind, image, severity, generator), severity


def from_recipes(
    photos: Sequence[CleanPhoto], cache: Path, recipes: Sequence[Recipe], seed: int
) -> Cases:
    """Makes every recipe of every photo, no two of one name, as PNG files in `cache`; what is there
    and still right is used again."""
    made = Cases()
    for photo in tqdm(photos, desc="test sets", unit="photo", disable=None):
        try:
            image = read_upright(photo.file)
        except UNREADABLE as error:
            made.failed[str(photo.file)] = f"cannot be read: {error}"
            continue
        gt = cache / "gt" / f"{photo.name}.png"
        key = keep(image, gt)
        for recipe in recipes:
            lq = cache / recipe.set / f"{photo.name}.png"
            wanted = digest(key, recipe.set, str(seed), recipe.code)
            note = read_note(lq)
            if note.get("key") != wanted:
                try:
                    degraded, severity = recipe.make(image, photo.name, seed)
                except MissingPackageError as error:
                    made.missing[error.args] += 1
                    continue
                except ValueError as error:
                    made.failed[f"{recipe.set}/{photo.name}"] = str(error)
                    continue
                note = {"key": wanted, "severity": severity}
                save_picture(lq, to_picture(degraded), note)
            reference = lq if recipe.is_reference else gt
            made.cases.append(
                Case(
                    recipe.set, photo.name, recipe.kind, reference, lq, note["severity"],
                    photo.decided_on,
                )
            )  # fmt: skip
    return made


def keep(image: Tensor, path: Path) -> str:
    """Saves a picture where it is not there yet; returns the digest of its pixels."""
    picture = to_picture(image)
    key = digest(picture.tobytes(), str(image.shape))
    made_once(path, key, lambda: picture)
    return key


def synthetic(clean: Path, cache: Path, limit: int, seed: int) -> Cases:
    """The project's own test sets, one per kind, of the first `limit` photos (0: all)."""
    code = degradations_digest()
    recipes = [Recipe(kind, kind, partial(make_lq, kind), code) for kind in KINDS]
    return from_recipes(clean_photos(clean)[: limit or None], cache, recipes, seed)
