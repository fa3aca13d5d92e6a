"""Draws the templates' thumbnails by running them: python -m tools.thumbnails [names].

Square, as ComfyUI's dialog shows them: the degraded photo left of a line, the restored one right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tools.client import Client, Workflow, find_node, load_workflow
from tools.demo import LONG_SIDE, SAMPLES, Sample, degrade_photo
from tools.ending import in_words
from tools.environment import ROOT
from tools.host import Host
from tools.photo import read_photo
from tools.restoration import encode, restore

SIDE = 480
LINE = 3
FOLDER = ROOT / "workflows"


Pair = tuple[Image.Image, Image.Image]
"""What is shown left and right."""


def square(photo: Image.Image, side: int = SIDE) -> Image.Image:
    """The middle of a photo, `side` pixels wide and high."""
    return ImageOps.fit(photo, (side, side))


def restored(client: Client, workflow: Workflow, photo: Image.Image) -> Image.Image:
    """The picture of the node titled Restored."""
    return restore(client, workflow, photo, "thumbnail").image


def before_after(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """The degraded and the restored photo."""
    return lq, restored(client, workflow, lq)


def enlarged(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """A small clean photo with its pixels, and the same at twice the size."""
    small = square(clean, SIDE // 4)
    large = restored(client, workflow, small)
    return small.resize((SIDE, SIDE), Image.Resampling.NEAREST), large


def decoders(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """The stock decode and the aware one."""
    photo = find_node(workflow, "LoadImage", "Degraded photo")
    workflow[photo]["inputs"]["image"] = client.upload(*encode(np.asarray(lq)))
    result = client.run(workflow)
    saved = (find_node(workflow, "SaveImage", title) for title in (BOTH, "Restored"))
    stock, aware = (client.images(result, node)[0] for node in saved)
    return stock.crop((0, 0, *lq.size)), aware


def measured(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """What the workflow makes of a clean photo: degraded, and restored."""
    photo = find_node(workflow, "LoadImage", "Clean photo")
    workflow[photo]["inputs"]["image"] = client.upload(*encode(np.asarray(clean)))
    result = client.run(workflow)
    (measure,) = (key for key, node in workflow.items() if node["class_type"] == MEASURE)
    (row,) = client.images(result, measure)  # degraded, restored, clean
    third = row.width // 3
    return row.crop((0, 0, third, row.height)), row.crop((third, 0, 2 * third, row.height))


def folder_of(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """Two photos of a folder, before and after."""
    samples = [sample for sample in SAMPLES if sample.kind in TWO]
    before = [strip(degrade_photo(read(each), each)) for each in samples]
    for photo in before:
        client.upload(*encode(np.asarray(photo)), "thumbnail_photos")
    loader = find_node(workflow, "LoadImageDataSetFromFolder", "Folder of frames")
    workflow[loader]["inputs"]["folder"] = "thumbnail_photos"
    result = client.run(workflow)
    results = client.images(result, find_node(workflow, "SaveImage", "Restored"))
    # They come in the order in which the server's folder lists them.
    after = [min(results, key=partial(difference, photo)) for photo in before]
    return stack(before), stack(after)


def one_of_folder(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """A photo of a folder, before and after."""
    client.upload(*encode(np.asarray(lq)), "thumbnail_photo")
    loader = find_node(workflow, "DiffRestorerFolderPhoto", "Folder of photos")
    workflow[loader]["inputs"] |= {"folder": "thumbnail_photo", "index": 0}
    result = client.run(workflow)
    return lq, client.images(result, find_node(workflow, "SaveImage", "Restored"))[0]


def without_weights(
    client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image
) -> Pair:
    """The degraded photo, and what it takes to restore it."""
    right = Image.new("RGB", lq.size, "#33658a")
    text = ImageDraw.Draw(right)
    center = (3 * SIDE // 4, SIDE // 2)
    text.text(center, "Stable\nDiffusion 1.5:\nneeds three\nmodel files", "white", font_size=30,
              anchor="mm", align="center")  # fmt: skip
    return lq, right


def strip(photo: Image.Image) -> Image.Image:
    """The middle of a photo, twice as wide as high."""
    return ImageOps.fit(photo, (SIDE, SIDE // 2))


def stack(photos: Sequence[Image.Image]) -> Image.Image:
    """Strips, one below the other."""
    return Image.fromarray(np.vstack([np.asarray(each) for each in photos]))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two photos of one size."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def read(sample: Sample) -> Image.Image:
    """The clean photo of a sample."""
    return read_photo(sample.photo, LONG_SIDE)


BOTH = "Stock decode, aware decode"
MEASURE = "DiffRestorerMeasure"
TWO = ("haze", "rain")
Maker = Callable[[Client, Workflow, Image.Image, Image.Image], Pair]
THUMBNAILS: dict[str, tuple[str, Maker]] = {
    "compare_decoders": ("rain", decoders),
    "measure_restoration": ("jpeg", measured),
    "restore_by_kind": ("low_light", before_after),
    "restore_folder": ("haze", one_of_folder),
    "restore_frames": ("noise", folder_of),
    "restore_if_degraded": ("snow", before_after),
    "restore_large": ("noise", before_after),
    "restore_nano": ("rain", before_after),
    "restore_photo": ("noise", before_after),
    "restore_override": ("haze", before_after),
    "restore_sd15": ("snow", without_weights),
    "restore_upscale_x2": ("raindrop", enlarged),
}
"""Workflow -> kind of the demo's sample, and how the pictures are made of (client, workflow, clean
photo, degraded photo)."""


def draw(client: Client, name: str) -> Image.Image:
    """One thumbnail."""
    kind, maker = THUMBNAILS[name]
    (sample,) = (each for each in SAMPLES if each.kind == kind)
    clean = square(read(sample))
    workflow = load_workflow(FOLDER / f"api/{name}.json")
    left, right = (
        square(each) for each in maker(client, workflow, clean, degrade_photo(clean, sample))
    )
    middle = SIDE // 2
    left.paste(right.crop((middle, 0, SIDE, SIDE)), (middle, 0))
    left.paste("white", (middle - LINE // 2, 0, middle + LINE - LINE // 2, SIDE))
    return left


@in_words
def main(names: Sequence[str]) -> None:
    """Draw those named, or all, with a server of our own."""
    with Host() as host:
        client = Client(host.url)
        for name in names or THUMBNAILS:
            draw(client, name).save(FOLDER / f"{name}.jpg", quality=88)
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
