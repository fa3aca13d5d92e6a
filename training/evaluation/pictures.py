"""Pictures with a note: every result is a PNG that says what it was made from.

A result is used again where its key, a digest of everything that went into it, is still right. So
a run that was stopped goes on, and a changed photo, seed, weights file or program is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from diff_restorer.files import written_whole

NOTE = "diff-restorer"
"""Name of the PNG text chunk that holds the note."""


def digest(*parts: bytes | str) -> str:
    """16 hexadecimal digits of everything that a result depends on."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def file_digest(*paths: Path) -> str:
    """SHA-256 of the contents of files, in the given order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def weights_digest(path: Path) -> str:
    """SHA-256 of the tensors of a safetensors file; scores written into its metadata change none.

    Raises:
        ValueError: It is no such file.
    """
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
        header.pop("__metadata__", None)
        total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        return hashlib.file_digest(file, lambda: total).hexdigest()


def pixel_digest(path: Path) -> str:
    """Digest of what a picture shows, not of its note; of the bytes of any other file."""
    try:
        with Image.open(path) as picture:
            return digest(picture.convert("RGB").tobytes(), str(picture.size))
    except (OSError, SyntaxError):
        return digest(path.read_bytes())


def save_picture(path: Path, picture: Image.Image, note: dict[str, Any]) -> None:
    """Writes a PNG with a note; a reader sees the old file or the new one, never a part."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(NOTE, json.dumps(note))
    with written_whole(path) as part:
        picture.save(part, "PNG", pnginfo=chunk)


def read_note(path: Path) -> dict[str, Any]:
    """The note of a PNG of `save_picture`; empty where there is no such file or note."""
    try:
        with Image.open(path) as picture:
            return json.loads(getattr(picture, "text", {}).get(NOTE, "{}"))
    except (OSError, ValueError, SyntaxError):
        return {}


def made_once(path: Path, key: str, make: Callable[[], Image.Image]) -> None:
    """Saves a picture under its key, unless it is there and still right."""
    if read_note(path).get("key") != key:
        save_picture(path, make(), {"key": key})


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; a reader sees the old file or the new one."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is no such file or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def to_picture(image: Tensor) -> Image.Image:
    """(1, 3, H, W) or (3, H, W) in [0, 1] -> 8-bit RGB picture; values outside are clamped."""
    pixels = image.detach().float().reshape(3, *image.shape[-2:]).permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().cpu().numpy())


def to_image(picture: Image.Image) -> Tensor:
    """Picture -> (1, 3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].contiguous().float() / 255


def read_image(path: Path) -> Tensor:
    """The file as (1, 3, H, W) float32 in [0, 1]."""
    with Image.open(path) as picture:
        return to_image(picture)
