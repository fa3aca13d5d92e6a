"""Photos to try the workflows on, for a server whose input folder is empty."""

from __future__ import annotations

from pathlib import Path

from tools.demo import LONG_SIDE, SAMPLES, degrade_photo
from tools.restore import read_photo

FIRST, FIRST_KIND = "example.png", "rain"
"""What every workflow opens; ComfyUI has a picture of this name in its own input folder."""
FOLDER = "photos"
"""What restore_folder opens."""


def write_examples(folder: Path, long_side: int = LONG_SIDE) -> None:
    """Write the demo's degraded photos, one per kind, into an input folder; keeps what is there.

    Args:
        folder: ComfyUI's input folder. Gets example.png, a cat in the rain, and photos/<kind>.png.
        long_side: Of the photos, pixels.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        places = [folder / FOLDER / f"{sample.kind}.png"]
        places += [folder / FIRST] if sample.kind == FIRST_KIND else []
        missing = [place for place in places if not place.exists()]
        if missing:
            photo = degrade_photo(read_photo(sample.photo, long_side), sample)
            for place in missing:
                photo.save(place)
