"""Train Nano's vision encoder from scratch: `python -m training.nano.vision --help`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common import DataConfig, ModelConfig, home, open_data, to_home
from ..config import run_program
from ..data import Batches
from ..loop import LoopConfig, Stage, maybe_compile
from ..losses import Classification, kind_loss, kind_scores
from ..models import Models, clip_tokens
from ..photos import PhotoStore
from ..sheets import save_sheet
from ..stages import run_stage, stage_of


@dataclass(frozen=True)
class Config:
    """Train the vision encoder and the degradation branch to name and measure the degradation."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    measure_weight: float = 0.5
    """Weight of the loss that asks pooled P_D for the severity and for what the degradation did to
    brightness and contrast: the kind alone would not tell the decoder how dark a photo was."""
    classification: Classification = "ce"
    """Cross-entropy of one kind per photo, or binary cross-entropy of each kind for mixed ones."""
    mild: float = 0.2
    """Severity below which a kind counts less in that loss."""


MEASURES = ("severity", *(f"{what} {c}" for what in ("brightness", "contrast") for c in "RGB"))
RULERS = 8
"""Channels that hold a constant: against it layer norm lets the next layers see absolute size."""


def start_as_spectrum(vision: Any, views: Tensor) -> None:
    """Start the encoder, CLIP's of transformers with quick_gelu, where its first layer measures how
    strong each spatial frequency of `views` is, photos as `start_patch_filters` takes them.

    Degradations differ in the spectrum of a photo: a linear classifier on the mean magnitude of
    cosine coefficients names 72 % of nine kinds after 2,000 samples, where this encoder, given the
    coefficients alone, named 43 % after 8,000. So the patch filters start as a whitened cosine
    basis, and the first MLP as the magnitude of each: gelu(x) + gelu(-x) is nearly |x|.
    """
    embeddings, mlp = vision.vision_model.embeddings, vision.vision_model.encoder.layers[0].mlp
    start_patch_filters(embeddings.patch_embedding, views)
    width = embeddings.patch_embedding.weight.shape[0]
    with torch.no_grad():
        embeddings.patch_embedding.weight[-RULERS:] = 0
        embeddings.position_embedding.weight[:, -RULERS:] = 1.5
        unit = torch.eye(width)
        mlp.fc1.weight[:width], mlp.fc1.weight[width : 2 * width] = 2 * unit, -2 * unit
        mlp.fc2.weight[:, :width], mlp.fc2.weight[:, width : 2 * width] = unit / 2, unit / 2


def start_patch_filters(patch_embedding: nn.Conv2d, views: Tensor) -> None:
    """Start the patch filters (width, 3, P, P) as a whitened cosine basis over all frequencies.

    Random filters see little but brightness, because photos have most of their energy there, while
    noise, blur and JPEG live in high frequencies. Dividing each cosine by its standard deviation
    over `views`, photos (B, 3, H, W) in [0, 1] with H, W multiples of P, gives all frequencies the
    same say from the first step.
    """
    width, _, side, _ = patch_embedding.weight.shape
    place = torch.arange(side)
    cosine = torch.cos(math.pi * (place[None, :] + 0.5) * place[:, None] / side)
    cosine = F.normalize(cosine, dim=1)
    plane = torch.einsum("ui,vj->uvij", cosine, cosine).flatten(0, 1)  # (P*P, P, P)
    order = (place[:, None] + place[None, :]).flatten().argsort(stable=True)
    luma = plane[order[torch.linspace(0, side * side - 1, width * 2 // 3).long()]]
    chroma = plane[order[: (width - len(luma) + 1) // 2]]
    grey, red, blue = (
        torch.tensor(weights)[None, :, None, None]
        for weights in ((0.58, 0.58, 0.58), (0.71, 0.0, -0.71), (-0.41, 0.82, -0.41))
    )
    filters = torch.cat([luma[:, None] * grey, chroma[:, None] * red, chroma[:, None] * blue])
    filters = filters[:width]
    responses = F.conv2d((views - 0.5) / 0.27, filters, stride=side)
    spread = responses.std(dim=(0, 2, 3)).clamp_min(1e-3)
    with torch.no_grad():
        patch_embedding.weight.copy_(filters / spread[:, None, None, None])


def measures(batch: dict[str, Tensor]) -> Tensor:
    """What P_D shall also tell, (P, 7), about 1 in size: `MEASURES`; NaN where it is unknown."""
    severity = batch["severities"].gather(1, batch["label"][:, None])
    severity = torch.where(severity < 0, torch.nan, severity)
    return torch.cat([3 * severity, 5 * batch["tone"]], dim=1)


def main(config: Config) -> Path:
    """Train, and write a file with `base.clip_vision.` and `prompt_processor.`."""
    return run_stage(build, config)


def build(
    models: Models, loaded: set[str], config: Config, store: PhotoStore | None = None
) -> tuple[Stage, Batches]:
    """The stage, and its data from the photos of `store`."""
    models.train_classifier(config.classification)
    data = replace(config.data, crops_per_part=1)  # a photo is a view here, and no crop is read
    reads = {"native_view", "tone"}
    train, validation = open_data(data, models.sizes, config.loop.seed, models.types, reads, store)
    if "base.clip_vision." not in loaded:
        start_as_spectrum(models.vision, validation["native_view"])
    ruler = nn.Linear(models.prompt.config.context_width, len(MEASURES)).to(home())
    validation = to_home(validation)
    trainable = nn.ModuleList(
        [models.vision, models.prompt.degradation, models.prompt.classifier, ruler]
    )

    def read(view: Tensor) -> tuple[Tensor, Tensor]:
        prompt = models.prompt(clip_tokens(models.vision, view))
        return prompt.logits.float(), ruler(prompt.pooled).float()

    step_function = maybe_compile(read, config.loop)

    def loss(batch: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        logits, measured = step_function(batch["native_view"])
        kinds = kind_loss(logits, batch, config.classification, config.mild)
        target = measures(batch)
        wrong = torch.where(target.isnan(), 0, measured - target.nan_to_num()).square().mean()
        total = kinds + config.measure_weight * wrong
        scores = kind_scores(logits.detach(), batch["kinds"], config.classification)
        return {"loss": total, config.classification: kinds, "measures": wrong, **scores}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        logits, measured = read(validation["native_view"])
        names = [
            f"{models.types[truth]} -> {models.types[best]}"
            for truth, best in zip(validation["label"], logits.argmax(dim=1), strict=True)
        ]
        save_sheet(folder / f"{step:07d}.jpg", {"view": validation["native_view"][:18]}, names)
        scores = kind_scores(logits, validation["kinds"], config.classification)
        scores["measures"] = (measured - measures(validation)).square().nanmean()
        scores["cross_entropy"] = kind_loss(logits, validation, config.classification)
        return {name: float(value) for name, value in scores.items()}

    parts = ("base.clip_vision.", "prompt_processor.")
    return stage_of(models, parts, trainable, loss, validate), train


if __name__ == "__main__":
    run_program(main, Config, __doc__)
