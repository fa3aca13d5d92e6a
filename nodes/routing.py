"""The node that goes one of two ways."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from .sockets import CATEGORY, found_by


class DiffRestorerSwitch(io.ComfyNode):
    """Switch Image: one of two pictures; what makes the other one does not run.

    ComfyUI 0.3.75 has no such node of its own. Newer ones have If/Else Switch, with the same
    inputs, which does as well.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerSwitch",
            display_name="Switch Image",
            category=CATEGORY,
            **found_by("if else", "condition"),
            description=(
                "Hands on one of two pictures. The nodes before the other one do not run at all, "
                "so that clean photos cost no sampling: connect degraded of the Degradation "
                "Classifier to switch."
            ),
            inputs=[
                io.Boolean.Input(
                    "switch",
                    default=True,
                    tooltip="Which picture: degraded of the Classifier, or any other condition.",
                ),
                io.Image.Input(
                    "on_false", lazy=True, tooltip="Where switch is off, such as the photo itself."
                ),
                io.Image.Input(
                    "on_true", lazy=True, tooltip="Where switch is on, such as the restored photo."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture that was chosen.")],
        )

    @classmethod
    def check_lazy_status(
        cls, switch: bool, on_false: Tensor | None = None, on_true: Tensor | None = None
    ) -> list[str]:
        """The input that is still to be made."""
        name, wanted = ("on_true", on_true) if switch else ("on_false", on_false)
        return [name] if wanted is None else []

    @classmethod
    def execute(
        cls, switch: bool, on_false: Tensor | None = None, on_true: Tensor | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(on_true if switch else on_false)
