"""Diff-Restorer files with random weights, at any size, valid and damaged.

Nothing is zero, unlike in a fresh training: with zero convs at zero every test of a control passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diff_restorer import (
    DetailConfig,
    DetailPath,
    FusionBlocks,
    FusionConfig,
    PromptProcessor,
    PromptProcessorConfig,
)
from diff_restorer.checkpoint import CheckpointInfo, write_checkpoint

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class UNetSizes:
    """A UNet of the Stable Diffusion 1.5 kind."""

    channels: int = 32
    mult: tuple[int, ...] = (1, 2)
    res_blocks: int = 1
    attention_levels: tuple[int, ...] = (1,)
    context: int = 32


@dataclass(frozen=True)
class VaeSizes:
    """An AutoencoderKL that scales by 8."""

    channels: int = 32
    mult: tuple[int, ...] = (1, 1, 2, 2)
    res_blocks: int = 1
    latent_channels: int = 4


@dataclass(frozen=True)
class VisionSizes:
    """A CLIP vision transformer; heads are 64 wide."""

    width: int = 64
    layers: int = 2
    patch: int = 16
    image: int = 64
    mlp: int = 128
    projection: int = 48


SD15_UNET = UNetSizes(320, (1, 2, 4, 4), 2, (0, 1, 2), 768)
SD15_VAE = VaeSizes(128, (1, 2, 4, 4), 2)
VIT_L = VisionSizes(1024, 24, 14, 224, 4096, 768)
TYPES = ("noise", "blur", "jpeg", "low_light", "haze", "rain", "snow", "raindrop")


def _conv(key: str, cin: int, cout: int, kernel: int = 3) -> Shapes:
    yield f"{key}.weight", (cout, cin, kernel, kernel)
    yield f"{key}.bias", (cout,)


def _linear(key: str, cin: int, cout: int, bias: bool = True) -> Shapes:
    yield f"{key}.weight", (cout, cin)
    if bias:
        yield f"{key}.bias", (cout,)


def _norm(key: str, channels: int) -> Shapes:
    yield f"{key}.weight", (channels,)
    yield f"{key}.bias", (channels,)


def _res_block(key: str, cin: int, cout: int, emb: int) -> Shapes:
    yield from _norm(f"{key}.in_layers.0", cin)
    yield from _conv(f"{key}.in_layers.2", cin, cout)
    yield from _linear(f"{key}.emb_layers.1", emb, cout)
    yield from _norm(f"{key}.out_layers.0", cout)
    yield from _conv(f"{key}.out_layers.3", cout, cout)
    if cin != cout:
        yield from _conv(f"{key}.skip_connection", cin, cout, 1)


def _transformer(key: str, channels: int, context: int) -> Shapes:
    yield from _norm(f"{key}.norm", channels)
    yield from _conv(f"{key}.proj_in", channels, channels, 1)
    block = f"{key}.transformer_blocks.0"
    for attention, width in (("attn1", channels), ("attn2", context)):
        yield from _linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_k", width, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_v", width, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
    yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    for index in (1, 2, 3):
        yield from _norm(f"{block}.norm{index}", channels)
    yield from _conv(f"{key}.proj_out", channels, channels, 1)


def _encoder_half(sizes: UNetSizes) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
    """Shapes of time embedding, input blocks and middle block; channels after each input block."""
    emb = 4 * sizes.channels
    shapes = [
        *_linear("time_embed.0", sizes.channels, emb),
        *_linear("time_embed.2", emb, emb),
        *_conv("input_blocks.0.0", 4, sizes.channels),
    ]
    widths, channels = [sizes.channels], sizes.channels
    for level, factor in enumerate(sizes.mult):
        for _ in range(sizes.res_blocks):
            key, out = f"input_blocks.{len(widths)}", factor * sizes.channels
            shapes += _res_block(f"{key}.0", channels, out, emb)
            channels = out
            if level in sizes.attention_levels:
                shapes += _transformer(f"{key}.1", channels, sizes.context)
            widths.append(channels)
        if level < len(sizes.mult) - 1:
            shapes += _conv(f"input_blocks.{len(widths)}.0.op", channels, channels)
            widths.append(channels)
    shapes += _res_block("middle_block.0", channels, channels, emb)
    shapes += _transformer("middle_block.1", channels, sizes.context)
    shapes += _res_block("middle_block.2", channels, channels, emb)
    return shapes, widths


def unet_shapes(sizes: UNetSizes) -> Shapes:
    """LDM layout, without `model.diffusion_model.`."""
    shapes, skips = _encoder_half(sizes)
    yield from shapes
    emb, channels, index = 4 * sizes.channels, skips[-1], 0
    for level in reversed(range(len(sizes.mult))):
        for block in range(sizes.res_blocks + 1):
            key, out = f"output_blocks.{index}", sizes.mult[level] * sizes.channels
            yield from _res_block(f"{key}.0", channels + skips.pop(), out, emb)
            channels, place = out, 1
            if level in sizes.attention_levels:
                yield from _transformer(f"{key}.1", channels, sizes.context)
                place = 2
            if level and block == sizes.res_blocks:
                yield from _conv(f"{key}.{place}.conv", channels, channels)
            index += 1
    yield from _norm("out.0", channels)
    yield from _conv("out.2", channels, 4)


def control_shapes(sizes: UNetSizes) -> Shapes:
    """LDM ControlNet with Diff-Restorer's hint conv."""
    shapes, widths = _encoder_half(sizes)
    yield from shapes
    for index, width in enumerate(widths):
        yield from _conv(f"zero_convs.{index}.0", width, width, 1)
    yield from _conv("middle_block_out.0", widths[-1], widths[-1], 1)
    yield from _conv("input_hint_block.0", 4, sizes.channels)


