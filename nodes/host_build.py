"""The parts of a Diff-Restorer file as networks of the host, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ldm.modules.diffusionmodules.model
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor, nn

from ..diff_restorer import (
    DetailConfig,
    DetailPath,
    FusionBlocks,
    FusionConfig,
    PromptProcessor,
    PromptProcessorConfig,
)
from ..diff_restorer.checkpoint import DETAIL_PREFIX, Checkpoint, CheckpointKeysError
from .host import ModelPatcher
from .host_control import ControlModel, DegradationControlNet

# Stable Diffusion 1.5 has eight heads everywhere, which no tensor shape tells.
_HEADS = {"num_heads": 8, "num_head_channels": -1}


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, part: str) -> None:
    """Put tensors into a module that was built without memory (device meta), not copying them.

    Raises:
        CheckpointKeysError: Keys or sizes differ.
    """
    check_fit(module, state, path, part)
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path, part: str) -> None:
    """Compare keys and sizes; the host itself only logs what is missing.

    Raises:
        CheckpointKeysError: Keys or sizes differ.
    """
    wanted = module.state_dict()
    misfits = [
        f"{key} {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}"
        for key, tensor in state.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected or misfits:
        raise CheckpointKeysError.of(path, part, missing, [*unexpected, *misfits])


def detect_unet(state: Mapping[str, Tensor], path: Path, part: str) -> dict[str, Any]:
    """Sizes of a UNet or ControlNet in LDM layout, in the host's terms.

    Raises:
        CheckpointKeysError: The tensors are not those of a UNet.
    """
    try:
        config = comfy.model_detection.detect_unet_config(dict(state), "")
    except KeyError as error:
        raise CheckpointKeysError.of(path, part, [str(error.args[0])], ()) from error
    if config is None or config.get("context_dim") is None:
        raise CheckpointKeysError.of(path, part, ["input_blocks.0.0.weight"], ())
    return config | _HEADS


TINY_DECODER_KEY = "taesd_decoder.1.weight"
"""By this key the host knows a TAESD."""


def is_tiny_vae(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights are those of a TAESD, as Nano's are."""
    return TINY_DECODER_KEY in state


def vae_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of an AutoencoderKL's halves, from its decoder (LDM layout).

    Raises:
        KeyError: A tensor that carries a size is missing.
    """
    levels = comfy.model_detection.count_blocks(state.keys(), "decoder.up.{}.")
    blocks = comfy.model_detection.count_blocks(state.keys(), "decoder.up.0.block.{}.")
    channels = [state[f"decoder.up.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "double_z": True,
        "z_channels": state["decoder.conv_in.weight"].shape[1],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": state["decoder.conv_out.weight"].shape[0],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": blocks - 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def build_prompt_processor(checkpoint: Checkpoint) -> Any:
    """The prompt processor under the host's memory management, on the device of CLIP."""
    state, part = checkpoint.state("prompt_processor."), "prompt processor"
    try:
        config = PromptProcessorConfig.from_state_dict(state)
    except KeyError as error:
        raise CheckpointKeysError.of(checkpoint.path, part, [error.args[0]], ()) from error
    if config.num_types != len(checkpoint.info.types):
        raise CheckpointKeysError(
            f"{checkpoint.path}: the classifier has {config.num_types} outputs, the metadata name "
            f"{len(checkpoint.info.types)} types. Export the file again."
        )
    model = PromptProcessor(config, comfy.ops.manual_cast, device=torch.device("meta"))
    fill(model, state, checkpoint.path, part)
    device = comfy.model_management.text_encoder_device()
    return ModelPatcher(model, device, comfy.model_management.text_encoder_offload_device())


