"""The node that changes what the restoration goes by."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..diff_restorer.abstention import CLEAN
from ..diff_restorer.checkpoint import ANY_KINDS
from .checks import checked
from .sockets import CATEGORY, Degradation, DegradationSocket, found_by

MIX, ADD, SCALE = "mix", "add", "scale"


class DiffRestorerEditDegradation(io.ComfyNode):
    """Edit Degradation: tells the restoration what is wrong, beside or instead of what it sees."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerEditDegradation",
            display_name="Edit Degradation",
            category=CATEGORY,
            **found_by("noise", "blur", "haze", "rain", "jpeg", "low light"),
            description=(
                "Changes the degradation that the Prompt Processor has found: towards a kind that "
                "it overlooked, away from one that it imagines, or stronger and weaker as a "
                "whole. Several of these nodes can follow each other."
            ),
            inputs=[
                DegradationSocket.Input(
                    "degradation",
                    tooltip="From the Prompt Processor. Edit it before Tiled Diffusion sees it.",
                ),
                io.String.Input(
                    "type",
                    default="noise",
                    tooltip=(
                        "Name of a kind, as the Classifier shows it: noise, blur, jpeg, low_light, "
                        "haze, rain, snow, raindrop, clean. Not used for scale. The Classifier's "
                        "label can be connected."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=[MIX, ADD, SCALE],
                    default=MIX,
                    tooltip=(
                        "mix: weight 1 replaces what was found by the typical photo of this kind. "
                        "add: puts weight times the kind's direction on top; negative weights take "
                        "it away. scale: weight times the whole deviation from the average photo."
                    ),
                ),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="mix takes 0 to 1; 0 changes nothing, for scale 1 does.",
                ),
            ],
            outputs=[
                DegradationSocket.Output(
                    display_name="degradation",
                    tooltip="The changed degradation, for Degradation Control and the decode.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, degradation: Degradation, type: str, mode: str, weight: float
    ) -> io.NodeOutput:
        if mode not in (MIX, ADD, SCALE):
            raise ValueError(f"mode: {mode!r}, expected {MIX}, {ADD} or {SCALE}.")
        if mode == MIX and not 0 <= weight <= 1:
            raise ValueError(f"weight: {weight}, mix takes 0 to 1.")
        if mode != SCALE and type not in degradation.types:
            raise ValueError(
                f"type: {type!r} is not known to this Diff-Restorer file. It knows "
                f"{', '.join(degradation.types)}."
            )
        if not degradation.prototypes.any():
            raise ValueError(
                "degradation: this Diff-Restorer file holds no class prototypes. Write it again "
                "with `python -m training.export`, which adds them."
            )
        average = degradation.prototypes.mean(dim=0)
        if mode == SCALE:
            return io.NodeOutput(degradation.edited(weight, (1 - weight) * average))
        place = degradation.types.index(type)
        prototype, sure = degradation.prototypes[place], torch.zeros(len(degradation.types))
        sure[place] = 1
        if mode == ADD:
            edited = degradation.edited(1.0, weight * (prototype - average))
        else:
            edited = degradation.edited(1 - weight, weight * prototype)
        if degradation.classification == ANY_KINDS:
            probabilities = _with_kind(degradation, type, weight)
        elif mode == MIX:
            probabilities = torch.lerp(edited.probabilities, sure.to(edited.probabilities), weight)
        else:
            return io.NodeOutput(edited)
        return io.NodeOutput(replace(edited, probabilities=probabilities))


def _with_kind(degradation: Degradation, type: str, weight: float) -> Tensor:
    """Probabilities (B, N) of independent kinds, one of which is told to be there, or not to be.

    The others stay as they were, but that a photo is not clean with it, nor with others if clean.
    """
    known, share = degradation.probabilities, min(1.0, abs(weight))
    there = torch.tensor([name == type for name in degradation.types], device=known.device)
    clean = torch.tensor([name == CLEAN for name in degradation.types], device=known.device)
    if weight < 0:
        return torch.where(there, torch.lerp(known, torch.zeros_like(known), share), known)
    changed = torch.lerp(known, there.to(known), share)
    return torch.where(there | clean | (type == CLEAN), changed, known)
