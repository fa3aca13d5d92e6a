"""Reading safetensors without trusting them: the header decides, tensors are copied and checked.

A memory map would spare the copy, but a mapped file that is overwritten in place kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

FORMAT_HEADER = 10**8
"""Bytes of JSON that the format allows."""
MOST_HEADER, MOST_TENSORS, MOST_BYTES = 2**23, 2**13, 2**35
"""Of a file of network weights; Stable Diffusion 1.5 with everything takes a tenth of each."""
MOST_NAME, MOST_INDEX, MOST_SIDES = 200, 100, 6
"""Length of a tensor's name, the numbers in it, such as those of layers, and its dimensions."""
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""In which weights may be."""
PIECE = 2**21
"""Bytes that are read at once."""
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(ValueError):
    """A file that cannot be used as a Diff-Restorer model; the message names the file."""


class TruncatedCheckpointError(CheckpointError):
    """The file ends before its header says it should."""


class UnsupportedCheckpointError(CheckpointError):
    """The file is of another kind: a pickle, another model, damaged metadata."""


class CheckpointKeysError(CheckpointError):
    """Tensors of the file do not fit the module that they are meant for."""

    @classmethod
    def of(
        cls,
        path: Path | str,
        part: str,
        missing: Iterable[str],
        unexpected: Iterable[str],
        remedy: str = "Export the file again.",
    ) -> CheckpointKeysError:
        """The error for one part of one file, with the first keys of each sort."""
        lists = [
            f"{label}: {', '.join(map(shortened, names[:5]))}{' ...' if len(names) > 5 else ''}"
            for label, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
            if names
        ]
        return cls(f"{path}: the {part} does not fit ({'; '.join(lists)}). {remedy}")


class CheckpointValuesError(CheckpointError):
    """Weights that are no numbers."""


def check_fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    part: str,
    remedy: str = "Export the file again.",
) -> None:
    """Compare the keys and sizes of a part of a file with those of its network.

    The one definition of a strict load; values need not be there yet (device meta).

    Args:
        module: Shall take the tensors.
        state: By the module's keys.
        path: Their file.
        part: Its name, for the error.
        remedy: What to do about it, for the error.

    Raises:
        CheckpointKeysError: Keys or sizes differ.
    """
    own = module.state_dict()
    misfits = [
        f"{key} {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected or misfits:
        raise CheckpointKeysError.of(path, part, missing, [*unexpected, *misfits], remedy)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a file says it holds; sums of bytes are right."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    stamp: tuple[int, int]
    """Tells whether the file is still the same, see `stamp_of`."""


def shortened(text: object) -> str:
    """What a file says, for a message: names may be as long as the file."""
    words = str(text)
    return words if len(words) <= 80 else f"{words[:60]}... ({len(words):,} characters)"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def stamp_of(file: BinaryIO) -> tuple[int, int]:
    """Size of an open file, and when it was written."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def read_header(path: Path, most: int = FORMAT_HEADER) -> Header:
    """What a safetensors file says it holds.

    Args:
        path: The file.
        most: Bytes of header to accept.

    Raises:
        FileNotFoundError: There is no such file.
        TruncatedCheckpointError: The file is incomplete.
        UnsupportedCheckpointError: The file is a pickle or something else.
    """
    if not path.is_file():  # a FIFO would be waited for
        if path.exists():
            raise UnsupportedCheckpointError(
                f"{path}: a folder or device, expected a .safetensors file. Name the file itself."
            )
        raise FileNotFoundError(f"{path}: no such file.")

    def unsupported(found: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            f"{path}: not a safetensors file ({found}). Diff-Restorer files end in .safetensors "
            "and go to models/diff_restorer; download or copy it again."
        )

    with path.open("rb") as file:
        stamp, head = stamp_of(file), file.read(8)
        begin = file.read(1)
        # A header of 640 bytes begins like a pickle, too; the JSON in it does not.
        if begin != b"{" and head.startswith(_PICKLES):
            raise UnsupportedCheckpointError(
                f"{path}: a PyTorch pickle, whatever its name says. Only safetensors is accepted, "
                "because pickles can run code when they are opened."
            )
        size, length = stamp[0], int.from_bytes(head, "little")
        start = 8 + length
        if begin not in (b"", b"{") or (size >= start and length > most):
            raise unsupported(f"its header is {length:,} bytes long and begins with {begin!r}")
        if len(head) < 8 or size < start:
            raise _truncated(path, size)
        text = begin + file.read(length - 1) if length else b""
    try:
        parsed = parse_json(text)
        entries, metadata = _entries(parsed, start)
    except ValueError as error:
        raise unsupported(f"its header cannot be read: {shortened(error)}") from error
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end or entry.end < end:
            raise unsupported(f"bytes of tensor {shortened(name)} overlap others or leave a gap")
        end = entry.end
    if size < end:
        raise _truncated(path, size, end)
    if size > end:
        raise unsupported(f"{size - end:,} bytes follow after the last tensor")
    return Header(entries, metadata, stamp)