def build_control(
    checkpoint: Checkpoint, latent_format: Any, dtype: torch.dtype | None
) -> DegradationControlNet:
    """The control module, to be copied per use; without `dtype` the host chooses."""
    state, part = checkpoint.state("control."), "control module"
    config = detect_unet(state, checkpoint.path, part)
    config.pop("out_channels")
    hint = state.get("input_hint_block.0.weight")
    if hint is None:
        raise CheckpointKeysError.of(checkpoint.path, part, ["input_hint_block.0.weight"], ())
    device = comfy.model_management.get_torch_device()
    cast = None
    if dtype is None:
        weights = comfy.utils.weight_dtype(state)
        dtype = comfy.model_management.unet_dtype(model_params=-1, weight_dtype=weights)
        cast = comfy.model_management.unet_manual_cast(dtype, device)
    assert dtype is not None
    operations = comfy.ops.pick_operations(dtype, cast)
    model = ControlModel(config, hint.shape[1], operations, torch.device("meta"), dtype)
    check_fit(model, state, checkpoint.path, part)
    fill(model, {key: tensor.to(dtype) for key, tensor in state.items()}, checkpoint.path, part)
    return DegradationControlNet(
        model,
        compression_ratio=1,
        latent_format=latent_format,
        load_device=device,
        manual_cast_dtype=cast,
    )


def build_extension(checkpoint: Checkpoint) -> Any:
    """What a file adds to the VAE's decoder, a detail path or fusion blocks, under the host's
    memory management, on the device of the VAE; None where it adds nothing."""
    for prefix, part, sizes, network in (
        (DETAIL_PREFIX, "decoder's detail path", DetailConfig, DetailPath),
        ("decoder.fusion.", "decoder's fusion blocks", FusionConfig, FusionBlocks),
    ):
        if state := checkpoint.state(prefix):
            try:
                config: Any = sizes.from_state_dict(state)
            except (KeyError, ValueError) as error:
                missing = [str(error.args[0])]
                raise CheckpointKeysError.of(checkpoint.path, part, missing, ()) from error
            model = network(config, comfy.ops.manual_cast, device=torch.device("meta"))
            fill(model, state, checkpoint.path, part)
            return _vae_patcher(model)
    return None


def build_tuned_decoder(checkpoint: Checkpoint) -> Any:
    """The finetuned decoder, a module with `decoder` and `post_quant_conv` as a VAE has them.

    Of a TAESD it is the `taesd_decoder`.
    """
    state, part = checkpoint.state("decoder.vae."), "finetuned VAE decoder"
    module = nn.Module()
    if is_tiny_vae(state):
        with torch.device("meta"):
            channels = state[TINY_DECODER_KEY].shape[1]
            module.taesd_decoder = comfy.taesd.taesd.Decoder(channels)
        fill(module, state, checkpoint.path, part)
        return _vae_patcher(module)
    try:
        config = vae_config(state)
        embed = state["post_quant_conv.weight"].shape[1]
    except KeyError as error:
        raise CheckpointKeysError.of(checkpoint.path, part, [error.args[0]], ()) from error
    with torch.device("meta"):
        module.decoder = comfy.ldm.modules.diffusionmodules.model.Decoder(**config)
        module.post_quant_conv = comfy.ops.disable_weight_init.Conv2d(
            embed, config["z_channels"], 1
        )
    fill(module, state, checkpoint.path, part)
    return _vae_patcher(module)


def _vae_patcher(module: nn.Module) -> Any:
    device = comfy.model_management.vae_device()
    return ModelPatcher(module, device, comfy.model_management.vae_offload_device())


def with_tuned_decoder(vae_module: Any, tuned: Any) -> Any:
    """The host's VAE with the decoder half of the file, sharing all weights with both.

    Raises:
        ValueError: One is a TAESD, the other is not.
    """
    tiny = hasattr(tuned, "taesd_decoder")
    if tiny != hasattr(vae_module, "taesd_decoder"):
        raise ValueError(
            f"vae: found {'an AutoencoderKL' if tiny else 'a TAESD'}, but the file's decoder "
            f"belongs to {'a TAESD (Nano)' if tiny else 'an AutoencoderKL'}. Connect the VAE that "
            "the file was trained for: that of your SD 1.5 checkpoint, or Nano's for Nano."
        )
    if tiny:
        return SimpleNamespace(
            taesd_encoder=vae_module.taesd_encoder,
            taesd_decoder=tuned.taesd_decoder,
            vae_scale=vae_module.vae_scale,
            vae_shift=vae_module.vae_shift,
        )
    return SimpleNamespace(
        encoder=vae_module.encoder,
        quant_conv=getattr(vae_module, "quant_conv", None),
        decoder=tuned.decoder,
        post_quant_conv=tuned.post_quant_conv,
    )
