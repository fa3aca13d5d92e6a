"""The node that says how near a picture is to the clean one: distances, and pictures of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..diff_restorer.similarity import psnr, ssim
from .checks import checked
from .host import check_interrupt
from .images import common_batch, split_alpha
from .sockets import CATEGORY, found_by

SIDE_BY_SIDE, DIFFERENCE = "side by side", "difference"
MISSING = -1.0
"""In place of an LPIPS that cannot be computed here."""
_ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
_MOST_PIXELS = 4e6
"""For LPIPS, as its features are large."""
_AMPLIFICATION = 4
_LABELS = {"lq": "degraded", "image": "restored", "reference": "clean"}
_HEIGHT = 512


def lpips(image: Tensor, reference: Tensor) -> float | None:
    """LPIPS on AlexNet (arXiv 1801.03924), as `training.evaluate` has it; None without the package
    `lpips` or AlexNet's weights.

    Nothing is downloaded: the weights are those of torchvision in the torch hub's cache. None, too,
    for pictures of less than 32 px, and for those whose features would not fit into memory.
    """
    height, width = image.shape[-2:]
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET_FILE
    if min(height, width) < 32:
        return None
    if not weights.is_file():
        logging.info("Measure Restoration: no LPIPS, %s is missing.", weights)
        return None
    if height * width > _MOST_PIXELS:
        logging.info("Measure Restoration: no LPIPS, %d x %d px are too large.", width, height)
        return None
    try:
        network = _lpips()
    except ImportError:
        logging.info("Measure Restoration: no LPIPS, the package lpips is not installed.")
        return None
    with torch.inference_mode():
        return float(network(image * 2 - 1, reference * 2 - 1))


@cache
def _lpips() -> Any:
    import lpips as package

    return package.LPIPS(net="alex", verbose=False).eval()


def side_by_side(photos: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Tensor:
    """Degraded (if there is one), restored and clean, (H, W, 3) in [0, 1], with their PSNR."""
    cells = []
    for name in ("lq", "image", "reference"):
        if name in photos:
            key = {"lq": "psnr_lq", "image": "psnr"}.get(name, "")
            value = figures.get(key)
            cells.append(_cell(photos[name], _LABELS[name], value))
    return torch.cat(cells, dim=1)


def difference_picture(photos: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Tensor:
    """The absolute difference of restored and clean, amplified, (H, W, 3) in [0, 1]."""
    difference = (photos["image"] - photos["reference"]).abs() * _AMPLIFICATION
    return _cell(difference, f"difference x {_AMPLIFICATION}", figures.get("psnr"))


def _cell(photo: Tensor, label: str, value: float | None) -> Tensor:
    pixels = (photo[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    picture = Image.fromarray(pixels)
    scale = _HEIGHT / picture.height
    if scale < 1:
        picture = picture.resize((max(1, round(picture.width * scale)), _HEIGHT))
    text = label if value is None else f"{label}  {value:.2f} dB"
    size = max(9, min(18, picture.width // 14))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    draw.text((4, 3), text, "white", font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


class DiffRestorerMeasure(io.ComfyNode):
    """Measure Restoration: how near a picture is to the clean one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerMeasure",
            display_name="Measure Restoration",
            category=CATEGORY,
            **found_by("psnr", "ssim", "lpips", "compare images", "image quality"),
            description=(
                "Compares restored photos with clean ones: PSNR, SSIM and, where its weights are "
                "on this machine, LPIPS. Shows them side by side, or their difference."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The restored photos."),
                io.Image.Input("reference", tooltip="The clean photos, of the same size."),
                io.Image.Input(
                    "lq",
                    optional=True,
                    tooltip="The degraded photos; then the gain over them is shown, too.",
                ),
                io.Combo.Input(
                    "view",
                    options=[SIDE_BY_SIDE, DIFFERENCE],
                    default=SIDE_BY_SIDE,
                    tooltip="What the picture shows; differences are amplified four times.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="psnr", tooltip="In dB, the mean over the photos; 100 if equal."
                ),
                io.Float.Output(display_name="ssim", tooltip="Up to 1, the mean over the photos."),
                io.Float.Output(
                    display_name="lpips",
                    tooltip="Down to 0, the mean over the photos; -1 without its weights.",
                ),
                io.String.Output(
                    display_name="report", tooltip="All figures of each photo as JSON."
                ),
                io.Image.Output(display_name="picture", tooltip="What is shown in the node."),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, reference: Tensor, view: str, lq: Tensor | None = None
    ) -> io.NodeOutput:
        if view not in (SIDE_BY_SIDE, DIFFERENCE):
            raise ValueError(f"view: {view!r}, expected {SIDE_BY_SIDE} or {DIFFERENCE}.")
        given = {"image": image, "reference": reference} | ({} if lq is None else {"lq": lq})
        photos = {name: split_alpha(value)[0] for name, value in given.items()}
        check_sizes(photos)
        batch = common_batch(**{name: len(value) for name, value in photos.items()})
        draw = side_by_side if view == SIDE_BY_SIDE else difference_picture
        rows: list[dict[str, Any]] = []
        pictures: list[Tensor] = []
        for index in range(batch):
            check_interrupt()
            one = {
                name: value[index % len(value)][None].movedim(-1, 1).cpu()
                for name, value in photos.items()
            }
            rows.append(figures_of(one))
            pictures.append(draw(one, rows[-1]))
        picture = torch.stack(pictures)
        report = json.dumps(rows[0] if batch == 1 else rows)
        means = (
            sum(row[name] if row[name] is not None else MISSING for row in rows) / batch
            for name in ("psnr", "ssim", "lpips")
        )
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(*means, report, picture, ui=shown)


def check_sizes(photos: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for a photo (B, H, W, 3) of another size than the image."""
    height, width = photos["image"].shape[1:3]
    for name, value in photos.items():
        if value.shape[1:3] != (height, width):
            raise ValueError(
                f"{name}: {value.shape[2]} x {value.shape[1]} px, but the image is {width} x "
                f"{height} px. Scale one of them."
            )


def figures_of(photos: Mapping[str, Tensor]) -> dict[str, float | None]:
    """All figures of one photo, `image` against `reference`, (1, 3, H, W) each, to 4 digits."""
    image, clean = photos["image"], photos["reference"]
    after = float(psnr(image, clean))
    figures = {"psnr": after, "ssim": ssim(image, clean), "lpips": lpips(image, clean)}
    if "lq" in photos:
        before = float(psnr(photos["lq"], clean))
        figures |= {"psnr_lq": before, "gain": after - before}
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}
