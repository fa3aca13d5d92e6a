"""Nodes that make, change and measure degradations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..diff_restorer.abstention import CLEAN
from ..diff_restorer.checkpoint import ANY_KINDS
from ..diff_restorer.degradations import ALL_KINDS, degrade
from ..diff_restorer.similarity import psnr, ssim
from .checks import checked
from .host import check_interrupt
from .images import common_batch, split_alpha, to_batch
from .measures import MISSING, difference_picture, lpips, side_by_side
from .sockets import CATEGORY, Degradation, DegradationSocket, found_by

KINDS = tuple(kind for kind in ALL_KINDS if kind != "clean")
MIX, ADD, SCALE = "mix", "add", "scale"
SIDE_BY_SIDE, DIFFERENCE = "side by side", "difference"


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
                DegradationSocket.Input("degradation", tooltip="From the Prompt Processor."),
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
            return io.NodeOutput(_edited(degradation, lambda p: p + (weight - 1) * (p - average)))
        place = degradation.types.index(type)
        prototype, sure = degradation.prototypes[place], torch.zeros(len(degradation.types))
        sure[place] = 1
        if mode == ADD:
            edited = _edited(degradation, lambda p: p + weight * (prototype - average))
        else:
            edited = _edited(degradation, lambda p: p + weight * (prototype - p))
        if degradation.classification == ANY_KINDS:
            probabilities = _told(degradation, type, weight)
        elif mode == MIX:
            probabilities = torch.lerp(edited.probabilities, sure.to(edited.probabilities), weight)
        else:
            return io.NodeOutput(edited)
        return io.NodeOutput(replace(edited, probabilities=probabilities))


def _edited(degradation: Degradation, edit: Callable[[Tensor], Tensor]) -> Degradation:
    """Pooled P_D, (..., C), of photos and of their parts as `edit` says; tokens move with it."""
    pooled, local = edit(degradation.pooled), degradation.local
    if local is not None:
        local = replace(local, tiles=edit(local.tiles.movedim(1, -1)).movedim(-1, 1))
    tokens = degradation.tokens + (pooled - degradation.pooled)[:, None]
    return replace(degradation, tokens=tokens, pooled=pooled, local=local)


def _told(degradation: Degradation, type: str, weight: float) -> Tensor:
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
                io.Float.Input(
                    "severity",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is hardly visible; 0.25 to 0.75 is like the published test sets.",
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
        for photo in rgb.movedim(-1, 1).float().cpu().clamp(0, 1).contiguous():
            check_interrupt()
            done.append(degrade(type, photo[None], severity, generator))
        degraded = torch.cat(done).movedim(1, -1).to(rgb.device)
        if alpha is not None:
            degraded = torch.cat([degraded, alpha.to(degraded)], dim=-1)
        return io.NodeOutput(degraded)


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
        photos = {
            "image": split_alpha(image)[0],
            "reference": split_alpha(reference)[0],
        }
        if lq is not None:
            photos["lq"] = split_alpha(lq)[0]
        for name, value in photos.items():
            if value.shape[1:3] != photos["image"].shape[1:3]:
                found, needed = (
                    f"{v.shape[2]} x {v.shape[1]} px" for v in (value, photos["image"])
                )
                raise ValueError(f"{name}: {found}, but the image is {needed}. Scale one of them.")
        batch = common_batch(**{name: len(value) for name, value in photos.items()})
        rows: list[dict[str, Any]] = []
        pictures: list[Tensor] = []
        for index in range(batch):
            check_interrupt()
            some = {
                name: to_batch(value, batch)[index : index + 1].movedim(-1, 1).float().cpu()
                for name, value in photos.items()
            }
            clean, found = some["reference"], some["image"]
            row: dict[str, Any] = {"psnr": float(psnr(found, clean)), "ssim": ssim(found, clean)}
            row["lpips"] = lpips(found, clean)
            if "lq" in some:
                row["psnr_lq"] = float(psnr(some["lq"], clean))
                row["gain"] = row["psnr"] - row["psnr_lq"]
            rows.append({key: _rounded(value) for key, value in row.items()})
            draw = side_by_side if view == SIDE_BY_SIDE else difference_picture
            pictures.append(draw(some, rows[-1]))
        picture = torch.stack(pictures)
        report = json.dumps(rows[0] if batch == 1 else rows)
        means = (
            sum(row[name] if row[name] is not None else MISSING for row in rows) / batch
            for name in ("psnr", "ssim", "lpips")
        )
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(*means, report, picture, ui=shown)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
