"""Photos to try the workflows on, for a server whose input folder is empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from tools.demo import LONG_SIDE, SAMPLES, degrade_photo, sample_of
from tools.photo import read

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

    ComfyUI's folder gets example.png, a cat in the rain, photos/<kind>.png, clean.png, which is not
    degraded, large.png and frames/<number>.png. The photos' long side is in pixels; large.png is
    smaller by as much as they are.
    """

    def put(name: str, picture: Image.Image) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            picture.save(place)

    for sample in SAMPLES:
        clean = read(sample.photo, long_side).picture
        degraded = degrade_photo(clean, sample)
        put(f"{FOLDER}/{sample.kind}.png", degraded)
        if sample.kind == FIRST_KIND:
            put(FIRST, degraded)
        if sample.kind == CLEAN_KIND:
            put(CLEAN, clean)
    scale = min(1.0, long_side / LONG_SIDE)
    put(LARGE, large_page(*(round(side * scale) for side in LARGE_SIDES)))
    for index, frame in enumerate(frames(long_side)):
        put(f"{FRAMES}/{index:02}.png", frame)


def large_page(width: int, height: int) -> Image.Image:
    """Photos in two rows of three, at their own resolution; left and right are damaged."""
    page, columns = Image.new("RGB", (width, height)), 3
    size = (-(-width // columns), -(-height // 2))
    shown = ("noise", "haze", "rain", "low_light", "raindrop", "jpeg")
    for index, kind in enumerate(shown):
        row, column = divmod(index, columns)
        photo = ImageOps.fit(read(sample_of(kind).photo).picture, size)
        page.paste(photo, (column * size[0], row * size[1]))
    for left, kind in zip((0, width - size[0]), LARGE_KINDS, strict=True):
        box = (left, 0, left + size[0], height)
        damage = replace(sample_of(kind), severity=LARGE_SEVERITY)
        page.paste(degrade_photo(page.crop(box), damage), box)
    return page


def frames(long_side: int) -> list[Image.Image]:
    """A pan from left to right; sides even, as most videos need them."""
    sample = sample_of(FRAME_KIND)
    photo = read(sample.photo, long_side).picture
    step = photo.width // _PAN
    width, height = (photo.width - step * FRAME_COUNT) // 8 * 8, photo.height // 16 * 8
    top = photo.height // 16
    boxes = [(step * i, top, step * i + width, top + height) for i in range(FRAME_COUNT)]
    return [degrade_photo(photo.crop(box), replace(sample, seed=i)) for i, box in enumerate(boxes)]
