"""The pack in this process, with a toy Nano: what cases of files and values are tried with."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests import toy_weights
from tests.fuzz.cases import FaultError
from tools import in_process

Parts = tuple[Any, Any, Any, Any]
"""MODEL, CLIP_VISION, VAE and DIFF_RESTORER."""


class Toys:
    """A good file, and a whole restoration of a small photo, one step of sampling long."""

    def __init__(self, pack: ModuleType, folder: Path) -> None:
        self.pack = pack
        path = folder / "good.safetensors"
        tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
        pack.diff_restorer.checkpoint.write_checkpoint(path, tensors, toy_weights.info())
        generator = torch.Generator().manual_seed(0)
        self.photo = torch.rand(1, 20, 28, 3, generator=generator)
        self.parts = self.load(path, True)
        self.expected = self.restore(*self.parts)

    def load(self, path: Path, complete: bool) -> Parts:
        """What both loaders do; the rest of an incomplete file is that of the good one."""
        with torch.inference_mode():
            if complete:
                return self.pack.nodes.host_nano.load_nano(path)
            return *self.parts[:3], self.pack.nodes.host_models.load_restorer(path)

    def restore(self, model: Any, clip_vision: Any, vae: Any, restorer: Any) -> Tensor:
        """The restored photo, (1, H, W, 3); `FaultError` where it is none."""
        with torch.inference_mode():
            positive, negative, degradation = in_process.execute(
                "DiffRestorerPromptProcessor", diff_restorer=restorer, clip_vision=clip_vision,
                image=self.photo,
            )  # fmt: skip
            positive, negative, latent = in_process.execute(
                "DiffRestorerDegradationControl", positive=positive, negative=negative,
                degradation=degradation, vae=vae,
            )  # fmt: skip
            nodes: Any = importlib.import_module("nodes")
            (sampled,) = nodes.common_ksampler(
                model, 1, 1, 1.0, "euler", "normal", positive, negative, latent
            )
            (image,) = in_process.execute(
                "DiffRestorerAwareVAEDecode", samples=sampled, degradation=degradation, vae=vae
            )
        check_picture(image, self.photo.shape)
        return image


def check_picture(image: Any, shape: Any = None) -> None:
    """`FaultError` where it is no image of the host, with numbers from 0 to 1."""
    good = isinstance(image, Tensor) and image.ndim == 4 and image.numel() > 0
    if not good or (shape is not None and image.shape != shape):
        raise FaultError(f"no picture of {shape}: {getattr(image, 'shape', type(image))}")
    if not (bool(image.isfinite().all()) and image.min() >= 0 and image.max() <= 1):
        raise FaultError("a picture that is not finite, or not from 0 to 1, as a success")
