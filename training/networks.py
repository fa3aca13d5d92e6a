"""The networks that training wraps, built at any size; sizes are read from tensor shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diff_restorer import (
    DetailConfig,
    DetailPath,
    FusionBlocks,
    FusionConfig,
    PromptProcessorConfig,
    VaeTrunk,
    make_hint_conv,
)
from diff_restorer.checkpoint import DETAIL_PREFIX, Checkpoint
from diff_restorer.control import zero_init

HEADS = 8
"""Attention heads of the UNet and control module at every level, as in SD 1.5."""


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of all parts; the defaults are Nano's."""

    vae_channels: tuple[int, ...] = ()
    """Channels of an AutoencoderKL by level; without any the VAE is a TAESD."""
    vae_layers: int = 1
    """Residual blocks per level of an AutoencoderKL."""
    latent_channels: int = 4
    unet_channels: tuple[int, ...] = (64, 128, 128)
    unet_layers: int = 1
    unet_attention: tuple[bool, ...] = (False, True, True)
    context_width: int = 192
    vision_width: int = 192
    vision_layers: int = 6
    vision_image: int = 192
    vision_patch: int = 16
    vision_head_width: int = 64
    prompt_hidden: int = 384
    detail_widths: tuple[int, ...] = (64, 112, 192)
    """Channels of the decoder's detail path at 1/2, 1/4 and 1/8; without any, the decoder has
    fusion blocks."""
    detail_depths: tuple[int, ...] = (2, 3, 6, 3, 2)
    """Blocks of its five groups."""
    fusion_levels: tuple[int, ...] = (1, 2, 3)
    fusion_growth: int = 16
    fusion_depth: int = 3
    fusion_pixel_width: int = 32


SD15_SIZES = Sizes(
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    unet_channels=(320, 640, 1280, 1280),
    unet_layers=2,
    unet_attention=(True, True, True, False),
    context_width=768,
    vision_width=1024,
    vision_layers=24,
    vision_image=224,
    vision_patch=14,
    prompt_hidden=1024,
    detail_widths=(),
    fusion_levels=(1, 2),
    fusion_growth=32,
    fusion_depth=5,
    fusion_pixel_width=0,
)
"""Stable Diffusion 1.5 with ViT-L/14, and what the paper (or StableSR's fusion) adds to it."""


# diffusers annotates its models loosely (tuples of one, outputs that may be tuples), so that the
# three builders and what they build are `Any` to the type checker.
def build_vae(sizes: Sizes) -> Any:
    """AutoencoderKL or AutoencoderTiny (TAESD) with 8x8 compression and random weights.

    The group norm of an AutoencoderKL leaves no absolute brightness where a group has less than
    four channels, so that it needs 128 channels at full size. TAESD has no norm and 64 channels.
    """
    if not sizes.vae_channels:
        return AutoencoderTiny(latent_channels=sizes.latent_channels)
    levels = len(sizes.vae_channels)
    arguments: dict[str, Any] = {
        "block_out_channels": sizes.vae_channels,
        "layers_per_block": sizes.vae_layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": sizes.latent_channels,
    }
    return AutoencoderKL(**arguments)


def build_unet(sizes: Sizes) -> Any:
    """UNet2DConditionModel with random weights."""
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in sizes.unet_attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(sizes.unet_attention))
    arguments: dict[str, Any] = {
        "in_channels": sizes.latent_channels,
        "out_channels": sizes.latent_channels,
        "block_out_channels": sizes.unet_channels,
        "layers_per_block": sizes.unet_layers,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": sizes.context_width,
        "attention_head_dim": HEADS,  # diffusers reads this as the number of heads
    }
    return UNet2DConditionModel(**arguments)


def build_control(unet: Any) -> Any:
    """Image-guided Control Module: the UNet's encoder copied, our hint in place of diffusers'."""
    control: Any = ControlNetModel.from_unet(unet)
    control.controlnet_cond_embedding = make_hint_conv(
        unet.config["in_channels"], unet.config["block_out_channels"][0]
    )
    return control


def build_extension(sizes: Sizes, vae: Any, kinds: int) -> DetailPath | FusionBlocks:
    """What extends the decoder of `vae`: a detail path with heads for `kinds`, or fusion blocks.

    Raises:
        ValueError: The sizes of a detail path are not those of three levels and five groups.
    """
    channels = VaeTrunk.of(vae).channels
    if not sizes.detail_widths:
        return FusionBlocks(
            FusionConfig(
                channels=tuple((level, channels[level]) for level in sizes.fusion_levels),
                growth=sizes.fusion_growth,
                depth=sizes.fusion_depth,
                context_width=sizes.context_width,
                pixels=(channels[0], sizes.fusion_pixel_width)
                if sizes.fusion_pixel_width
                else None,
            )
        )
    counts = len(sizes.detail_widths), len(sizes.detail_depths)
    if counts != (3, 5):
        raise ValueError(
            f"--model.sizes: detail_widths {sizes.detail_widths} and detail_depths "
            f"{sizes.detail_depths}; give three widths (1/2, 1/4, 1/8 size) and five depths"
        )
    config = DetailConfig(
        widths=sizes.detail_widths,  # pyright: ignore[reportArgumentType]
        depths=sizes.detail_depths,  # pyright: ignore[reportArgumentType]
        vae_channels=(channels[1], channels[2], channels[3]),
        context_width=sizes.context_width,
        kinds=kinds,
    )
    return DetailPath(config)


