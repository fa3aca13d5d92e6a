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
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ..diff_restorer.checkpoint import (
    V_PREDICTION,
    Checkpoint,
    CheckpointInfo,
    CheckpointKeysError,
    UnsupportedCheckpointError,
    read_checkpoint,
)
from .host import ModelPatcher, for_cpu, nano_unet_dtype, nano_vae_dtype
from .host_build import TINY_DECODER_KEY, check_fit, detect_unet, is_tiny_vae, vae_config
from .host_models import DiffRestorer


class _NanoUNet(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 at another width; not registered, so it never matches other files."""

    def __init__(self, unet_config: dict[str, Any], info: CheckpointInfo) -> None:
        super().__init__(unet_config)
        self.latent_format = _NanoLatent(info.latent_scale, unet_config["in_channels"])
        self.prediction = info.prediction

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> Any:
        """What the UNet predicts, as the host asks for it."""
        kinds = comfy.model_base.ModelType
        return kinds.V_PREDICTION if self.prediction == V_PREDICTION else kinds.EPS


class _NanoLatent(comfy.latent_formats.LatentFormat):
    """Latents of a VAE of our own: the previews made for Stable Diffusion's would be wrong."""

    def __init__(self, scale_factor: float, channels: int) -> None:
        self.scale_factor = scale_factor
        self.latent_channels = channels


def load_nano(path: Path, abstain: bool = True) -> tuple[Any, Any, Any, DiffRestorer]:
    """MODEL, CLIP_VISION, VAE and DIFF_RESTORER of one self-contained file.

    Args:
        path: The file.
        abstain: See `DiffRestorer`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be used; the message says why.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.self_contained:
        raise UnsupportedCheckpointError(
            f"{path}: holds no UNet, VAE and vision model of its own, so it is not a Nano file. "
            "Open it with Load Diff-Restorer."
        )
    dtype = nano_unet_dtype()
    restorer = DiffRestorer(checkpoint, dtype, abstain)
    for_cpu(restorer.control.network, dtype)
    return _unet(checkpoint, dtype), _clip_vision(checkpoint), _vae(checkpoint), restorer


def _unet(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    state, part = checkpoint.state("base.unet."), "UNet"
    config: Any = _NanoUNet(detect_unet(state, checkpoint.path, part), checkpoint.info)
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    if dtype is None:
        supported = config.supported_inference_dtypes
        parameters = comfy.utils.calculate_parameters(state)
        weights = comfy.utils.weight_dtype(state)
        host_dtype = comfy.model_management.unet_dtype(
            model_params=parameters, supported_dtypes=supported, weight_dtype=weights
        )
        cast = comfy.model_management.unet_manual_cast(host_dtype, device, supported)
        config.set_inference_dtype(host_dtype, cast)
    else:
        config.set_inference_dtype(dtype, None)
    model = config.get_model(state, "", device=offload_device)
    check_fit(model.diffusion_model, state, checkpoint.path, part)
    model.load_model_weights(dict(state), "")
    for_cpu(model.diffusion_model, dtype)
    return ModelPatcher(model, load_device=device, offload_device=offload_device)


def _vae(checkpoint: Checkpoint) -> Any:
    state, part = checkpoint.state("base.vae."), "VAE"
    dtype, config = nano_vae_dtype(), None
    try:
        if is_tiny_vae(state):
            channels, width = state[TINY_DECODER_KEY].shape[1::-1]
        else:
            sizes = vae_config(state)
            channels, width = state["post_quant_conv.weight"].shape[1], sizes["ch"]
            config = {"params": {"ddconfig": sizes, "embed_dim": channels}}
    except KeyError as error:
        raise CheckpointKeysError.of(checkpoint.path, part, [error.args[0]], ()) from error
    try:
        vae: Any = comfy.sd.VAE(sd=state, config=config, dtype=dtype)
    except RuntimeError as error:
        raise CheckpointKeysError(f"{checkpoint.path}: the VAE does not fit ({error}).") from error
    vae.latent_channels = channels
    _scale_memory(vae, width / 128)
    check_fit(vae.first_stage_model, state, checkpoint.path, part)
    for_cpu(vae.first_stage_model, dtype)
    return vae


def _scale_memory(vae: Any, share: float) -> None:
    """The host estimates memory for the 128 channels of Stable Diffusion's VAE."""
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: share * encode(shape, dtype)
    vae.memory_used_decode = lambda shape, dtype: share * decode(shape, dtype)


def _clip_vision(checkpoint: Checkpoint) -> Any:
    state, part = checkpoint.state("base.clip_vision."), "vision model"
    try:
        config = _clip_config(state, checkpoint.info.clip)
    except KeyError as error:
        raise CheckpointKeysError.of(checkpoint.path, part, [error.args[0]], ()) from error
    # The host's class reads its configuration from a file only.
    handle, name = tempfile.mkstemp(suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(config, file)
        clip_vision = comfy.clip_vision.ClipVisionModel(name)
    finally:
        os.unlink(name)
    check_fit(clip_vision.model, state, checkpoint.path, part)
    clip_vision.load_sd(state)
    return clip_vision


def _clip_config(state: Mapping[str, Tensor], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a CLIP vision transformer in Hugging Face layout.

    Raises:
        KeyError: A tensor that carries a size is missing.
    """
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
