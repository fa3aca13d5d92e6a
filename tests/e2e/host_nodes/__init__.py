"""Custom nodes for the tests' server: one loads any file, one waits while it is told to."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import torch


class E2EToyModels:
    """All parts of a self-contained Diff-Restorer file, wherever it lies."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"path": ("STRING", {})}}

    RETURN_TYPES = ("MODEL", "CLIP_VISION", "VAE", "DIFF_RESTORER")
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, path: str) -> tuple[Any, ...]:
        name = next(name for name in sys.modules if name.endswith("diff-restorer.nodes.host_nano"))
        return sys.modules[name].load_nano(Path(path))


class E2EHold:
    """Gives the image on, but waits while the file `path` is there and names this run, or none.

    Runs are counted from 1 by lines in ``<path>.log``.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"image": ("IMAGE",), "path": ("STRING", {})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, image: torch.Tensor, path: str) -> tuple[torch.Tensor]:
        hold, log = Path(path), Path(f"{path}.log")
        with log.open("a") as lines:
            lines.write("run\n")
        own = len(log.read_text().splitlines())
        while hold.exists() and hold.read_text() in ("", str(own)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        return (image,)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (E2EToyModels, E2EHold)}
