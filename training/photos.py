"""Photo files, loose or in tar shards: listing, decoding, and a store of bounded size."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

SHARD_SUFFIXES = frozenset({".tar", ".pack"})
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a bad file raises."""
_EXIF_ORIENTATION, _TURNED = 0x0112, 5
_MOST_NAMED = 20
ItemT = TypeVar("ItemT")
ReadT = TypeVar("ReadT")


@dataclass(frozen=True, order=True)
class ShardMember:
    """One file inside an uncompressed tar, read in place."""

    shard: Path
    name: str
    offset: int
    size: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes; `mode` is there for the likeness to `Path.open`."""
        with self.shard.open("rb") as stream:
            stream.seek(self.offset)
            return io.BytesIO(stream.read(self.size))

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


PhotoFile = Path | ShardMember


def fingerprint(files: Iterable[PhotoFile]) -> str:
    """Short hash of the files' names and sizes, in their order."""
    total = hashlib.blake2b(digest_size=6)
    for file in files:
        size = file.size if isinstance(file, ShardMember) else file.stat().st_size
        total.update(f"{Path(file.name).name} {size}\n".encode())
    return total.hexdigest()


def shard_key(member: ShardMember) -> tuple[str, str]:
    """(key, extension) by the rule of webdataset: the name is split at its first dot."""
    path = PurePosixPath(member.name)
    key, _, extension = path.name.partition(".")
    return str(path.parent / key), extension.lower()


def list_shards(source: Path) -> list[Path]:
    """The tar shards that `source` is, or that lie in that folder."""
    if source.is_dir():
        return sorted(source.rglob("*.tar"))
    return [source] if source.suffix.lower() in SHARD_SUFFIXES and source.is_file() else []


def list_members(shard: Path) -> list[ShardMember]:
    """Files of an uncompressed tar, in their order there; raises ValueError where it is none, or
    cut off.

    Only the headers are read. With each member's place known, samples are read at random access: a
    run resumes exactly, which a stream of shards could not promise, and needs no package.
    """
    with shard.open("rb") as stream:
        whole = shard.stat().st_size % tarfile.BLOCKSIZE == 0
        stream.seek(-min(shard.stat().st_size, 2 * tarfile.BLOCKSIZE), io.SEEK_END)
        whole = whole and not any(stream.read())
    try:
        with tarfile.open(shard, "r:") as tar:
            if not whole:
                raise tarfile.ReadError("its end is missing")
            return [
                ShardMember(shard, info.name, info.offset_data, info.size)
                for info in tar
                if info.isfile()
            ]
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no whole, uncompressed tar ({error}); copy or make it again"
        ) from None


def is_photo(name: str) -> bool:
    """Whether a file name ends as photos do."""
    return PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES


def list_photos(source: Path) -> Sequence[PhotoFile]:
    """Photo files named by a source, in a fixed order: a folder (searched recursively; shards in it
    count where it has no loose photo), a tar shard (webdataset: `<key>.jpg`), a text file with one
    path per line (`#` starts a comment), or a CSV file with a column `path` and, optionally, a
    column `part` of which the rows `train` are taken. Paths are relative to the list's folder.

    Raises ValueError where the source does not exist, has no `path` column, or names no photo.
    """
    if not source.exists():
        raise ValueError(
            f"photos: {source} does not exist; give a folder, a text list, a CSV manifest or a "
            "tar shard"
        )
    if source.is_dir():
        files = [p for p in source.rglob("*") if is_photo(p.name) and p.is_file()]
        accepted = f"a folder with photos ({', '.join(sorted(PHOTO_SUFFIXES))}) or tar shards"
    elif source.suffix.lower() in SHARD_SUFFIXES:
        files = []
        accepted = "a tar shard with photos (<key>.jpg, not the pairs <key>.lq.* and <key>.gt.*)"
    elif source.suffix.lower() == ".csv":
        with source.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise ValueError(
                    f"photos: {source} has the columns {reader.fieldnames}; a manifest needs `path`"
                )
            rows = [row for row in reader if row.get("part", "train") == "train"]
        files = [source.parent / row["path"] for row in rows]
        accepted = "a CSV manifest with rows (of part `train`, where it has that column)"
    else:
        lines = (line.strip() for line in source.read_text(encoding="utf-8").splitlines())
        files = [source.parent / line for line in lines if line and not line.startswith("#")]
        accepted = "a text list with one path per line"
    if files:
        return sorted(files)
    members = [member for shard in list_shards(source) for member in list_members(shard)]
    photos = [member for member in members if is_photo(member.name)]
    if packed := [photo for photo in photos if not shard_key(photo)[1].startswith(("lq.", "gt."))]:
        return sorted(packed)
    raise ValueError(f"photos: found no photo in {source}; give {accepted}")


