"""The node that damages clean photos."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..diff_restorer.degradations import ALL_KINDS, degrade
from .checks import checked
from .host import check_interrupt
from .images import split_alpha
from .sockets import CATEGORY, found_by
from .sources import share_input

KINDS = tuple(kind for kind in ALL_KINDS if kind != "clean")


class DiffRestorerSimulateDegradation(io.ComfyNode):
    """Simulate Degradation: damages clean photos as the training does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerSimulateDegradation",
            display_name="Simulate Degradation",
            category=CATEGORY,
            **found_by("add noise", "add blur", "jpeg artifacts", "haze", "rain", "snow"),
            description=(
                "Degrades clean photos with the very functions that the models are trained on, to "
                "try restorations and to measure them. Several of these nodes can follow each "
                "other."
            ),
            inputs=[
                io.Image.Input("image", tooltip="Clean photos; transparency stays."),
                io.Combo.Input(
                    "type", options=list(KINDS), default="noise", tooltip="The degradation."
                ),
                share_input(
                    "severity",
                    "0 is hardly visible; 0.25 to 0.75 is like the published test sets.",
                    default=0.5,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same degradation.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The degraded photos."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, image: Tensor, type: str, severity: float, seed: int) -> io.NodeOutput:
        if type not in KINDS:
            raise ValueError(f"type: {type!r}, expected one of {', '.join(KINDS)}.")
        rgb, alpha = split_alpha(image)
        generator = torch.Generator().manual_seed(seed % 2**63)
        done = []
        for photo in rgb.movedim(-1, 1).cpu().contiguous():
            check_interrupt()
            done.append(degrade(type, photo[None], severity, generator))
        degraded = torch.cat(done).movedim(1, -1).to(rgb.device)
        if alpha is not None:
            degraded = torch.cat([degraded, alpha.to(degraded)], dim=-1)
        return io.NodeOutput(degraded)
