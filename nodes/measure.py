"""The node that says how near a picture is to the clean one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..diff_restorer.similarity import psnr, ssim
from .checks import checked
from .host import check_interrupt
from .images import common_batch, split_alpha, to_batch
from .measures import MISSING, difference_picture, lpips, side_by_side
from .sockets import CATEGORY, found_by

SIDE_BY_SIDE, DIFFERENCE = "side by side", "difference"


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
                name: to_batch(value, batch)[index : index + 1].movedim(-1, 1).float().cpu()
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