def read_photo(file: PhotoFile) -> Tensor:
    """Decodes a photo upright into (3, H, W) uint8; raises ValueError for 32 bits per pixel of one
    channel, whose range is anyone's guess."""
    with file.open("rb") as stream, Image.open(stream) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):  # `convert` would cut off all above 255
            grey = np.asarray(upright).astype(np.uint16) >> 8
            upright = Image.fromarray(grey.astype(np.uint8))
        elif upright.mode in ("I", "F"):
            raise ValueError(f"mode {upright.mode} (32 bits) is no photo; give 8 or 16 bits")
        upright = upright.convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def photo_size(file: PhotoFile) -> tuple[int, int]:
    """(width, height) of an upright photo, from its header."""
    with file.open("rb") as stream, Image.open(stream) as picture:
        turned = picture.getexif().get(_EXIF_ORIENTATION, 1) >= _TURNED
        return (picture.height, picture.width) if turned else (picture.width, picture.height)


def decoded_bytes(file: PhotoFile) -> int:
    """Memory that a decoded photo takes."""
    width, height = photo_size(file)
    return 3 * width * height


class PhotoStore:
    """Decodes photos, and keeps those that fit into `limit_mb`.

    What is kept is decided once, before the data processes start, so that they share it. Nothing is
    dropped for what comes later: of photos drawn at random, any choice is found as often.
    """

    def __init__(self, limit_mb: int = 4096) -> None:
        self._kept: dict[PhotoFile, Tensor] = {}
        self._limit = limit_mb * 2**20
        self._keeping = False
        self._named: set[str] = set()

    def read(self, file: PhotoFile) -> Tensor:
        """(3, H, W) uint8; the same tensor again where it was kept."""
        if (kept := self._kept.get(file)) is not None:
            return kept
        photo = read_photo(file)
        if self._keeping:
            self._kept[file] = photo
        return photo

    def usable(
        self,
        what: str,
        items: Sequence[ItemT],
        read: Callable[[ItemT], object],
        measure: Callable[[ItemT], int],
    ) -> list[ItemT]:
        """Leaves out items that cannot be read, and names and counts them in warnings, which call
        them `what`.

        All headers are looked at. Items are read in full, and kept, while there is room; what is
        wrong with the content of the others is met by `draw`. Raises ValueError, with the reason of
        the first, where no item is usable.

        Args:
            items: Photos or pairs, in the order in which they are kept.
            read: Reads and checks one item through this store.
            measure: Memory of one decoded item in bytes, from its header.
        """

        def attempt(function: Callable[[ItemT], ReadT], places: Sequence[int]) -> dict[int, ReadT]:
            def one(place: int) -> ReadT | None:
                try:
                    return function(items[place])
                except UNREADABLE as error:
                    faults[place] = error
                    return None

            bar = tqdm(pool.map(one, places), what, len(places), leave=False, delay=3, disable=None)
            results = zip(places, bar, strict=True)
            return {place: value for place, value in results if value is not None}

        faults: dict[int, Exception] = {}
        free = self._limit - sum(photo.nbytes for photo in self._kept.values())
        kept: list[int] = []
        self._keeping = True
        with ThreadPoolExecutor() as pool:
            for place, size in attempt(measure, range(len(items))).items():
                if size <= free:
                    kept.append(place)
                    free -= size
            attempt(read, kept)
        self._keeping = False
        for place in sorted(faults)[:_MOST_NAMED]:
            log.warning("%s: left out %s: %s", what, items[place], faults[place])
        if faults:
            log.warning("%s: left out %d unusable of %d", what, len(faults), len(items))
        if len(faults) == len(items):
            raise ValueError(
                f"{what}: none of the {len(items)} is usable; the first, {items[0]}: {faults[0]}"
            )
        return [item for place, item in enumerate(items) if place not in faults]

    def draw(
        self, what: str, items: Sequence[ItemT], index: int, read: Callable[[ItemT], ReadT]
    ) -> ReadT:
        """Reads an item, or the next in order that is usable; a warning names the others. Raises
        ValueError where none is."""
        if not 0 <= index < len(items):
            raise IndexError(index)
        for offset in range(len(items)):
            item = items[(index + offset) % len(items)]
            try:
                return read(item)
            except UNREADABLE as error:
                if str(item) not in self._named:
                    self._named.add(str(item))
                    log.warning("%s: left out %s: %s", what, item, error)
        raise ValueError(f"{what}: none of {len(items)} is usable any more")


class CleanPhotos(Sequence[Tensor]):
    """Clean photos, (3, H, W) uint8; decoded at once as far as the store has room, else when drawn.

    Files that cannot be read are named in a warning and left out. Raises ValueError where the
    source names no photo, or none can be read.
    """

    def __init__(self, source: Path | str, store: PhotoStore | None = None) -> None:
        self._store = store or PhotoStore()
        listed = list_photos(Path(source))
        self.paths = self._store.usable("photos", listed, self._store.read, decoded_bytes)

    @classmethod
    def of(cls, paths: Sequence[PhotoFile], store: PhotoStore) -> CleanPhotos:
        """Photos that are known to be readable."""
        photos = object.__new__(cls)
        photos.paths, photos._store = list(paths), store
        return photos

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._store.draw("photos", self.paths, index, self._store.read)

    def subset(self, indices: Sequence[int]) -> CleanPhotos:
        """The photos at `indices`, sharing their memory."""
        return CleanPhotos.of([self.paths[index] for index in indices], self._store)
