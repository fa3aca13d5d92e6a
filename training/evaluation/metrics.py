"""Scores of a restored photo; those that need a network run only where its weights are at hand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity
from torchmetrics.image.fid import FrechetInceptionDistance

from diff_restorer.similarity import psnr, ssim

FILES: Mapping[str, str] = {
    "lpips": "alexnet-owt-7be5be79.pth",
    "dists": "vgg16-397923af.pth",
    "fid": "weights-inception-2015-12-05-6726825d.pth",
}
"""Metric -> the file that torchvision or torch-fidelity keeps its network in."""


def fidelity(image: Tensor, reference: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of (1, 3, H, W) in [0, 1], RGB, at the given resolution; SSIM is NaN for
    strips that its window does not fit into."""
    similarity = ssim(image, reference)
    return {
        "psnr": float(psnr(image, reference)),
        "ssim": math.nan if similarity is None else similarity,
    }


class Learned:
    """LPIPS, DISTS and FID, as far as their weights are on this machine; nothing is downloaded."""

    def __init__(self, weights: Path | None = None) -> None:
        """Opens the networks in a folder with the files of `FILES`, by default torch hub's own
        cache."""
        folder = weights or Path(torch.hub.get_dir()) / "checkpoints"
        where = "--weights" if weights else "torch hub's cache (--weights names another folder)"
        self.missing: dict[str, str] = {}
        """Metric -> why it is not available."""
        self._metrics: dict[str, Any] = {}
        self._inception = folder / FILES["fid"]
        for name, file in FILES.items():
            if not (folder / file).is_file():
                self.missing[name] = f"not available: file {file} missing in {where}"
        with _hub(folder):
            if "lpips" not in self.missing:
                self._metrics["lpips"] = LearnedPerceptualImagePatchSimilarity(
                    "alex", normalize=True
                )
            if "dists" not in self.missing:
                self._metrics["dists"] = DeepImageStructureAndTextureSimilarity()

    def score(self, image: Tensor, reference: Tensor) -> dict[str, float]:
        """LPIPS (AlexNet) and DISTS, lower is better, of (1, 3, H, W) in [0, 1]."""
        with torch.no_grad():
            return {name: float(metric(image, reference)) for name, metric in self._metrics.items()}

    def fid(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> float | None:
        """Frechet inception distance between images and their references, at least two pairs of (1,
        3, H, W) in [0, 1]."""
        if "fid" in self.missing:
            return None
        metric = FrechetInceptionDistance(
            normalize=True, feature_extractor_weights_path=str(self._inception)
        )
        for image, reference in pairs:
            metric.update(image, real=False)
            metric.update(reference, real=True)
        return float(metric.compute())


@contextmanager
def _hub(folder: Path) -> Iterator[None]:
    """Lets torchvision find its files in `folder`, whatever that is called."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "checkpoints").symlink_to(folder.resolve(), target_is_directory=True)
        torch.hub.set_dir(place)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
