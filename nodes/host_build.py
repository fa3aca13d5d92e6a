"""The parts of a Diff-Restorer file as networks of the host, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ..diff_restorer.checkpoint import (
    DETAIL_PREFIX,
    TINY_VAE_KEY,
    Checkpoint,
    CheckpointError,
    CheckpointKeysError,
)
from ..diff_restorer.weights import check_fit, shortened
from .host import ModelPatcher, is_oom
from .host_control import ControlModel, DegradationControlNet

# Stable Diffusion 1.5 has eight heads everywhere, which no tensor shape tells.
_HEADS = {"num_heads": 8, "num_head_channels": -1}


@contextmanager
def sized_by(checkpoint: Checkpoint, part: str) -> Iterator[None]:
    """Around what reads sizes from a file's shapes and builds a network of them: raises
    CheckpointKeysError where they make none.

    Much code of ours and of the host does so, each with its own idea of shapes that cannot be.
    """
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointKeysError.of(checkpoint.path, part, [str(error.args[0])], ()) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if is_oom(e):
            raise
        raise CheckpointKeysError(
            f"{checkpoint.path}: the {part} does not fit: its shapes make no network "
            f"({shortened(e)}). Export the file again."
        ) from e


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    part: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Read the tensors of a file under `prefix` into a module that was built without memory (device
    meta), in its number format or as `dtype`; errors call it `part`.

    Raises CheckpointKeysError where keys or sizes differ, which is found before anything is read,
    and CheckpointValuesError where values are not finite.
    """
    check_fit(module, checkpoint.shapes(prefix), checkpoint.path, part)
    module.load_state_dict(checkpoint.state(prefix, dtype), assign=True)
    module.eval().requires_grad_(False)


def detect_unet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of a UNet or ControlNet in LDM layout, in the host's terms; raises KeyError for other
    tensors."""
    config = comfy.model_detection.detect_unet_config(dict(state), "")
    if config is None or config.get("context_dim") is None:
        raise KeyError("input_blocks.0.0.weight")
    return config | _HEADS


def vae_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of an AutoencoderKL's halves, from its decoder (LDM layout); raises
    KeyError where a tensor that carries a size is missing."""
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
    prefix, part = "prompt_processor.", "prompt processor"
    with sized_by(checkpoint, part):
        config = PromptProcessorConfig.from_state_dict(checkpoint.shapes(prefix))
        model = PromptProcessor(config, comfy.ops.manual_cast, device=torch.device("meta"))
    if config.num_types != len(checkpoint.info.types):
        raise CheckpointKeysError(
            f"{checkpoint.path}: the classifier has {config.num_types} outputs, the metadata name "
            f"{len(checkpoint.info.types)} types. Export the file again."
        )
    fill(model, checkpoint, prefix, part)
    device = comfy.model_management.text_encoder_device()
    return ModelPatcher(model, device, comfy.model_management.text_encoder_offload_device())


def build_control(
    checkpoint: Checkpoint, latent_format: Any, dtype: torch.dtype | None
) -> DegradationControlNet:
    """The control module, to be copied per use; without `dtype` the host chooses."""
    prefix, part = "control.", "control module"
    shapes = checkpoint.shapes(prefix)
    device = comfy.model_management.get_torch_device()
    cast = None
    if dtype is None:
        weights = comfy.utils.weight_dtype(shapes)
        dtype = comfy.model_management.unet_dtype(model_params=-1, weight_dtype=weights)
        cast = comfy.model_management.unet_manual_cast(dtype, device)
    assert dtype is not None
    operations = comfy.ops.pick_operations(dtype, cast)
    with sized_by(checkpoint, part):
        config = detect_unet(shapes)
        config.pop("out_channels")
        channels = shapes["input_hint_block.0.weight"].shape[1]
        model = ControlModel(config, channels, operations, torch.device("meta"), dtype)
    fill(model, checkpoint, prefix, part, dtype)
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
        if shapes := checkpoint.shapes(prefix):
            with sized_by(checkpoint, part):
                config: Any = sizes.from_state_dict(shapes)
                model = network(config, comfy.ops.manual_cast, device=torch.device("meta"))
            fill(model, checkpoint, prefix, part)
            return _vae_patcher(model)
    return None


def build_tuned_decoder(checkpoint: Checkpoint) -> Any:
    """The finetuned decoder, a module with `decoder` and `post_quant_conv` as a VAE has them.

    Of a TAESD it is the `taesd_decoder`.
    """
    prefix, part = "decoder.vae.", "finetuned VAE decoder"
    shapes, module = checkpoint.shapes(prefix), nn.Module()
    with sized_by(checkpoint, part), torch.device("meta"):
        if TINY_VAE_KEY in shapes:
            module.taesd_decoder = comfy.taesd.taesd.Decoder(shapes[TINY_VAE_KEY].shape[1])
        else:
            config = vae_config(shapes)
            embed = shapes["post_quant_conv.weight"].shape[1]
            module.decoder = comfy.ldm.modules.diffusionmodules.model.Decoder(**config)
            module.post_quant_conv = comfy.ops.disable_weight_init.Conv2d(
                embed, config["z_channels"], 1
            )
    fill(module, checkpoint, prefix, part)
    return _vae_patcher(module)


def _vae_patcher(module: nn.Module) -> Any:
    device = comfy.model_management.vae_device()
    return ModelPatcher(module, device, comfy.model_management.vae_offload_device())


def with_tuned_decoder(vae_module: Any, tuned: Any) -> Any:
    """The host's VAE with the decoder half of the file, sharing all weights with both; `check_vae`
    has seen that they are of one kind."""
    if hasattr(tuned, "taesd_decoder"):
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