def _vae_block(key: str, cin: int, cout: int) -> Shapes:
    yield from _norm(f"{key}.norm1", cin)
    yield from _conv(f"{key}.conv1", cin, cout)
    yield from _norm(f"{key}.norm2", cout)
    yield from _conv(f"{key}.conv2", cout, cout)
    if cin != cout:
        yield from _conv(f"{key}.nin_shortcut", cin, cout, 1)


def _vae_mid(key: str, channels: int) -> Shapes:
    yield from _vae_block(f"{key}.block_1", channels, channels)
    yield from _norm(f"{key}.attn_1.norm", channels)
    for name in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{key}.attn_1.{name}", channels, channels, 1)
    yield from _vae_block(f"{key}.block_2", channels, channels)


def vae_shapes(sizes: VaeSizes) -> Shapes:
    """LDM AutoencoderKL: encoder, quant_conv, post_quant_conv, decoder."""
    widths, z = [sizes.channels * factor for factor in sizes.mult], sizes.latent_channels
    yield from _conv("encoder.conv_in", 3, sizes.channels)
    channels = sizes.channels
    for level, width in enumerate(widths):
        for block in range(sizes.res_blocks):
            yield from _vae_block(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level < len(widths) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    yield from _vae_mid("encoder.mid", channels)
    yield from _norm("encoder.norm_out", channels)
    yield from _conv("encoder.conv_out", channels, 2 * z)
    yield from _conv("quant_conv", 2 * z, 2 * z, 1)
    yield from _conv("post_quant_conv", z, z, 1)
    yield from _conv("decoder.conv_in", z, channels)
    yield from _vae_mid("decoder.mid", channels)
    for level in reversed(range(len(widths))):
        for block in range(sizes.res_blocks + 1):
            yield from _vae_block(f"decoder.up.{level}.block.{block}", channels, widths[level])
            channels = widths[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    yield from _norm("decoder.norm_out", channels)
    yield from _conv("decoder.conv_out", channels, 3)


def vision_shapes(sizes: VisionSizes) -> Shapes:
    """Hugging Face layout of a CLIP vision transformer."""
    width, root = sizes.width, "vision_model"
    yield f"{root}.embeddings.class_embedding", (width,)
    yield f"{root}.embeddings.patch_embedding.weight", (width, 3, sizes.patch, sizes.patch)
    positions = (sizes.image // sizes.patch) ** 2 + 1
    yield f"{root}.embeddings.position_embedding.weight", (positions, width)
    yield from _norm(f"{root}.pre_layrnorm", width)
    for index in range(sizes.layers):
        layer = f"{root}.encoder.layers.{index}"
        yield from _norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", width, sizes.mlp)
        yield from _linear(f"{layer}.mlp.fc2", sizes.mlp, width)
    yield from _norm(f"{root}.post_layernorm", width)
    yield from _linear("visual_projection", width, sizes.projection, bias=False)


def random_state(
    shapes: Shapes, prefix: str = "", seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Non-zero random tensors under which activations stay near 1: norms 1, weights by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes:
        if len(shape) == 1:
            noise = 0.05 * torch.randn(shape, generator=generator)
            state[prefix + key] = (noise + 1 if key.endswith("weight") else noise).to(dtype)
        else:
            scale = 1 / math.sqrt(math.prod(shape[1:]))
            state[prefix + key] = torch.randn(shape, generator=generator).mul_(scale).to(dtype)
    return state


def restorer_tensors(
    unet: UNetSizes = UNetSizes(),
    vae: VaeSizes = VaeSizes(),
    clip_width: int = 64,
    types: tuple[str, ...] = TYPES,
    fusion_levels: tuple[int, ...] = (0, 1, 2),
    tuned_decoder: bool = False,
    detail: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What a Diff-Restorer file holds for models of the given sizes."""
    hidden = clip_width
    config = PromptProcessorConfig(clip_width, hidden, unet.context, len(types))
    processor = PromptProcessor(config, device=torch.device("meta"))
    tensors = random_state(_shapes(processor), "prompt_processor.", 1, dtype)
    tensors |= random_state(control_shapes(unet), "control.", 2, dtype)
    if detail:
        first, second, third = (vae.channels * each for each in vae.mult[1:])
        path = DetailPath(
            DetailConfig((16, 24, 32), (1, 2, 1, 1, 1), (first, second, third), unet.context),
            device=torch.device("meta"),
        )
        tensors |= random_state(_shapes(path), "decoder.detail.", 3, dtype)
        if "haze" in types:  # random P_D is not hazy, so that pictures are not stretched
            tensors["decoder.detail.kind.bias"][types.index("haze")] = -50
    elif fusion_levels:
        channels = tuple((level, vae.channels * vae.mult[level]) for level in fusion_levels)
        blocks = FusionBlocks(
            FusionConfig(channels, 8, 2, unet.context, pixels=(vae.channels * vae.mult[0], 8)),
            device=torch.device("meta"),
        )
        tensors |= random_state(_shapes(blocks), "decoder.fusion.", 3, dtype)
    if tuned_decoder:
        half = (
            (k, s) for k, s in vae_shapes(vae) if k.startswith(("decoder.", "post_quant_conv."))
        )
        tensors |= random_state(half, "decoder.vae.", 4, dtype)
    return tensors


def _shapes(module: torch.nn.Module) -> Shapes:
    yield from ((key, tuple(tensor.shape)) for key, tensor in module.state_dict().items())


def base_tensors(
    unet: UNetSizes = UNetSizes(),
    vae: VaeSizes = VaeSizes(),
    vision: VisionSizes = VisionSizes(),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """UNet, VAE and vision model of a self-contained file."""
    return (
        random_state(unet_shapes(unet), "base.unet.", 5, dtype)
        | random_state(vae_shapes(vae), "base.vae.", 6, dtype)
        | random_state(vision_shapes(vision), "base.clip_vision.", 7, dtype)
    )


def info(
    base_model: str = "nano", types: tuple[str, ...] = TYPES, **changes: Any
) -> CheckpointInfo:
    """Metadata of the toy files."""
    clip = {"name": "toy", "image_size": 64, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    if base_model == "sd15":
        clip = {"name": "openai/clip-vit-large-patch14", "image_size": 224}
    entries: dict[str, Any] = {
        "base_model": base_model,
        "types": types,
        "clip": clip,
        "latent_scale": 0.18215,
    }
    return CheckpointInfo(**(entries | changes))


def write(path: Path, tensors: dict[str, Tensor], **entries: Any) -> Path:
    """A toy file of these tensors, with these metadata."""
    write_checkpoint(path, tensors, info(**entries))
    return path


def write_nano(path: Path, **sizes: Any) -> Path:
    """A self-contained toy file in fp16, as Nano is."""
    tensors = restorer_tensors(dtype=torch.float16, **sizes) | base_tensors(dtype=torch.float16)
    return write(path, tensors, types=sizes.get("types", TYPES))


def write_restorer(path: Path, **sizes: Any) -> Path:
    """A toy file without UNet, VAE and vision model."""
    return write(path, restorer_tensors(**sizes), types=sizes.get("types", TYPES))


def write_sd15(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Path]:
    """Full-size files with random weights (3.3 GB in bf16), in the folders of a ComfyUI.

    The checkpoint has no text encoder, which the restoration graph does not use.
    """
    files = {
        "checkpoints": folder / "models/checkpoints/sd15_random.safetensors",
        "clip_vision": folder / "models/clip_vision/vit_l_random.safetensors",
        "diff_restorer": folder / "models/diff_restorer/restorer_random.safetensors",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = random_state(unet_shapes(SD15_UNET), "model.diffusion_model.", 11, dtype)
    checkpoint |= random_state(vae_shapes(SD15_VAE), "first_stage_model.", 12, dtype)
    save_file(checkpoint, files["checkpoints"])
    save_file(random_state(vision_shapes(VIT_L), "", 13, dtype), files["clip_vision"])
    tensors = restorer_tensors(SD15_UNET, SD15_VAE, VIT_L.width, fusion_levels=(1, 2), dtype=dtype)
    write_checkpoint(files["diff_restorer"], tensors, info("sd15"))
    return files


def write_truncated(path: Path, source: Path, share: float = 0.5) -> Path:
    """The beginning of another file, as an interrupted download leaves it."""
    content = source.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def write_pickle(path: Path) -> Path:
    """A PyTorch pickle, whatever the name says."""
    torch.save({"control.zero_convs.0.0.weight": torch.zeros(1)}, path)
    return path


def write_wrong_kind(path: Path) -> Path:
    """A VAE file."""
    save_file(random_state(vae_shapes(VaeSizes())), path)
    return path


def write_without(path: Path, key: str, **sizes: Any) -> Path:
    """A toy file that lacks one tensor."""
    tensors = restorer_tensors(**sizes)
    del tensors[key]
    return write(path, tensors)


def write_newer(path: Path) -> Path:
    """A toy file of a format to come."""
    return write(path, restorer_tensors(), format_version=99)
