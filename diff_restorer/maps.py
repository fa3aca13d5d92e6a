"""Pictures in parts: windows on them, and maps of their features outside of a device's memory."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

UNIT = 8
"""Pixels per latent pixel; tiles and margins are whole numbers of units."""


@dataclass(frozen=True)
class Window:
    """A part of the picture, in units."""

    top: int
    left: int
    height: int
    width: int

    def grown(self, margin: int, height: int, width: int) -> Window:
        """With `margin` units more on each side, within a picture of `height` x `width` units."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        bottom = min(height, self.top + self.height + margin)
        right = min(width, self.left + self.width + margin)
        return Window(top, left, bottom - top, right - left)

    def inside(self, outer: Window) -> Window:
        """The same part, counted from the corner of `outer`."""
        return Window(self.top - outer.top, self.left - outer.left, self.height, self.width)

    def of(self, value: Tensor, scale: int) -> Tensor:
        """This part of (..., H, W) with `scale` pixels per unit."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        return value[..., rows, self.left * scale : (self.left + self.width) * scale]


class Map:
    """A picture or its features, (1, C, H, W): all of it, in memory or in a file."""

    def __init__(self, value: Tensor, scale: int) -> None:
        """Takes a tensor of `scale` pixels per unit."""
        self.scale = scale
        self._value = value
        self._file: mmap.mmap | None = None

    @classmethod
    def empty(
        cls,
        channels: int,
        scale: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        folder: Path | None,
    ) -> Map:
        """A map to be written.

        Args:
            channels: C.
            scale: Pixels per unit.
            size: (height, width) of the picture in units.
            dtype: Of what is kept.
            folder: Keep it in a nameless file here, which vanishes with the map; None: in memory.

        Raises:
            OSError: The folder's disk is too small.
        """
        height, width = (side * scale for side in size)
        if folder is None:
            return cls(torch.empty(1, channels, height, width, dtype=dtype), scale)
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), channels * height * width * dtype.itemsize, folder)
            pages = mmap.mmap(file.fileno(), 0)
        # Rows first: a tile then lies in few places of the file.
        rows = torch.frombuffer(pages, dtype=dtype).view(height, channels, width)
        made = cls(rows.permute(1, 0, 2)[None], scale)
        made._file = pages
        return made

    @property
    def channels(self) -> int:
        """C."""
        return self._value.shape[1]

    def blank(self, like: Tensor) -> Tensor:
        """One unit of nothing."""
        return like.new_zeros(1, self.channels, self.scale, self.scale)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in units."""
        height, width = self._value.shape[-2:]
        return height // self.scale, width // self.scale

    def read(self, window: Window, like: Tensor) -> Tensor:
        """A part of it, on the device and in the dtype of `like`."""
        part = window.of(self._value, self.scale)
        part = part.to(like.device, like.dtype, memory_format=torch.contiguous_format, copy=True)
        self._forget()
        return part

    def kept(self, part: Tensor) -> Tensor:
        """As it would be kept; what fp16 cannot hold becomes its largest number."""
        if self._value.dtype == torch.float16 != part.dtype:
            part = part.clamp(-_LARGEST_HALF, _LARGEST_HALF)
        return part.to(self._value, copy=True)

    def write(self, window: Window, part: Tensor) -> None:
        """Fills a part of it with what `kept` gave."""
        window.of(self._value, self.scale).copy_(part)
        self._forget()

    def whole(self) -> Tensor:
        """All of it, as it is kept."""
        return self._value

    def _forget(self) -> None:
        """Pages of the file need not stay in this process's memory."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


_LARGEST_HALF = torch.finfo(torch.float16).max


def _reserve(file: int, size: int, folder: Path) -> None:
    """Give a file its bytes at once: a full disk would later kill the process on a write."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"tiles of this picture need {size / 1e9:.1f} GB of disk in {folder}, which has "
            f"{free / 1e9:.1f} GB ({error.strerror}). Make room there, or take a smaller picture.",
        ) from error


@dataclass(frozen=True)
class Cut:
    """How pictures are cut and where their maps are kept."""

    tile: int
    """Side of a tile in units, without its margin."""
    like: Tensor
    """Any tensor of the device and dtype to compute in."""
    folder: Path | None = None
    """For maps, see `Map.empty`."""
    on_tile: Callable[[], None] = lambda: None
    """Called before each tile; may raise to stop."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps: what is computed in, but fp32 is kept in files as fp16.

        Measured on one photo with Nano 7, largest difference to the whole picture in levels of 255:
        3e-5 in fp32, 0.25 in bf16; with fp16 maps of an fp32 network up to 4 at random weights.
        """
        on_disk = self.folder is not None and self.like.dtype == torch.float32
        return torch.float16 if on_disk else self.like.dtype

    def windows(self, size: tuple[int, int]) -> list[Window]:
        """The tiles of a picture, (height, width) in units; all of nearly the same size."""
        rows, columns = (_spans(side, self.tile) for side in size)
        return [Window(top, left, height, width)
                for (top, height), (left, width) in itertools.product(rows, columns)]  # fmt: skip


def _spans(side: int, longest: int) -> list[tuple[int, int]]:
    count = math.ceil(side / longest)
    edges = [round(side * place / count) for place in range(count + 1)]
    return [(start, end - start) for start, end in itertools.pairwise(edges)]
