"""The networks that training wraps, at any size, and their way into and out of our one file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diff_restorer import (
    FusionBlocks,
    FusionConfig,
    PromptOutput,
    PromptProcessor,
    PromptProcessorConfig,
    VaeTrunk,
    make_hint_conv,
)
from diff_restorer.checkpoint import (
    V_PREDICTION,
    CheckpointInfo,
    read_checkpoint,
    write_checkpoint,
)
from diff_restorer.ldm_keys import from_ldm, to_ldm, unet_keys, vae_keys
from diff_restorer.views import NATIVE, WHOLE

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEADS = 8
"""Attention heads of the UNet and control module at every level, as in SD 1.5."""


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of all parts; the defaults are Nano's."""

    vae_channels: tuple[int, ...] = (64, 64, 128, 128)
    vae_layers: int = 1
    latent_channels: int = 4
    unet_channels: tuple[int, ...] = (64, 128, 128)
    unet_layers: int = 1
    unet_attention: tuple[bool, ...] = (False, True, True)
    context_width: int = 192
    vision_width: int = 192
    vision_layers: int = 6
    vision_image: int = 256
    vision_patch: int = 16
    vision_head_width: int = 64
    prompt_hidden: int = 384
    fusion_levels: tuple[int, ...] = (1, 2, 3)
    fusion_growth: int = 16
    fusion_depth: int = 3
    fusion_pixel_width: int = 32


# diffusers annotates its models loosely (tuples of one, outputs that may be tuples), so that the
# three builders and what they build are `Any` to the type checker.
def build_vae(sizes: Sizes) -> Any:
    """AutoencoderKL with 8x8 compression and random weights."""
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


def clip_tokens(vision: nn.Module, view: Tensor) -> Tensor:
    """P_CLIP, (B, T, width): last hidden state without class token of `view` in [0, 1]."""
    mean = view.new_tensor(CLIP_MEAN)[:, None, None]
    std = view.new_tensor(CLIP_STD)[:, None, None]
    return vision(pixel_values=(view - mean) / std).last_hidden_state[:, 1:]


class AwareDecoder(nn.Module):
    """The parts that stage 2 trains: fusion blocks and a copy of the VAE's decoder."""

    def __init__(self, vae: Any, fusion: FusionBlocks) -> None:
        super().__init__()
        self.fusion = fusion
        self.decoder: Any = copy.deepcopy(vae.decoder)
        self.post_quant_conv: Any = copy.deepcopy(vae.post_quant_conv)

    def trunk(self, vae: Any) -> VaeTrunk:
        """`vae` with this decoder in place of its own."""
        view = nn.Module()
        view.encoder, view.quant_conv = vae.encoder, vae.quant_conv
        view.decoder, view.post_quant_conv = self.decoder, self.post_quant_conv
        return VaeTrunk.of(view)


