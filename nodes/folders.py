"""The node that hands on the photos of a folder, one for each run."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageOps
from torch import Tensor

from . import host
from .checks import checked
from .sockets import CATEGORY, found_by

DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, OverflowError),
    *(EOFError, ArithmeticError, RuntimeError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged data."""
NO_FOLDER = "(make a folder in ComfyUI's input folder)"


def load_photo(path: Path) -> Tensor:
    """A photo upright, (1, H, W, 3 or 4) in [0, 1]; raises ValueError for a file that is damaged or
    no photo."""
    try:
        with Image.open(path) as stored:
            pixels = _pixels(ImageOps.exif_transpose(stored))
    except DAMAGED as error:
        # Pillow's own message names the stream, not the file.
        kind = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(
            f"folder: {path} is not a photo that can be read ({kind}). Take it out of the folder, "
            "or go on with the next index."
        ) from error
    return torch.from_numpy(pixels)[None]


def _pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3 or 4) in [0, 1]."""
    if picture.mode.startswith("I"):  # 16 bits of grey
        grey = np.asarray(picture).astype(np.float32)[..., None] / 65535
        return np.repeat(grey, 3, axis=-1).clip(0, 1)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return np.asarray(picture.convert(mode)).astype(np.float32) / 255


class DiffRestorerFolderPhoto(io.ComfyNode):
    """Load Photo from Folder: the photos of a folder one after the other, one for each run.

    A list of all of them would go through the graph node by node: the first result would come with
    the last, and all would be in memory at once.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerFolderPhoto",
            display_name="Load Photo from Folder",
            category=CATEGORY,
            **found_by("batch", "folder", "directory", "many photos", "load images"),
            description=(
                "Loads one photo of a folder, in the order of the names. With index set to "
                "increment each run takes the next one: give Run the number of photos, and each "
                "is restored and saved before the next one is loaded."
            ),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=host.photo_folders() or [NO_FOLDER],
                    tooltip="A folder in ComfyUI's input folder. Press R to refresh the list.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Which photo; 0 is the first one. Set it to increment after a run.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The photo, with its transparency if it has any."
                ),
                io.String.Output(
                    display_name="name",
                    tooltip="Its name without the ending, such as for filename_prefix.",
                ),
                io.String.Output(
                    display_name="progress", tooltip="Which of how many, and its full name."
                ),
                io.Int.Output(display_name="count", tooltip="Number of photos in the folder."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, index: int | None = None) -> str:
        if folder is None or index is None or folder not in host.photo_folders():
            return "unknown"
        photos = host.photos_of_folder(folder)
        return f"{len(photos)} " + " ".join(map(host.file_stamp, photos[index : index + 1]))

    @classmethod
    @checked
    def execute(cls, folder: str, index: int) -> io.NodeOutput:
        photos = host.photos_of_folder(folder)
        if index >= len(photos):
            raise ValueError(
                f"index: {index}, but {folder} holds {len(photos)} photos, counted from 0. They "
                "are all done: set index to 0 to begin again."
            )
        path = photos[index]
        image = load_photo(path)
        progress = f"{index + 1} of {len(photos)}: {path.name}"
        shown = ui.PreviewImage(image, cls=cls)
        return io.NodeOutput(image, path.stem, progress, len(photos), ui=shown)
