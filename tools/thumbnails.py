"""Draws the templates' thumbnails by running them: python -m tools.thumbnails [names].

Square, as ComfyUI's dialog shows them: the degraded photo left of a line, the restored one right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat

from tools import sheet
from tools.client import Client
from tools.demo import LONG_SIDE, degrade_photo, sample_of
from tools.ending import in_words
from tools.environment import ROOT
from tools.host import Host
from tools.photo import read
from tools.restoration import INPUT_TITLE, OUTPUT_TITLE, encode, restore
from tools.workflow import Workflow, find_node, load_workflow

SIDE = 480
SQUARE, STRIP, SMALL = (SIDE, SIDE), (SIDE, SIDE // 2), (SIDE // 4, SIDE // 4)
LINE = 3
FOLDER = ROOT / "workflows"
RESTORED = ("SaveImage", OUTPUT_TITLE)
TWO = ("haze", "rain")
"""Kinds of the samples in the thumbnail of a folder."""

Pair = tuple[Image.Image, Image.Image]
"""What is shown left and right."""


def upload(client: Client, picture: Image.Image, subfolder: str = "") -> str:
    return client.upload(*encode(np.asarray(picture)), subfolder)


def run(
    client: Client,
    workflow: Workflow,
    source: tuple[str, str],
    *shown: Sequence[str],
    **inputs: Any,
) -> list[list[Image.Image]]:
    """The pictures of nodes, named by class and title, once the source has these inputs."""
    workflow[find_node(workflow, *source)]["inputs"] |= inputs
    result = client.run(workflow)
    return [client.images(result, find_node(workflow, *node)) for node in shown]


def before_after(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """The degraded and the restored photo."""
    return lq, restore(client, workflow, lq, "thumbnail").image


def enlarged(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """A small clean photo with its pixels, and the same at twice the size."""
    small = ImageOps.fit(clean, SMALL)
    large = restore(client, workflow, small, "thumbnail").image
    return small.resize(SQUARE, Image.Resampling.NEAREST), large


def decoders(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """The stock decode and the aware one."""
    photo, both = ("LoadImage", INPUT_TITLE), ("SaveImage", "Stock decode, aware decode")
    (stock,), (aware,) = run(client, workflow, photo, both, RESTORED, image=upload(client, lq))
    return stock.crop((0, 0, *lq.size)), aware


def measured(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """What the workflow makes of a clean photo: degraded, and restored."""
    photo, measure = ("LoadImage", "Clean photo"), ("DiffRestorerMeasure",)
    ((row,),) = run(client, workflow, photo, measure, image=upload(client, clean))
    third = row.width // 3  # degraded, restored, clean
    return row.crop((0, 0, third, row.height)), row.crop((third, 0, 2 * third, row.height))


def folder_of(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """Two photos of a folder, before and after."""
    before = [
        ImageOps.fit(degrade_photo(read(sample.photo, LONG_SIDE).picture, sample), STRIP)
        for sample in map(sample_of, TWO)
    ]
    folder, loader = "thumbnail_photos", ("LoadImageDataSetFromFolder", "Folder of frames")
    for photo in before:
        upload(client, photo, folder)
    (results,) = run(client, workflow, loader, RESTORED, folder=folder)

    def closest(photo: Image.Image) -> Image.Image:
        """They come in the order in which the server's folder lists them."""
        return min(
            results, key=lambda each: sum(ImageStat.Stat(ImageChops.difference(each, photo)).mean)
        )

    return sheet.stack(before), sheet.stack([closest(photo) for photo in before])


def one_of_folder(client: Client, workflow: Workflow, clean: Image.Image, lq: Image.Image) -> Pair:
    """A photo of a folder, before and after."""
    folder, loader = "thumbnail_photo", ("DiffRestorerFolderPhoto", "Folder of photos")
    upload(client, lq, folder)
    ((restored,),) = run(client, workflow, loader, RESTORED, folder=folder, index=0)
    return lq, restored


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
    sample = sample_of(kind)
    clean = ImageOps.fit(read(sample.photo, LONG_SIDE).picture, SQUARE)
    workflow = load_workflow(FOLDER / f"api/{name}.json")
    pair = maker(client, workflow, clean, degrade_photo(clean, sample))
    left, right = (ImageOps.fit(each, SQUARE) for each in pair)
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
