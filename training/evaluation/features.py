"""What the model reads from degraded photos, drawn as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diff_restorer.degradations import KINDS

from ..pretrained import Sd15Config
from .pictures import read_image
from .plots import draw_tsne
from .reading import open_file, read_prompt
from .testsets import Case


def draw_features(file: Path, sd15: Sd15Config, cases: Sequence[Case], path: Path) -> str | None:
    """t-SNE of P_CLIP and P_D of the own sets; returns why it was not drawn.

    Args:
        file: The model's.
        sd15: Base networks of a file for SD 1.5.
        cases: The test cases.
        path: PNG to write.
    """
    chosen = [case for case in cases if case.set in KINDS]
    if len(chosen) < 5:
        return "t-SNE: needs at least five photos of the own sets"
    try:
        models = open_file(file, sd15)
    except (ValueError, OSError) as error:
        return f"t-SNE: {error}"
    clip: list[NDArray[np.float32]] = []
    degradation: list[NDArray[np.float32]] = []
    for case in tqdm(chosen, desc="features", unit="photo"):
        prompt, tokens = read_prompt(models, read_image(case.lq))
        clip.append(tokens.mean(dim=(0, 1)).cpu().numpy())
        degradation.append(prompt.pooled[0].cpu().numpy())
    features = {
        "P_CLIP (mean over tokens)": np.stack(clip),
        "P_D (pooled)": np.stack(degradation),
    }
    draw_tsne(features, [case.set for case in chosen], path)
    return None