def _truncated(path: Path, size: int, needed: int | None = None) -> TruncatedCheckpointError:
    of = "" if needed is None else f" of {needed:,}"
    return TruncatedCheckpointError(
        f"{path}: incomplete, only {size:,} bytes{of} are there. Download or copy it again."
    )


def _entries(header: Any, start: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The parsed header in our terms.

    Raises:
        ValueError: It is not as the format has it.
    """
    if not isinstance(header, dict):
        raise ValueError("expected a JSON object")
    parts = cast("dict[str, Any]", header)
    metadata = cast("dict[str, Any]", parts.pop("__metadata__", {}))
    if type(metadata) is not dict or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("expected metadata of strings")
    entries: dict[str, Entry] = {}
    for name, entry in parts.items():
        try:
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], entry["shape"]
            numbers = (begin, end, *shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"tensor {shortened(name)} has no dtype, shape and two data_offsets"
            ) from None
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"sizes of tensor {shortened(name)} are no whole numbers")
        entries[name] = Entry(str(dtype), tuple(shape), start + begin, start + end)
    return entries, metadata


def check_weights(path: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse what no network has, before a byte of it is read.

    Raises:
        UnsupportedCheckpointError: The message names the tensor.
    """
    total = sum(entry.size for entry in entries.values())
    if len(entries) > MOST_TENSORS or total > MOST_BYTES:
        raise UnsupportedCheckpointError(
            f"{path}: {len(entries):,} tensors with {total:,} bytes, expected at most "
            f"{MOST_TENSORS:,} with {MOST_BYTES:,}. This is no Diff-Restorer file."
        )
    for name, entry in entries.items():
        if oddity := _oddity(name, entry):
            raise UnsupportedCheckpointError(
                f"{path}: tensor {shortened(name)} {oddity}. Export or download the file again."
            )


def _oddity(name: str, entry: Entry) -> str | None:
    indices = [int(part) for part in name[:MOST_NAME].split(".") if part.isdecimal()]
    if len(name) > MOST_NAME:
        return f"has a name of more than {MOST_NAME} characters"
    if any(index > MOST_INDEX for index in indices):
        return f"has the number {max(indices)} in its name, expected at most {MOST_INDEX} layers"
    if entry.dtype not in DTYPES:
        return f"is of type {shortened(entry.dtype)}, expected one of {', '.join(DTYPES)}"
    if 0 in entry.shape or len(entry.shape) > MOST_SIDES:
        sizes = shortened(list(entry.shape))
        return f"has the shape {sizes}, expected up to {MOST_SIDES} sizes from 1 on"
    needed = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if entry.size != needed:
        shape = shortened(list(entry.shape))
        return f"has {entry.size:,} bytes, which its shape {shape} does not take"
    return None


def read_tensors(
    path: Path, header: Header, keys: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors of a file that `check_weights` has let pass, in memory of their own.

    Args:
        path: The file.
        header: From `read_header`.
        keys: Which tensors.
        dtype: Number format to convert each one to as it is read; None keeps that of the file.

    Raises:
        CheckpointValuesError: Values are not finite.
        UnsupportedCheckpointError: The file is not the one any more whose header was read.
    """
    tensors: dict[str, Tensor] = {}
    unfit: str | None = None
    with path.open("rb", buffering=0) as file:
        for key in keys:
            entry = header.entries[key]
            stored = DTYPES[entry.dtype]
            tensors[key] = torch.empty(entry.shape, dtype=dtype or stored)
            if not _read(file, entry.begin, stored, tensors[key].reshape(-1)):
                unfit = key
                break
        if stamp_of(file) != header.stamp:
            raise UnsupportedCheckpointError(
                f"{path}: changed while it was being read. Run again when it is written."
            )
    if unfit is not None:
        raise CheckpointValuesError(
            f"{path}: tensor {unfit} holds NaN or infinite values, so that all pictures would be "
            "black. Export or download the file again."
        )
    return tensors


def _read(file: Any, begin: int, stored: torch.dtype, values: Tensor) -> bool:
    """Fill `values`, (numbers,), from a place in a file; whether they are there and finite.

    Piece by piece, each of which is checked and converted while the processor's cache holds it.
    """
    step, converts = PIECE // stored.itemsize, values.dtype != stored
    scratch = torch.empty(min(step, len(values)) if converts else 0, dtype=stored)
    file.seek(begin)
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        raw = scratch[: len(piece)] if converts else piece
        rest: memoryview = raw.view(torch.uint8).numpy().data
        while rest:
            count = file.readinto(rest)
            if not count:
                return False
            rest = rest[count:]
        if not is_finite(raw):
            return False
        if converts:
            piece.copy_(raw)
    return True


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    By their sum, which takes a tenth of the time; that of finite values may overflow, too.
    """
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
