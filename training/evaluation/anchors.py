"""What the figures are compared with beyond classical methods: networks, BM3D, published scores.

BM3D (Dabov et al. 2007; Makinen, Azzari and Foi 2020) is the optional package `bm3d` by its
authors, whose licence allows non-commercial, informational use only: no requirements file names it,
nothing of it is copied here, and whoever installs it accepts that licence. It is told sigma.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..common import home
from .competing import read_pixels
from .nafnet import load_network
from .pictures import digest, file_digest, made_once, pixel_digest, read_image, to_picture
from .smoothing import to_8_bit
from .testsets import NOISE_SIGMA, Case

ANCHORS: Mapping[str, str] = {"nafnet": "NAFNet", "bm3d": "BM3D, told sigma"}
"""Column of the scores -> its name in the tables."""
PUBLISHED: Mapping[tuple[str, str], str] = {
    ("CBSD68", "noise"): "DnCNN 27.92, Restormer 28.60",
    ("CBSD68", "jpeg"): "FBCNN +2.08 (LIVE1)",
}
"""(Folder of clean photos, set) -> published PSNR, or gain over LQ, of networks for that kind.

Sources: Zamir et al., "Restormer" (2022), which lists DnCNN (Zhang et al. 2017), too, for colour
CBSD68, sigma 50, all 68 photos; there the noisy photo is neither clipped nor rounded, so that it
starts at 14.15 dB. Jiang, Zhang and Timofte, "FBCNN" (2021): colour LIVE1, quality 10, 25.69 to
27.77 dB.
"""


def anchor_path(out: Path, anchor: str, case: Case) -> Path:
    """Where the photo restored by an anchor is kept."""
    return out / anchor / f"{case.id}.png"


def run_nafnet(file: Path, out: Path, cases: Sequence[Case]) -> None:
    """Restores photos with the comparison network, as `load_network` opens it."""
    network, model = load_network(file), file_digest(file)

    @torch.no_grad()
    def restored(case: Case) -> Image.Image:
        return to_picture(network(read_image(case.lq).to(home())))

    for case in tqdm(cases, desc=ANCHORS["nafnet"], unit="photo"):
        key = digest(model, pixel_digest(case.lq))
        made_once(anchor_path(out, "nafnet", case), key, partial(restored, case))


def run_bm3d(out: Path, cases: Sequence[Case]) -> str | None:
    """Denoises the own noise set, the one whose sigma is known; returns why it did not."""
    chosen = [case for case in cases if case.set == "noise"]
    try:
        package: Any = importlib.import_module("bm3d") if chosen else None
    except ImportError as error:
        return f"not available: {error}; its licence is for non-commercial use only"

    def denoised(case: Case) -> Image.Image:
        profile = package.BM3DProfile()
        profile.num_threads = 1  # more give results that differ a little each time
        photo = package.bm3d_rgb(read_pixels(case.lq), NOISE_SIGMA / 255, profile)
        return Image.fromarray(to_8_bit(np.asarray(photo)))

    for case in tqdm(chosen, desc="BM3D", unit="photo", disable=not chosen):
        key = digest("bm3d", str(NOISE_SIGMA), pixel_digest(case.lq))
        made_once(anchor_path(out, "bm3d", case), key, partial(denoised, case))
    return None
