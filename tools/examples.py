"""Photos to try the workflows on, for a server whose input folder is empty."""

from __future__ import annotations

from pathlib import Path

from tools.demo import LONG_SIDE, SAMPLES, degrade_photo
from tools.photo import read_photo

FIRST, FIRST_KIND = "example.png", "rain"
"""What every workflow opens; ComfyUI has a picture of this name in its own input folder."""
CLEAN, CLEAN_KIND = "clean.png", "jpeg"
"""A photo without damage, for measure_restoration, and the sample that it comes from."""
FOLDER = "photos"
"""What restore_folder opens."""


def write_examples(folder: Path, long_side: int = LONG_SIDE) -> None:
    """Write the demo's photos, degraded, one per kind, into an input folder; keeps what is there.

    Args:
        folder: ComfyUI's input folder. Gets example.png, a cat in the rain, photos/<kind>.png, and
            clean.png, which is not degraded.
        long_side: Of the photos, pixels.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        clean = read_photo(sample.photo, long_side)
        if sample.kind == CLEAN_KIND and not (folder / CLEAN).exists():
            clean.save(folder / CLEAN)
        places = [folder / FOLDER / f"{sample.kind}.png"]
        places += [folder / FIRST] if sample.kind == FIRST_KIND else []
        missing = [place for place in places if not place.exists()]
        if missing:
            photo = degrade_photo(clean, sample)
            for place in missing:
                photo.save(place)
