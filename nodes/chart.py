"""Bar chart of degradation probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_WIDTH, _ROW, _MARGIN, _LABELS, _NUMBERS = 480, 30, 12, 120, 64
_BACKGROUND, _TEXT, _TRACK, _BAR, _BEST = "#1f1f1f", "#dddddd", "#333333", "#5b7fa6", "#e8a33d"


def bar_chart(probabilities: Mapping[str, float]) -> Tensor:
    """One row per type, the first one highlighted.

    Args:
        probabilities: Type -> probability in [0, 1], in the order to be shown.

    Returns:
        Picture (H, W, 3) in [0, 1].
    """
    height = 2 * _MARGIN + _ROW * len(probabilities)
    picture = Image.new("RGB", (_WIDTH, height), _BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    left, right = _MARGIN + _LABELS, _WIDTH - _MARGIN - _NUMBERS
    for index, (name, probability) in enumerate(probabilities.items()):
        top = _MARGIN + index * _ROW
        middle, bar = top + _ROW // 2, (top + 6, top + _ROW - 6)
        draw.text((_MARGIN, middle), name.replace("_", " "), _TEXT, font, anchor="lm")
        draw.rectangle((left, bar[0], right, bar[1]), _TRACK)
        length = round(probability * (right - left))
        if length > 0:
            draw.rectangle((left, bar[0], left + length, bar[1]), _BAR if index else _BEST)
        number = f"{100 * probability:.1f} %"
        draw.text((_WIDTH - _MARGIN, middle), number, _TEXT, font, anchor="rm")
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
