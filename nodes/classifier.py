"""The node that names a photo's degradation."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from .chart import bar_chart
from .checks import checked
from .host_models import DiffRestorer
from .images import split_alpha
from .sockets import CATEGORY, DegradationSocket, DiffRestorerSocket


class DiffRestorerDegradationClassifier(io.ComfyNode):
    """Degradation Classifier: which degradation the photo has, as text, number and chart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerDegradationClassifier",
            display_name="Degradation Classifier",
            category=CATEGORY,
            description=(
                "Says how a photo is degraded and shows the probabilities of all kinds. It shares "
                "its look at the photo with the Prompt Processor, so using both costs no more "
                "than one."
            ),
            inputs=[
                DiffRestorerSocket.Input("diff_restorer", tooltip="From Load Diff-Restorer."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The vision model that the file was trained with."
                ),
                io.Image.Input(
                    "image", tooltip="The degraded photos. Transparency is not looked at."
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="label",
                    tooltip="The most probable kind, of a batch the one most probable on average.",
                ),
                io.Float.Output(
                    display_name="confidence", tooltip="Probability of that kind, 0 to 1."
                ),
                io.String.Output(
                    display_name="probabilities",
                    tooltip=(
                        "All kinds with their probabilities as a JSON object, the most probable "
                        "first; for a batch a list with one object per photo."
                    ),
                ),
                DegradationSocket.Output(
                    display_name="degradation",
                    tooltip="How the photo is degraded, for the other Diff-Restorer nodes.",
                ),
                io.Boolean.Output(
                    display_name="degraded",
                    tooltip=(
                        "Whether any of the photos is evidently something else than clean, so "
                        "that a restoration acts on it; for Switch Image. Always true if the file "
                        "does not know clean photos."
                    ),
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, diff_restorer: DiffRestorer, clip_vision: Any, image: Tensor) -> io.NodeOutput:
        rgb, _ = split_alpha(image)
        _, degradation = diff_restorer.read(clip_vision, rgb)
        rows = degradation.as_dicts()
        text = json.dumps(rows[0] if len(rows) == 1 else rows)
        confidence, best = degradation.probabilities.mean(dim=0).max(dim=0)
        kinds = degradation.kinds
        charts = torch.stack([bar_chart(*pair) for pair in zip(rows, kinds, strict=True)])
        # The front end takes one dictionary: pictures for the node, text for /history.
        shown = ui.PreviewImage(charts, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        label = degradation.types[int(best)]
        degraded = any(degradation.degraded)
        return io.NodeOutput(label, float(confidence), text, degradation, degraded, ui=shown)