def build_time_mlp(unet: Any) -> nn.Module:
    """MLP from pooled P_D to the control module's time embedding, zero at first (an ablation)."""
    width = unet.config["block_out_channels"][0]
    mlp = TimestepEmbedding(unet.config["cross_attention_dim"], 4 * width)
    zero_init(mlp.linear_2)
    return mlp


def build_vision(sizes: Sizes) -> CLIPVisionModelWithProjection:
    """CLIP-like image encoder with random weights."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            projection_dim=sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_width // sizes.vision_head_width,
            image_size=sizes.vision_image,
            patch_size=sizes.vision_patch,
            hidden_act="quick_gelu",
        )
    )


def sizes_of(checkpoint: Checkpoint, default: Sizes = Sizes()) -> Sizes:
    """Sizes of the parts that a Diff-Restorer file holds; what it does not tell is `default`'s.

    Heads of the vision encoder leave no trace in its tensors: `vision_head_width` is `default`'s.

    Raises:
        ValueError: A tensor that carries a size is missing.
    """
    readers = {
        "base.unet.": unet_sizes,
        "base.vae.": vae_sizes,
        "base.clip_vision.": vision_sizes,
        "prompt_processor.": _prompt_sizes,
        "decoder.fusion.": _fusion_sizes,
        DETAIL_PREFIX: _detail_sizes,
    }
    sizes: dict[str, Any] = {}
    for prefix, read in readers.items():
        if shapes := checkpoint.shapes(prefix):
            try:
                sizes |= read(shapes)
            except KeyError as error:
                raise ValueError(f"{checkpoint.path}: part {prefix!r} lacks {error}") from error
    return replace(default, **sizes)


def unet_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of `Sizes` that a UNet in LDM layout tells."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for block in itertools.count(1):
        if f"input_blocks.{block}.0.op.weight" in state:
            levels.append([])
        elif (conv := f"input_blocks.{block}.0.out_layers.3.weight") in state:
            attends = f"input_blocks.{block}.1.norm.weight" in state
            levels[-1].append((state[conv].shape[0], attends))
        else:
            break
    attention = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "unet_channels": tuple(blocks[-1][0] for blocks in levels),
        "unet_layers": len(levels[0]),
        "unet_attention": tuple(blocks[-1][1] for blocks in levels),
        "context_width": state[attention].shape[1],
    }


def vae_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of `Sizes` that an AutoencoderKL in LDM layout or a TAESD tells."""
    if (tiny := "taesd_decoder.1.weight") in state:
        return {"vae_channels": (), "latent_channels": state[tiny].shape[1]}
    levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
    return {
        "vae_channels": tuple(
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        "vae_layers": _count(state, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": state["post_quant_conv.weight"].shape[1],
    }


def vision_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries of `Sizes` that a CLIP vision tower in Hugging Face's layout tells."""
    embeddings = "vision_model.embeddings."
    width, _, patch, _ = state[f"{embeddings}patch_embedding.weight"].shape
    places = state[f"{embeddings}position_embedding.weight"].shape[0] - 1
    return {
        "vision_width": width,
        "vision_layers": _count(state, "vision_model.encoder.layers.{}.mlp.fc1.weight"),
        "vision_image": math.isqrt(places) * patch,
        "vision_patch": patch,
    }


def _prompt_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    config = PromptProcessorConfig.from_state_dict(state)
    return {
        "vision_width": config.clip_width,
        "prompt_hidden": config.hidden_width,
        "context_width": config.context_width,
    }


def _fusion_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    config = FusionConfig.from_state_dict(state)
    return {
        "detail_widths": (),
        "fusion_levels": tuple(level for level, _ in config.channels),
        "fusion_growth": config.growth,
        "fusion_depth": config.depth,
        "fusion_pixel_width": config.pixels[1] if config.pixels else 0,
    }


def _detail_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    config = DetailConfig.from_state_dict(state)
    return {"detail_widths": config.widths, "detail_depths": config.depths}


def _count(state: Mapping[str, Tensor], key: str) -> int:
    return next(number for number in itertools.count() if key.format(number) not in state)


def memory_format() -> torch.memory_format:
    """Channels last on GPUs; on CPUs it makes group norm's backward pass twice as slow."""
    return torch.channels_last if torch.cuda.is_available() else torch.contiguous_format
