"""Scores of a restored photo; those that need a network run only where its weights are at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity
from torchmetrics.image.fid import FrechetInceptionDistance

from ..models import psnr

IDENTICAL = 100.0
"""PSNR of two pictures that do not differ, where the formula gives infinity."""
FILES: Mapping[str, str] = {
    "lpips": "alexnet-owt-7be5be79.pth",
    "dists": "vgg16-397923af.pth",
    "fid": "weights-inception-2015-12-05-6726825d.pth",
}
"""Metric -> the file that torchvision or torch-fidelity keeps its network in."""


def fidelity(image: Tensor, reference: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of (1, 3, H, W) in [0, 1], RGB, at the given resolution.

    Source: SSIM of Wang et al. (2004) by scikit-image: Gaussian window of 11 px with sigma 1.5,
    the mean over channels and all places where the window fits.
    """
    similarity: Any = structural_similarity(
        reference[0].numpy(),
        image[0].numpy(),
        data_range=1.0,
        channel_axis=0,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    return {"psnr": float(psnr(image, reference)), "ssim": float(similarity)}


class Learned:
    """LPIPS, DISTS and FID, as far as their weights are on this machine; nothing is downloaded.

    Attributes:
        missing: Metric -> why it is not available.
    """

    def __init__(self, weights: Path | None = None) -> None:
        """Opens the networks.

        Args:
            weights: Folder with the files of `FILES`; None takes torch hub's own cache.
        """
        folder = weights or Path(torch.hub.get_dir()) / "checkpoints"
        where = "--weights" if weights else "torch hub's cache (--weights names another folder)"
        self.missing: dict[str, str] = {}
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
        """Frechet inception distance between a set of images and their references.

        Args:
            pairs: (image, reference), (1, 3, H, W) in [0, 1] each; at least two.
        """
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
