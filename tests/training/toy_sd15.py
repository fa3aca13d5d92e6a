"""A Stable Diffusion 1.5 with a CLIP tower at toy width, as files of every accepted layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import toy_weights
from training.common import ModelConfig
from training.networks import build_unet, build_vae
from training.pretrained import Sd15Config, open_base

UNET = toy_weights.UNetSizes(32, (1, 2), 1, (0,), 64)
VAE = toy_weights.VaeSizes(32)
VISION = toy_weights.VisionSizes(mlp=256)
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


def write_checkpoint(path: Path, unet: toy_weights.UNetSizes = UNET) -> Path:
    """One file as SD 1.5 is published, with a text encoder that nobody reads."""
    state = toy_weights.random_state(toy_weights.unet_shapes(unet), UNET_PREFIX, 1)
    state |= toy_weights.random_state(toy_weights.vae_shapes(VAE), VAE_PREFIX, 2)
    state["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(8)
    state["model_ema.decay"] = torch.zeros(())
    save_file(state, path)
    return path


def write_clip(path: Path, with_text: bool = True) -> Path:
    """Hugging Face's model.safetensors of a whole CLIP, or of its vision tower."""
    state = toy_weights.random_state(toy_weights.vision_shapes(VISION), "", 3)
    if with_text:
        state["text_model.final_layer_norm.bias"] = torch.zeros(8)
        state["logit_scale"] = torch.zeros(())
    save_file(state, path)
    return path


def write_folder(folder: Path, checkpoint: Path, clip: Path) -> Path:
    """The same weights as a diffusers folder, written by diffusers."""
    base = open_base(Sd15Config(checkpoint, clip=str(clip)), Sd15Config().sizes())
    for name, build, source in (("unet", build_unet, base.unet), ("vae", build_vae, base.vae)):
        module: Any = build(base.sizes)
        module.load_state_dict(source.state_dict())
        module.save_pretrained(folder / name)
    return folder


def write_clip_folder(folder: Path, **changes: str) -> Path:
    """A Hugging Face folder of the vision tower."""
    folder.mkdir(parents=True)
    write_clip(folder / "model.safetensors")
    config = {"vision_config": {"hidden_act": "quick_gelu"} | changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_config(folder: Path, **changes: Any) -> ModelConfig:
    """Settings of the training programs for toy files written into `folder`."""
    settings: dict[str, Any] = {
        "checkpoint": folder / "sd15.safetensors",
        "clip": str(folder / "clip.safetensors"),
        "prompt_hidden": 24,
        "fusion_levels": (1, 2),
        "fusion_growth": 4,
        "fusion_depth": 1,
    }
    if not settings["checkpoint"].exists():
        write_checkpoint(settings["checkpoint"])
        write_clip(Path(settings["clip"]))
    own = {name: changes.pop(name) for name in list(changes) if name in settings | {"vae": 0}}
    return ModelConfig(sd15=Sd15Config(**(settings | own)), **changes)
