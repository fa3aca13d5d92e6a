"""Photos to try the workflows on, for a server whose input folder is empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from tools.demo import LONG_SIDE, SAMPLES, Sample, degrade_photo
from tools.photo import read_photo

FIRST, FIRST_KIND = "example.png", "rain"
"""What every workflow opens; ComfyUI has a picture of this name in its own input folder."""
CLEAN, CLEAN_KIND = "clean.png", "jpeg"
"""A photo without damage, for measure_restoration, and the sample that it comes from."""
FOLDER = "photos"
"""What restore_folder opens."""
LARGE, LARGE_SIDES, LARGE_KINDS = "large.png", (1728, 1152), ("noise", "rain")
"""A page of six photos for restore_large, its pixels, and what its left and its right suffer from:
more than one tile, and corners that need different things."""
LARGE_SEVERITY = 0.6
FRAMES, FRAME_COUNT, FRAME_KIND = "frames", 8, "noise"
"""What restore_frames opens: a pan over a photo, each frame with grain of its own."""
_PAN = 48
"""Each frame begins 1/48 of the photo's width further right than the one before."""


def write_examples(folder: Path, long_side: int = LONG_SIDE) -> None:
    """Write the demo's photos, degraded, one per kind, into an input folder; keeps what is there.

    Args:
        folder: ComfyUI's input folder. Gets example.png, a cat in the rain, photos/<kind>.png,
            clean.png, which is not degraded, large.png and frames/<number>.png.
        long_side: Of the photos, pixels; large.png is smaller by as much as they are.
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
    if not (folder / LARGE).exists():
        scale = min(1.0, long_side / LONG_SIDE)
        large_page(*(round(side * scale) for side in LARGE_SIDES)).save(folder / LARGE)
    (folder / FRAMES).mkdir(exist_ok=True)
    for index, frame in enumerate(frames(long_side)):
        place = folder / FRAMES / f"{index:02}.png"
        if not place.exists():
            frame.save(place)


def sample_of(kind: str) -> Sample:
    """The demo's sample of a kind."""
    (found,) = (sample for sample in SAMPLES if sample.kind == kind)
    return found


def large_page(width: int, height: int) -> Image.Image:
    """Photos in two rows of three, at their own resolution; left and right are damaged."""
    page, columns = Image.new("RGB", (width, height)), 3
    size = (-(-width // columns), -(-height // 2))
    shown = ("noise", "haze", "rain", "low_light", "raindrop", "jpeg")
    for index, kind in enumerate(shown):
        row, column = divmod(index, columns)
        photo = ImageOps.fit(read_photo(sample_of(kind).photo, 0), size)
        page.paste(photo, (column * size[0], row * size[1]))
    for left, kind in zip((0, width - size[0]), LARGE_KINDS, strict=True):
        box = (left, 0, left + size[0], height)
        damage = replace(sample_of(kind), severity=LARGE_SEVERITY)
        page.paste(degrade_photo(page.crop(box), damage), box)
    return page


def frames(long_side: int) -> list[Image.Image]:
    """A pan from left to right; sides even, as most videos need them."""
    sample = sample_of(FRAME_KIND)
    photo = read_photo(sample.photo, long_side)
    step = photo.width // _PAN
    width, height = (photo.width - step * FRAME_COUNT) // 8 * 8, photo.height // 16 * 8
    top = photo.height // 16
    boxes = [(step * i, top, step * i + width, top + height) for i in range(FRAME_COUNT)]
    return [
        degrade_photo(photo.crop(box), replace(sample, seed=index))
        for index, box in enumerate(boxes)
    ]
