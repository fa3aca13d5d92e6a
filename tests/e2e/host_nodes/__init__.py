"""Custom nodes for the tests' server: real models of other kinds, at toy width, random weights.

Files of such models would be gigabytes, because the host only knows them at full size.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch


def _randomise(module: torch.nn.Module) -> None:
    """Fills what the host's layers leave uninitialised."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


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


class E2ESdxlModel:
    """A UNet of the host's SDXL class."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self) -> tuple[Any]:
        sizes = {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 2048,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "legacy": False,
        }
        config = comfy.supported_models.SDXL(sizes)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        _randomise(model.diffusion_model)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, device, device),)


class E2EControlNet:
    """A stock ControlNet that fits a model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, model: Any) -> tuple[Any]:
        sizes = dict(model.model.model_config.unet_config)
        for name in ("out_channels", "transformer_depth_output", "disable_unet_model_creation"):
            sizes.pop(name, None)
        sizes["dtype"] = torch.float32
        net = comfy.cldm.cldm.ControlNet(
            hint_channels=3, operations=comfy.ops.disable_weight_init, **sizes
        )
        _randomise(net)
        return (comfy.controlnet.ControlNet(net, manual_cast_dtype=torch.float32),)


class E2ENanImage:
    """What a broken node before would send."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        broken = image.clone()
        broken[:, 0, 0] = float("nan")
        return (broken,)


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


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (E2EToyModels, E2ESdxlModel, E2EControlNet, E2ENanImage, E2EHold)
}
