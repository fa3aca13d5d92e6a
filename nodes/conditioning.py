"""Nodes between the photo and the sampler: prompts and control."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .chart import shown_kinds
from .checks import checked
from .host_control import DegradationControlNet
from .host_encode import PhotoFeatures, encode_photo
from .host_models import DiffRestorer
from .host_tiled import SEMANTIC_KEY
from .images import common_batch, split_alpha, to_batch
from .sockets import (
    CATEGORY,
    RESTORATION,
    Degradation,
    DegradationSocket,
    DiffRestorerSocket,
    found_by,
)
from .sources import (
    clip_vision_input,
    clip_vision_of,
    degradation_input,
    photos_input,
    photos_of,
    restorer_input,
    restorer_of,
    share_input,
    vae_input,
    vae_of,
)

Conditioning = list[list[Any]]


def join_text(text: Conditioning, semantic: Tensor) -> Conditioning:
    """Append P_S to the text tokens of every entry; everything else of an entry stays. Raises
    ValueError for text that was encoded for another model, or for another batch."""
    joined = []
    for tokens, extra in text:
        if tokens.shape[-1] != semantic.shape[-1]:
            raise ValueError(
                f"text: its tokens are {tokens.shape[-1]} wide, P_S is {semantic.shape[-1]} wide. "
                "The text encoder must be that of the model the Diff-Restorer file was trained "
                "for (768: Stable Diffusion 1.5); Nano takes no text."
            )
        batch = common_batch(text=len(tokens), image=len(semantic))
        parts = (to_batch(tokens, batch), to_batch(semantic.to(tokens), batch))
        joined.append([torch.cat(parts, dim=1), extra.copy()])
    return joined


def apply_control(
    control: DegradationControlNet, *conditionings: Conditioning
) -> list[Conditioning]:
    """Put `control` at the end of the control chain of every entry.

    Entries with the same chain share one copy, without which the host would not evaluate positive
    and negative in one batch (as its own ControlNetApplyAdvanced does).
    """
    shared: dict[Any, DegradationControlNet] = {}
    applied = []
    for conditioning in conditionings:
        entries = []
        for tokens, extra in conditioning:
            previous = extra.get("control")
            if previous not in shared:
                shared[previous] = control.copy().set_previous_controlnet(previous)
            changed = {"control": shared[previous], "control_apply_to_uncond": False}
            entries.append([tokens, extra | changed])
        applied.append(entries)
    return applied


class DiffRestorerPromptProcessor(io.ComfyNode):
    """Diff-Restorer Prompt Processor: P_S as the prompt, P_D for the control and the decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerPromptProcessor",
            display_name="Diff-Restorer Prompt Processor",
            category=CATEGORY,
            **found_by(*RESTORATION),
            description=(
                "Looks at the degraded photo with CLIP and separates what it shows from how it is "
                "degraded. The content becomes the prompt; the degradation steers Degradation "
                "Control and Aware VAE Decode, and the node shows it as a chart."
            ),
            inputs=[
                DiffRestorerSocket.Input("diff_restorer", tooltip="From Load Diff-Restorer."),
                clip_vision_input(of_what=": OpenAI's ViT-L/14 for Stable Diffusion 1.5"),
                io.Image.Input(
                    "image", tooltip="The degraded photos. Transparency is not looked at."
                ),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip=(
                        "A text prompt to go with the photo's content, from CLIP Text Encode. "
                        "Leave it out to restore by the photo alone."
                    ),
                ),
                io.Float.Input(
                    "semantic_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip=(
                        "Weight of the photo's content as a prompt. 1 is what the model was "
                        "trained with; 0 ignores the content."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The photo's content, with the text if there is one.",
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The empty prompt of Diff-Restorer. It only matters at CFG above 1.",
                ),
                DegradationSocket.Output(
                    display_name="degradation",
                    tooltip=(
                        "How the photo is degraded, for the other Diff-Restorer nodes. Brings the "
                        "file and the photos along."
                    ),
                ),
            ],
            # Else the host would not show the chart again where the node need not run again.
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        diff_restorer: DiffRestorer,
        image: Tensor,
        semantic_strength: float,
        clip_vision: Any = None,
        text: Conditioning | None = None,
    ) -> io.NodeOutput:
        vision = clip_vision_of(clip_vision, diff_restorer)
        semantic, degradation = diff_restorer.read(vision, image)
        semantic = semantic * semantic_strength
        if text:
            positive = join_text(text, semantic)
        else:
            positive = [[semantic, {"pooled_output": semantic.mean(dim=1)}]]
        for tokens, extra in positive:  # Tiled Diffusion gives each tile its own P_S
            extra[SEMANTIC_KEY] = semantic_strength, tokens[:, -semantic.shape[1] :]
        # P_S was replaced by zeros in a part of the training, as CFG needs it.
        empty = torch.zeros_like(positive[0][0])
        negative = [[empty, {"pooled_output": torch.zeros_like(semantic.mean(dim=1))}]]
        return io.NodeOutput(positive, negative, degradation, ui=shown_kinds(degradation, cls))