class Models(nn.Module):
    """All parts of one Diff-Restorer, self-contained (Nano) or without its base."""

    def __init__(
        self,
        sizes: Sizes,
        types: Sequence[str],
        prediction: str = V_PREDICTION,
        degradation_view: str = NATIVE,
    ) -> None:
        """Build all parts with random weights.

        Args:
            sizes: Widths and depths.
            types: Names of the degradation types.
            prediction: What the UNet predicts, see `training.diffusion.scheduler`.
            degradation_view: What P_D is read from, see `diff_restorer.views`.
        """
        super().__init__()
        self.sizes, self.types = sizes, tuple(types)
        self.latent_scale = 1.0
        self.prediction = prediction
        self.degradation_view = degradation_view
        self.vae = build_vae(sizes)
        self.vision = build_vision(sizes)
        self.unet = build_unet(sizes)
        self.control = build_control(self.unet)
        self.prompt = PromptProcessor(
            PromptProcessorConfig(
                sizes.vision_width, sizes.prompt_hidden, sizes.context_width, len(self.types)
            )
        )
        self.decoder = AwareDecoder(self.vae, FusionBlocks(self._fusion_config()))
        cast(Any, self).to(memory_format=memory_format())

    def _fusion_config(self) -> FusionConfig:
        sizes = self.sizes
        return FusionConfig(
            channels=tuple((level, sizes.vae_channels[level]) for level in sizes.fusion_levels),
            growth=sizes.fusion_growth,
            depth=sizes.fusion_depth,
            context_width=sizes.context_width,
            pixels=(sizes.vae_channels[0], sizes.fusion_pixel_width)
            if sizes.fusion_pixel_width
            else None,
        )

    def start_decoder(self) -> None:
        """Copy the trained VAE decoder into the aware decoder (start of stage 2).

        The pixel gate starts open: from the photo itself, much damage is a short way to mend.
        """
        self.decoder.decoder.load_state_dict(self.vae.decoder.state_dict())
        self.decoder.post_quant_conv.load_state_dict(self.vae.post_quant_conv.state_dict())
        if self.sizes.fusion_pixel_width:
            gate: Any = self.decoder.fusion["pixels"]
            nn.init.ones_(gate.out.bias[:3])

    def start_control(self) -> None:
        """Copy the UNet's encoder into the control module (start of stage 1)."""
        self.control = build_control(self.unet).to(memory_format=memory_format())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latent mean (B, 4, H/8, W/8) of pixels (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels).latent_dist.mode() * self.latent_scale

    def read(self, batch: Mapping[str, Tensor]) -> PromptOutput:
        """P_S of the whole photo; P_D and logits of the view that this model reads them from.

        Args:
            batch: `clip_view` and, for a native `degradation_view`, `native_view`, in [0, 1].
        """
        return self.prompt_of(*self.tokens(batch))

    def tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """P_CLIP (B, T, width) for P_S and for P_D; the same tensor where the views are."""
        whole = clip_tokens(self.vision, batch["clip_view"])
        if self.degradation_view == WHOLE:
            return whole, whole
        return whole, clip_tokens(self.vision, batch["native_view"])

    def prompt_of(self, whole: Tensor, close: Tensor) -> PromptOutput:
        """The Prompt Processor on the two results of `tokens`."""
        read = self.prompt(close)
        return read if whole is close else read._replace(semantic=self.prompt.semantic(whole))

    def denoise(
        self, noisy: Tensor, timestep: Tensor, hint: Tensor, p_s: Tensor, p_d: Tensor
    ) -> Tensor:
        """The UNet's prediction with P_S, steered by the control module with hint and P_D."""
        down, middle = self.control(
            noisy, timestep, encoder_hidden_states=p_d, controlnet_cond=hint, return_dict=False
        )
        return self.unet(
            noisy,
            timestep,
            encoder_hidden_states=p_s,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    def parts(self) -> dict[str, nn.Module]:
        """File prefix -> module whose keys need no renaming."""
        return {
            "prompt_processor.": self.prompt,
            "base.clip_vision.": self.vision,
            "decoder.fusion.": self.decoder.fusion,
        }

    def _renamed_parts(self) -> list[tuple[str, nn.Module, dict[str, str]]]:
        """(file prefix, module, diffusers key -> LDM key) of the parts that diffusers names."""
        decoder_only = nn.Module()
        decoder_only.decoder = self.decoder.decoder
        decoder_only.post_quant_conv = self.decoder.post_quant_conv
        return [
            ("base.unet.", self.unet, unet_keys(self.unet.state_dict())),
            ("control.", self.control, unet_keys(self.control.state_dict())),
            ("base.vae.", self.vae, vae_keys(self.vae.state_dict())),
            ("decoder.vae.", decoder_only, vae_keys(decoder_only.state_dict())),
        ]

    def file_tensors(self, prefixes: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of the parts whose file prefix is in `prefixes`, under the file's keys."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.parts().items():
            if prefix in prefixes:
                tensors |= {prefix + key: value for key, value in module.state_dict().items()}
        for prefix, module, keys in self._renamed_parts():
            if prefix in prefixes:
                renamed = to_ldm(module.state_dict(), keys)
                tensors |= {prefix + key: value for key, value in renamed.items()}
        return {
            key: value.to("cpu", dtype).contiguous() if value.is_floating_point() else value
            for key, value in tensors.items()
            if not key.endswith("position_ids")
        }

    def save(
        self, path: Path, prefixes: Sequence[str], info: CheckpointInfo, dtype: torch.dtype
    ) -> None:
        """Write the parts in `prefixes` as one Diff-Restorer file."""
        write_checkpoint(path, self.file_tensors(prefixes, dtype), info)

    def load(self, path: Path) -> set[str]:
        """Read every part that `path` holds; returns the prefixes read."""
        checkpoint = read_checkpoint(path, required=())
        found: set[str] = set()
        for prefix, module in self.parts().items():
            if state := checkpoint.state(prefix):
                _load_strictly(module, _as_float(state), prefix, path)
                found.add(prefix)
        for prefix, module, keys in self._renamed_parts():
            if state := checkpoint.state(prefix):
                _load_strictly(module, from_ldm(_as_float(state), keys), prefix, path)
                found.add(prefix)
        if "base.vae." in found:
            self.latent_scale = checkpoint.info.latent_scale
        if "base.unet." in found:
            self.prediction = checkpoint.info.prediction
        return found


def _as_float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}


def _load_strictly(module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path) -> None:
    own = module.state_dict()
    state = {key: value for key, value in state.items() if key in own or "position_ids" not in key}
    missing = [key for key in own if key not in state and not key.endswith("position_ids")]
    unexpected = [key for key in state if key not in own]
    misfits = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if missing or unexpected or misfits:
        raise ValueError(
            f"{path}: part {prefix!r} does not fit the configured sizes (--model.sizes); "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}, of other size {misfits[:3]}"
        )
    module.load_state_dict(state, strict=False)


def to_pixels(image: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return (image * 2 - 1).contiguous(memory_format=memory_format())


def memory_format() -> torch.memory_format:
    """Channels last on GPUs; on CPUs it makes group norm's backward pass twice as slow."""
    return torch.channels_last if torch.cuda.is_available() else torch.contiguous_format


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per sample, RGB, of images in [0, 1]; clamps `image`."""
    error = F.mse_loss(image.clamp(0, 1), reference, reduction="none").flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(1e-10))
