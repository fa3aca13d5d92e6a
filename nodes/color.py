"""The node that gives a picture the colours of another."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional as F

from ..diff_restorer.color import METHODS, match_colors
from .checks import checked
from .host import check_interrupt
from .images import common_batch, split_alpha, to_batch
from .sockets import CATEGORY, found_by
from .sources import share_input


class DiffRestorerColorFix(io.ComfyNode):
    """Match Colors: takes tints back that the restoration has brought."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerColorFix",
            display_name="Match Colors",
            category=CATEGORY,
            **found_by("color match", "color transfer", "color fix"),
            description=(
                "Gives a restored photo the colours of the degraded one, where diffusion has "
                "shifted them. Leave it out for haze and low light: there the colours of the "
                "degraded photo are what is wrong."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The restored photos."),
                io.Image.Input(
                    "reference",
                    tooltip=(
                        "The photos with the right colours, usually the degraded ones. They are "
                        "scaled to the size of the image."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="wavelet",
                    tooltip=(
                        "wavelet: colours of areas, place by place. adain: mean and contrast of "
                        "each channel, for the whole picture. lab: the tint alone, brightness "
                        "stays."
                    ),
                ),
                share_input(
                    "strength", "0 leaves the image as it is, 1 takes all colours of the reference."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The image with the colours of the reference; transparency stays.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, reference: Tensor, method: str, strength: float
    ) -> io.NodeOutput:
        if method not in METHODS:
            raise ValueError(f"method: {method!r}, expected one of {', '.join(METHODS)}.")
        rgb, alpha = split_alpha(image)
        wanted = split_alpha(reference)[0].to(rgb.device)
        batch = common_batch(image=len(rgb), reference=len(wanted))
        done = []
        for index in range(batch):
            check_interrupt()
            ours, theirs = (
                photos[index if len(photos) > 1 else 0].movedim(-1, 0)[None]
                for photos in (rgb, wanted)
            )
            if theirs.shape != ours.shape:
                theirs = F.interpolate(
                    theirs, size=ours.shape[-2:], mode="bicubic", antialias=True
                ).clamp(0, 1)
            done.append(match_colors(ours, theirs, method, strength))
        matched = torch.cat(done).movedim(1, -1)
        if alpha is not None:
            matched = torch.cat([matched, to_batch(alpha, batch).to(matched)], dim=-1)
        return io.NodeOutput(matched)
