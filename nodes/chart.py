"""Pictures of degradation probabilities: bar charts, and a map over a photo."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .sockets import Degradation

_WIDTH, _ROW, _MARGIN, _LABELS, _NUMBERS = 480, 30, 12, 120, 64
_BACKGROUND, _TEXT, _TRACK, _BAR, _BEST = "#1f1f1f", "#dddddd", "#333333", "#5b7fa6", "#e8a33d"


def bar_chart(probabilities: Mapping[str, float], highlighted: Collection[str]) -> Tensor:
    """Picture (H, W, 3) in [0, 1] with a row for each type and its probability in [0, 1], in their
    order; those `highlighted` have the colour of what was found."""
    height = 2 * _MARGIN + _ROW * len(probabilities)
    picture = Image.new("RGB", (_WIDTH, height), _BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    left, right = _MARGIN + _LABELS, _WIDTH - _MARGIN - _NUMBERS
    for index, (name, probability) in enumerate(probabilities.items()):
        color = _BEST if name in highlighted else _BAR
        top = _MARGIN + index * _ROW
        middle, bar = top + _ROW // 2, (top + 6, top + _ROW - 6)
        draw.text((_MARGIN, middle), name.replace("_", " "), _TEXT, font, anchor="lm")
        draw.rectangle((left, bar[0], right, bar[1]), _TRACK)
        length = round(probability * (right - left))
        if length > 0:
            draw.rectangle((left, bar[0], left + length, bar[1]), color)
        number = f"{100 * probability:.1f} %"
        draw.text((_WIDTH - _MARGIN, middle), number, _TEXT, font, anchor="rm")
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


def shown_kinds(degradation: Degradation, node: type[io.ComfyNode]) -> dict[str, Any]:
    """What a node shows of a degradation: the chart of each photo, and JSON for /history."""
    pairs = zip(degradation.as_dicts(), degradation.kinds, strict=True)
    charts = torch.stack([bar_chart(*pair) for pair in pairs])
    text = ui.PreviewText(degradation.as_json())
    # The front end takes one dictionary.
    return ui.PreviewImage(charts, cls=node).as_dict() | text.as_dict()


_HUES = (
    "#e6194b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#3cb44b", "#f0f0f0", "#ffe119",
    "#808080", "#f032e6", "#9a6324", "#008080",
)  # fmt: skip


def degradation_map(
    photo: Tensor,
    parts: Sequence[tuple[int, int, int, int]],
    types: Sequence[tuple[int, str, float]],
) -> Tensor:
    """A photo (H, W, 3) in [0, 1] with what each part of it suffers from, its long side at most
    1024 pixels.

    Args:
        parts: (top, left, height, width) of each part in pixels; they may overlap.
        types: For each part the number of its type, its name and its probability.
    """
    pixels = (photo.cpu().clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels)
    scale = min(1.0, 1024 / max(picture.size))
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    shades = Image.new("RGB", picture.size)
    draw, marks = ImageDraw.Draw(shades), []
    for (top, left, height, width), (number, name, probability) in zip(parts, types, strict=True):
        box = [round(edge * scale) for edge in (left, top, left + width, top + height)]
        draw.rectangle(box, _HUES[number % len(_HUES)])
        marks.append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], name,
                      probability))  # fmt: skip
    picture = Image.blend(picture, shades, 0.35)
    draw = ImageDraw.Draw(picture)
    for x, y, width, name, probability in marks:
        font = ImageFont.load_default(max(9, min(22, width // 8)))
        text = f"{name.replace('_', ' ')}\n{100 * probability:.0f} %"
        draw.multiline_text((x, y), text, "white", font, anchor="mm", align="center",
                            stroke_width=1, stroke_fill="black")  # fmt: skip
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
