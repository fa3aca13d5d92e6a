"""How legible what is on the screen is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_STROKES = 0.99
"""Quantile that lies within the strokes of text, which cover some percent of a paragraph."""


def contrast_of(place: Path) -> float:
    """Contrast of the text in a screenshot with its most frequent colour, 1 to 21.

    Source: WCAG 2.1, success criterion 1.4.3; smoothed edges make it rather lower than that.
    """
    pixels = np.asarray(Image.open(place).convert("RGB"), np.float64) / 255
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    luminance = (linear @ [0.2126, 0.7152, 0.0722]).ravel()
    counts, edges = np.histogram(luminance, 256, (0, 1))
    background = edges[counts.argmax()]
    lighter, darker = np.maximum(luminance, background), np.minimum(luminance, background)
    return float(np.quantile((lighter + 0.05) / (darker + 0.05), _STROKES))