class DiffRestorerDegradationControl(io.ComfyNode):
    """Degradation Control: keeps the sampling on the photo, in the light of its degradation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerDegradationControl",
            display_name="Degradation Control",
            category=CATEGORY,
            **found_by("restore", "controlnet", "denoise", "deblur"),
            description=(
                "Encodes the degraded photo and steers the sampler with it, like a ControlNet that "
                "knows how the photo is degraded. Other ControlNets can be applied before and "
                "after it. Sizes that are no multiple of 8 are padded; Aware VAE Decode cuts the "
                "padding off again."
            ),
            inputs=[
                io.Conditioning.Input("positive", tooltip="From the Prompt Processor."),
                io.Conditioning.Input("negative", tooltip="From the Prompt Processor."),
                restorer_input(),
                degradation_input(),
                photos_input("The degraded photos. Transparency is not looked at."),
                vae_input(what_for="; it encodes the photos once"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip=(
                        "How strongly the result keeps to the photo. 0 leaves both conditionings "
                        "as they are."
                    ),
                ),
                share_input(
                    "start_percent",
                    "Part of the sampling after which the control begins to act.",
                    default=0.0,
                    step=0.001,
                ),
                share_input(
                    "end_percent",
                    "Part of the sampling after which the control stops.",
                    default=1.0,
                    step=0.001,
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The positive conditioning under control."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative conditioning under control."
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The encoded photos, to start the sampler from.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        positive: Conditioning,
        negative: Conditioning,
        degradation: Degradation,
        strength: float,
        start_percent: float,
        end_percent: float,
        diff_restorer: DiffRestorer | None = None,
        image: Tensor | None = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        if start_percent > end_percent:
            raise ValueError(
                f"start_percent: {start_percent} is after end_percent {end_percent}. Swap them."
            )
        restorer = restorer_of(diff_restorer, degradation)
        check_degradation(degradation, restorer)
        vae = vae_of(vae, restorer)
        rgb, _ = split_alpha(photos_of(image, degradation))
        batch = common_batch(image=len(rgb), degradation=degradation.batch)
        padded, encoded, features = encode_photo(vae, rgb, restorer)
        latent: dict[str, Any] = {"samples": to_batch(encoded, batch).contiguous()}
        if features is not None:
            latent[PhotoFeatures.KEY] = features
        if strength == 0:
            return io.NodeOutput(positive, negative, latent)
        control = restorer.control.attach(
            padded, encoded, degradation.tokens, vae, strength, (start_percent, end_percent)
        )
        return io.NodeOutput(*apply_control(control, positive, negative), latent)


def check_degradation(degradation: Degradation, diff_restorer: DiffRestorer) -> None:
    """Raises ValueError for a degradation that another file's Prompt Processor has read, of another
    width."""
    width, needed = degradation.pooled.shape[-1], diff_restorer.sizes.context_width
    if width != needed:
        raise ValueError(
            f"degradation: it is {width} wide, {diff_restorer.path.name} needs {needed}. Connect "
            "the same DIFF_RESTORER to the Prompt Processor and to this node."
        )
