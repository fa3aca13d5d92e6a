"""The self-contained Nano file as the host's own MODEL, CLIP_VISION and VAE."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor

from ..diff_restorer.checkpoint import (
    TINY_VAE_KEY,
    V_PREDICTION,
    Checkpoint,
    CheckpointInfo,
    UnsupportedCheckpointError,
    read_checkpoint,
)
from ..diff_restorer.weights import check_fit
from .host import ModelPatcher, for_cpu, nano_unet_dtype, nano_vae_dtype
from .host_build import detect_unet, fill, sized_by, vae_config
from .host_models import DiffRestorer
from .host_preview import PreviewedLatent


class _NanoUNet(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 at another width; not registered, so it never matches other files."""

    def __init__(self, unet_config: dict[str, Any], info: CheckpointInfo, vae: Any) -> None:
        super().__init__(unet_config)
        channels = unet_config["in_channels"]
        self.latent_format = PreviewedLatent(info.latent_scale, channels, vae)
        self.prediction = info.prediction

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> Any:
        """What the UNet predicts, as the host asks for it."""
        kinds = comfy.model_base.ModelType
        return kinds.V_PREDICTION if self.prediction == V_PREDICTION else kinds.EPS


def load_nano(path: Path, abstain: bool = True) -> tuple[Any, Any, Any, DiffRestorer]:
    """MODEL, CLIP_VISION, VAE and DIFF_RESTORER of one self-contained file; raises
    FileNotFoundError where there is none, and CheckpointError, which says why, where it cannot be
    used."""
    checkpoint = read_checkpoint(path)
    if not checkpoint.self_contained:
        raise UnsupportedCheckpointError(
            f"{path}: holds no UNet, VAE and vision model of its own, so it is not a Nano file. "
            "Open it with Load Diff-Restorer."
        )
    dtype = nano_unet_dtype()
    restorer = DiffRestorer(checkpoint, dtype, abstain)
    for_cpu(restorer.control.network, dtype)
    restorer.clip_vision, restorer.vae = _clip_vision(checkpoint), _vae(checkpoint)
    unet = _unet(checkpoint, dtype, restorer.vae)
    return unet, restorer.clip_vision, restorer.vae, restorer


def _unet(checkpoint: Checkpoint, dtype: torch.dtype | None, vae: Any) -> Any:
    prefix, part = "base.unet.", "UNet"
    shapes = checkpoint.shapes(prefix)
    with sized_by(checkpoint, part):
        config: Any = _NanoUNet(detect_unet(shapes), checkpoint.info, vae)
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    if dtype is None:
        supported = config.supported_inference_dtypes
        parameters = comfy.utils.calculate_parameters(shapes)
        weights = comfy.utils.weight_dtype(shapes)
        dtype_of_host = comfy.model_management.unet_dtype(
            model_params=parameters, supported_dtypes=supported, weight_dtype=weights
        )
        cast = comfy.model_management.unet_manual_cast(dtype_of_host, device, supported)
        config.set_inference_dtype(dtype_of_host, cast)
    else:
        config.set_inference_dtype(dtype, None)
    with sized_by(checkpoint, part):
        model = config.get_model(shapes, "", device=torch.device("meta"))
    network = model.diffusion_model
    fill(network, checkpoint, prefix, part, config.unet_config["dtype"])
    for_cpu(network, dtype)
    model.to(offload_device)
    return ModelPatcher(model, load_device=device, offload_device=offload_device)


def _vae(checkpoint: Checkpoint) -> Any:
    prefix, part = "base.vae.", "VAE"
    shapes, config = checkpoint.shapes(prefix), None
    dtype = nano_vae_dtype()
    with sized_by(checkpoint, part), torch.device("meta"):
        if TINY_VAE_KEY in shapes:
            channels, width = shapes[TINY_VAE_KEY].shape[1::-1]
            wanted: Any = comfy.taesd.taesd.TAESD(latent_channels=channels)
        else:
            sizes = vae_config(shapes)
            channels, width = shapes["post_quant_conv.weight"].shape[1], sizes["ch"]
            config = {"params": {"ddconfig": sizes, "embed_dim": channels}}
            wanted = comfy.ldm.models.autoencoder.AutoencoderKL(**config["params"])
    # The host allocates whatever it is asked for, and goes on without what is missing.
    check_fit(wanted, shapes, checkpoint.path, part)
    vae: Any = comfy.sd.VAE(sd=checkpoint.state(prefix), config=config, dtype=dtype)
    vae.latent_channels = channels
    _scale_memory(vae, width / 128)
    for_cpu(vae.first_stage_model, dtype)
    return vae


def _scale_memory(vae: Any, share: float) -> None:
    """The host estimates memory for the 128 channels of Stable Diffusion's VAE."""
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: share * encode(shape, dtype)
    vae.memory_used_decode = lambda shape, dtype: share * decode(shape, dtype)


def _clip_vision(checkpoint: Checkpoint) -> Any:
    prefix, part = "base.clip_vision.", "vision model"
    shapes = checkpoint.shapes(prefix)
    with sized_by(checkpoint, part):
        config = _clip_config(shapes, checkpoint.info.clip)
        kind = comfy.clip_vision.IMAGE_ENCODERS[config["model_type"]]
        wanted = kind(config, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    check_fit(wanted, shapes, checkpoint.path, part)
    # The host's class reads its configuration from a file only.
    handle, name = tempfile.mkstemp(suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(config, file)
        clip_vision = comfy.clip_vision.ClipVisionModel(name)
    finally:
        os.unlink(name)
    clip_vision.load_sd(checkpoint.state(prefix))
    return clip_vision


def _clip_config(state: Mapping[str, Tensor], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a CLIP vision transformer in Hugging Face layout; raises KeyError where a tensor
    that carries a size is missing."""
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = comfy.model_detection.count_blocks(state.keys(), "vision_model.encoder.layers.{}.")
    preprocessing = {
        f"image_{name}": list(trained[name]) for name in ("mean", "std") if name in trained
    }
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": math.isqrt(positions - 1) * patch,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": width // 64,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "projection_dim": state["visual_projection.weight"].shape[0],
        **preprocessing,
    }
