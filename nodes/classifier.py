"""The node that names a photo's degradation."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .chart import shown_kinds
from .checks import checked
from .host_models import DiffRestorer
from .sockets import CATEGORY, Degradation, DegradationSocket, DiffRestorerSocket, found_by
from .sources import clip_vision_input, clip_vision_of, photos_of, restorer_of


class DiffRestorerDegradationClassifier(io.ComfyNode):
    """Degradation Classifier: which degradation the photo has, as text, number and chart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerDegradationClassifier",
            display_name="Degradation Classifier",
            category=CATEGORY,
            **found_by("detect noise", "detect blur", "image quality", "what is wrong"),
            description=(
                "Says how a photo is degraded and shows the probabilities of all kinds. It shares "
                "its look at the photo with the Prompt Processor, so using both costs no more "
                "than one. What a Prompt Processor has read can be connected in place of the photo."
            ),
            inputs=[
                DiffRestorerSocket.Input(
                    "diff_restorer",
                    optional=True,
                    tooltip="From Load Diff-Restorer. Not needed with degradation.",
                ),
                clip_vision_input(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The degraded photos. Transparency is not looked at. Not needed with "
                        "degradation."
                    ),
                ),
                DegradationSocket.Input(
                    "degradation",
                    optional=True,
                    tooltip=(
                        "From the Prompt Processor or Edit Degradation: shown as it is, without "
                        "another look, unless one of the inputs above asks for one."
                    ),
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
    def execute(
        cls,
        diff_restorer: DiffRestorer | None = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
        degradation: Degradation | None = None,
    ) -> io.NodeOutput:
        if degradation is None or not (diff_restorer is clip_vision is image is None):
            restorer = restorer_of(diff_restorer, degradation)
            vision = clip_vision_of(clip_vision, restorer)
            _, degradation = restorer.read(vision, photos_of(image, degradation))
        text = degradation.as_json()
        confidence, best = degradation.probabilities.mean(dim=0).max(dim=0)
        label = degradation.types[int(best)]
        degraded = any(degradation.degraded)
        shown = shown_kinds(degradation, cls)
        return io.NodeOutput(label, float(confidence), text, degradation, degraded, ui=shown)
