"""Finds the pairs of sets of degraded and clean photos, in the layouts of their publishers."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diff_restorer.degradations import ALL_KINDS, KINDS

from .photos import PhotoFile, ShardMember, is_photo, list_members, list_shards, shard_key

log = logging.getLogger(__name__)

_MOST_NAMED = 5
_KIND_NAMES = {
    "noise": "noise noisy denoise denoising",
    "blur": "blur blurry motion_blurry motion_blur deblur deblurring defocus",
    "jpeg": "jpeg jpeg_compressed jpg compressed",
    "low_light": "low_light lowlight dark",
    "haze": "haze hazy dehaze dehazing fog",
    "rain": "rain rainy derain deraining",
    "snow": "snow snowy desnow desnowing",
    "raindrop": "raindrop raindrops",
    "low_res": "low_res lowres low_resolution super_resolution sr",
}
_KIND_OF_NAME = {name: kind for kind, names in _KIND_NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Pair:
    """A degraded photo, the same photo clean, and what was done to it."""

    lq: PhotoFile
    gt: PhotoFile
    kind: str

    def __str__(self) -> str:
        return f"{self.lq} with {self.gt}"


@dataclass(frozen=True)
class Layout:
    """Which folders hold the two halves, and how their names agree."""

    degraded: tuple[str, ...]
    """Folder names; an empty one stands for files that their own name alone tells apart."""
    clean: tuple[str, ...]
    partners: Callable[[str], Sequence[str]]
    """Degraded stem -> stems that the clean half may have, the best first."""
    kind: str | None
    """Kind of all pairs; None: the folder above says it."""
    form: str
    """What it looks like, for messages."""

    def place(self, folders: tuple[str, ...]) -> _Place | None:
        """Where a photo in these folders stands in a set of this layout, if anywhere."""
        for depth in reversed(range(len(folders))):
            name, inside = folders[depth].lower(), Path(*folders[depth + 1 :])
            if name in self.degraded:
                return _Place("lq", Path(*folders[:depth]), inside)
            if name in self.clean:
                return _Place("gt", Path(*folders[:depth]), inside)
        return _Place("either", Path(*folders), Path()) if "" in self.degraded else None


@dataclass(frozen=True)
class _Place:
    half: Literal["lq", "gt", "either"]
    shared: Path
    """The folder that both halves share."""
    inside: Path
    """The subfolder of the half."""


def kind_of(name: str) -> str | None:
    """Our kind for a foreign name such as `motion-blurry`, `hazy` or `noise_real`; else None."""
    plain = re.sub(r"[^a-z]+", "_", name.lower()).strip("_")
    return next((_KIND_OF_NAME[part] for part in _shortened(plain) if part in _KIND_OF_NAME), None)


def _shortened(stem: str) -> list[str]:
    """`a_b_c`, `a_b`, `a`."""
    parts = stem.split("_")
    return ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _same(stem: str) -> list[str]:
    return [stem]


def _normal(stem: str) -> list[str]:
    """LOL v2: low00001 <-> normal00001."""
    return [stem, re.sub("^low", "normal", stem)]


def _no_rain(stem: str) -> list[str]:
    """rain-001 or norain-001x2 <-> norain-001."""
    number = re.fullmatch(r"(?:no)?rain-(\d+)(?:x\d)?", stem)
    return [f"norain-{number[1]}", stem] if number else [stem]


def _clean_glass(stem: str) -> list[str]:
    """0_rain <-> 0_clean."""
    return [stem.removesuffix("_rain") + "_clean"] if stem.endswith("_rain") else []


def _high_resolution(stem: str) -> list[str]:
    """Canon_001_LR4 <-> Canon_001_HR."""
    scaled = re.fullmatch(r"(.+)_LR[2-4]", stem)
    return [f"{scaled[1]}_HR"] if scaled else []


LAYOUTS: dict[str, Layout] = {
    "gopro": Layout(
        ("blur", "blur_gamma"), ("sharp",), _same, "blur", "blur|blur_gamma/N <-> sharp/N"
    ),
    "lol": Layout(("low",), ("high", "normal"), _normal, "low_light", "low/N <-> high|normal/N"),
    "rain100": Layout(
        ("rain", "rainy", ""),
        ("norain", "gt", ""),
        _no_rain,
        "rain",
        "[rain|rainy/]rain-N or rain/X2/norain-Nx2 <-> [norain|gt/]norain-N",
    ),
    "reside": Layout(
        ("hazy", "haze"), ("clear", "gt"), _shortened, "haze", "hazy|haze/N_0.8_0.2 <-> clear|gt/N"
    ),
    "snow100k": Layout(("synthetic",), ("gt",), _same, "snow", "synthetic/N <-> gt/N"),
    "raindrop": Layout(("data",), ("gt",), _clean_glass, "raindrop", "data/N_rain <-> gt/N_clean"),
    "realsr": Layout(("",), ("",), _high_resolution, "low_res", "N_LR2|3|4 <-> N_HR"),
    "daclip": Layout(
        ("lq", "input"), ("gt", "target"), _same, None, "KIND/LQ|input/N <-> KIND/GT|target/N"
    ),
}
"""Published layouts: GoPro, LOL, Rain100 (and Rain200), RESIDE (ITS, OTS, SOTS, 6k), Snow100K,
RainDrop, RealSR, and `type/LQ|GT` of DA-CLIP."""


def find_pairs(source: Path, layout: str | None = None, kind: str | None = None) -> list[Pair]:
    """Pairs of one set, in a fixed order; files without a partner are named and counted.

    Args:
        source: A folder in one of `LAYOUTS`, upper or lower case, or webdataset shards: a tar, or a
            folder of tars, with `<key>.lq.png`, `<key>.gt.png` and `<key>.cls` (a kind's name, or
            its place among the default kinds).
        layout: One of `LAYOUTS`; recognised by the pairs that it finds if not given.
        kind: Kind of all pairs, whatever the layout says.

    Raises:
        ValueError: There is no such folder or file, no layout or more than one finds pairs, or
            the folder that should say the kind does not.
    """
    if not source.exists():
        raise ValueError(f"pairs: {source} does not exist")
    files = sorted(f for f in source.rglob("*") if is_photo(f.name)) if source.is_dir() else []
    if not files and (shards := list_shards(source)):
        return _pairs_of_shards(shards, kind, source)
    names = (layout,) if layout else tuple(LAYOUTS)
    matched = {name: _match(LAYOUTS[name], source, files) for name in names}
    fitting = {name: match for name, match in matched.items() if match.pairs}
    if not fitting:
        forms = "; ".join(f"{name} ({LAYOUTS[name].form})" for name in names)
        raise ValueError(
            f"pairs: found no pair among the {len(files)} photos of {source}; looked for {forms}; "
            "and for tar shards with <key>.lq.png, <key>.gt.png and <key>.cls"
        )
    if len(fitting) > 1:
        counts = ", ".join(f"{name} ({len(match.pairs)} pairs)" for name, match in fitting.items())
        raise ValueError(
            f"pairs: {source} looks like {counts}; name one as {next(iter(fitting))}={source}, or "
            "give the folder of each set"
        )
    ((name, match),) = fitting.items()
    lonely, unused = match.lonely, match.unused
    for file in lonely[:_MOST_NAMED] + unused[:_MOST_NAMED]:
        log.warning("pairs: left out %s: found no partner (%s)", file, LAYOUTS[name].form)
    if lonely or unused:
        log.warning(
            "pairs: left out %d degraded and %d clean photos of %s, which have no partner",
            len(lonely), len(unused), source,
        )  # fmt: skip
    log.info("pairs: %s has %d pairs in the layout of %s", source, len(match.pairs), name)
    return _with_kinds(match.pairs, kind or LAYOUTS[name].kind, source)


@dataclass(frozen=True)
class _Match:
    pairs: list[tuple[Path, Path, str]]
    """Degraded file, clean file, and the name of the folder that both halves share."""
    lonely: list[Path]
    """Degraded files without a clean partner."""
    unused: list[Path]
    """Clean files without a degraded one."""


def _match(layout: Layout, source: Path, files: Sequence[Path]) -> _Match:
    degraded: list[tuple[Path, _Place]] = []
    clean: dict[tuple[Path, str], list[tuple[Path, Path]]] = defaultdict(list)
    folders = {file.parent for file in files}
    places = {folder: layout.place(folder.relative_to(source).parts) for folder in folders}
    for file in files:
        place = places[file.parent]
        if place and place.half != "gt":
            degraded.append((file, place))
        if place and place.half != "lq":
            clean[place.shared, file.stem].append((place.inside, file))
    match = _Match([], [], [])
    used: set[Path] = set()
    for file, place in degraded:
        # A file that its name alone tells apart is no partner of itself.
        stems = [
            stem for stem in layout.partners(file.stem) if place.half == "lq" or stem != file.stem
        ]
        if not stems:
            continue
        key = next(((place.shared, s) for s in stems if (place.shared, s) in clean), None)
        choices = clean[key] if key else []
        # Of several the one in the same subfolder; sets differ in the subfolders of their halves.
        exact = [pick for pick in choices if pick[0] == place.inside] or choices
        used.add(file)
        if len(exact) == 1:
            used.add(exact[0][1])
            match.pairs.append((file, exact[0][1], place.shared.name or source.resolve().name))
        else:
            match.lonely.append(file)
    match.unused.extend(f for several in clean.values() for _, f in several if f not in used)
    return match


def _with_kinds(
    named: Sequence[tuple[PhotoFile, PhotoFile, str]], kind: str | None, source: Path
) -> list[Pair]:
    """Pairs of the given kind, or of the kinds that their own names say."""
    pairs: list[Pair] = []
    unknown: dict[str, int] = defaultdict(int)
    for lq, gt, name in named:
        if own := kind or kind_of(name):
            pairs.append(Pair(lq, gt, own))
        else:
            unknown[name] += 1
    foreign = ", ".join(f"{name!r} ({count} pairs)" for name, count in unknown.items())
    hint = f"known are {', '.join(ALL_KINDS)} and names such as hazy; or give them as KIND={source}"
    if unknown and not pairs:
        raise ValueError(f"pairs: {foreign} in {source} names no kind; {hint}")
    if unknown:
        log.warning("pairs: left out %s of %s, which name no kind; %s", foreign, source, hint)
    return pairs


def _pairs_of_shards(shards: Sequence[Path], kind: str | None, source: Path) -> list[Pair]:
    pairs: list[tuple[PhotoFile, PhotoFile, str]] = []
    incomplete: list[str] = []
    for shard in shards:
        samples: dict[str, dict[str, ShardMember]] = defaultdict(dict)
        for member in list_members(shard):
            key, extension = shard_key(member)
            samples[key][extension.partition(".")[0]] = member
        for key, parts in samples.items():
            if not {"lq", "gt"} <= parts.keys() or not (kind or "cls" in parts):
                incomplete.append(f"{shard}:{key} has {', '.join(parts)}")
                continue
            name = kind or parts["cls"].open().read().decode("utf-8", "replace").strip()
            if name.isdecimal() and int(name) < len(KINDS):
                name = KINDS[int(name)]
            pairs.append((parts["lq"], parts["gt"], name))
    for text in incomplete[:_MOST_NAMED]:
        log.warning("pairs: left out %s; a pair needs lq.png, gt.png and cls", text)
    if incomplete:
        log.warning("pairs: left out %d incomplete samples of %s", len(incomplete), source)
    if not pairs:
        raise ValueError(
            f"pairs: {source} has no sample of <key>.lq.png, <key>.gt.png and <key>.cls"
        )
    return _with_kinds(pairs, kind, source)
