"""All parts of one Diff-Restorer, and their way into and out of our one file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diff_restorer import (
    DetailPath,
    FusionBlocks,
    PromptOutput,
    PromptProcessor,
    PromptProcessorConfig,
    VaeTrunk,
    encode_with_features,
)
from diff_restorer.abstention import Abstention
from diff_restorer.checkpoint import (
    DETAIL_PREFIX,
    ONE_KIND,
    V_PREDICTION,
    Checkpoint,
    CheckpointInfo,
    write_checkpoint,
)
from diff_restorer.decoder import decoder_levels
from diff_restorer.detail import SLOW
from diff_restorer.similarity import psnr
from diff_restorer.views import NATIVE, WHOLE
from diff_restorer.weights import check_fit

from .ldm_keys import from_ldm, tiny_vae_keys, to_ldm, unet_keys, vae_keys
from .networks import (
    Sizes,
    build_control,
    build_extension,
    build_time_mlp,
    build_unet,
    build_vae,
    build_vision,
    memory_format,
)
from .pretrained import Base

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TONE_SHARES = {"low_light": 1.1, "haze": 1.1, "rain": 1.1, "snow": 1.1}
"""Kinds that change a photo's tone, which the sampled latent mends."""
NOISE_SHARES, JPEG_SHARES = {"noise": 2.8}, {"jpeg": 0.15}
"""Where thresholds start: in standard deviations of the noise, and in units of [-1, 1]."""
NANO, SD15 = "nano", "sd15"
SD15_LATENT_SCALE = 0.18215
ABLATIONS = (
    *("without_semantic", "control_time", "control_none"),
    *("decoder_without_degradation", "without_diffusion"),
)
"""What a training can leave out of the method, or move, to see what it is worth. A file of such a
training says so, training's own programs then do the same, and `training.export` refuses it."""


def own_precision(module: nn.Module) -> AbstractContextManager[Any]:
    """Where a network's weights are bf16 or fp16, no autocast: it would run the norms in fp32."""
    parameter = next(module.parameters())
    if parameter.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(parameter.device.type, enabled=False)


def suited(module: nn.Module, value: Tensor) -> Tensor:
    """`value` in the precision of a network that is stored in bf16 or fp16; else as it is."""
    dtype = next(module.parameters()).dtype
    return value if dtype == torch.float32 else value.to(dtype)


def clip_tokens(vision: nn.Module, view: Tensor) -> Tensor:
    """P_CLIP, (B, T, width): last hidden state without class token of `view` in [0, 1]."""
    mean = view.new_tensor(CLIP_MEAN)[:, None, None]
    std = view.new_tensor(CLIP_STD)[:, None, None]
    with own_precision(vision):
        pixels = suited(vision, (view - mean) / std)
        return vision(pixel_values=pixels).last_hidden_state[:, 1:].float()


class AwareDecoder(nn.Module):
    """The parts that stage 2 trains: a detail path; or fusion blocks and a copy of the VAE's
    decoder, through which they work."""

    def __init__(self, vae: Any, extension: DetailPath | FusionBlocks) -> None:
        super().__init__()
        self.extension = extension
        self.decoder: Any = None
        self.post_quant_conv: Any = None
        if isinstance(extension, FusionBlocks):
            self.decoder = copy.deepcopy(vae.decoder)
            # A TAESD has none.
            head: nn.Module = getattr(vae, "post_quant_conv", None) or nn.Identity()
            self.post_quant_conv = copy.deepcopy(head)

    def trunk(self, vae: Any) -> VaeTrunk:
        """`vae` with this decoder in place of its own, where there is one."""
        if self.decoder is None:
            return VaeTrunk.of(vae)
        view: Any = nn.Module()
        view.encoder, view.quant_conv = vae.encoder, getattr(vae, "quant_conv", None)
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
        base: Base | None = None,
    ) -> None:
        """Build all parts with random weights, but for those of `base`, SD 1.5's UNet and VAE and
        its vision tower; without it they are ours (Nano).

        Args:
            sizes: Widths and depths; those of `base` where there is one.
            prediction: What the UNet predicts, see `training.diffusion.scheduler`.
            degradation_view: What P_D is read from, see `diff_restorer.views`.
        """
        super().__init__()
        self.sizes, self.types = sizes, tuple(types)
        self.base_model = SD15 if base else NANO
        self.latent_scale = SD15_LATENT_SCALE if base else 1.0
        self.prediction = prediction
        self.degradation_view = degradation_view
        self.classification = ONE_KIND
        self.abstention: Abstention | None = None  # of the classifier that was loaded
        self.ablations: frozenset[str] = frozenset()
        self.history: dict[str, Any] = {}  # settings by program, of the files that were loaded
        self.vae = base.vae if base else build_vae(sizes)
        self.vision: Any = base.vision if base else build_vision(sizes)
        self.unet = base.unet if base else build_unet(sizes)
        self.control = build_control(self.unet)
        self.prompt = PromptProcessor(
            PromptProcessorConfig(
                sizes.vision_width, sizes.prompt_hidden, sizes.context_width, len(self.types)
            )
        )
        self.decoder = AwareDecoder(self.vae, build_extension(sizes, self.vae, len(self.types)))
        self.lay_out()

    def lay_out(self) -> None:
        """Lay out weights as their network is fastest; one without norm: channels last."""
        cast(Any, self).to(memory_format=memory_format())
        if self._vae_is_tiny:
            for module in (self.vae, self.decoder):
                cast(Any, module).to(memory_format=torch.channels_last)

    def start_decoder(self) -> None:
        """Copy the trained VAE decoder into the aware decoder (start of stage 2).

        A detail path starts from the photo in the sampled latent's tone, with the classifier's word
        on whose head counts; the pixel gate of fusion blocks starts from the photo itself.
        """
        if isinstance(self.decoder.extension, DetailPath):
            self._start_detail(self.decoder.extension)
            return
        self.decoder.decoder.load_state_dict(self.vae.decoder.state_dict())
        if not self._vae_is_tiny:
            self.decoder.post_quant_conv.load_state_dict(self.vae.post_quant_conv.state_dict())
        if self.sizes.fusion_pixel_width:
            gate: Any = cast(Any, self.decoder.extension)["pixels"]
            nn.init.ones_(gate.out.bias[:3])

    @torch.no_grad()
    def _start_detail(self, path: DetailPath) -> None:
        path.kind.load_state_dict(self.prompt.classifier.state_dict())
        # Half of each, as shares of kinds are up to 2; where P_D only wonders, the tone stays.
        layers: list[Any] = [path.toned, *path.thresholds]
        for layer, shares in zip(layers, (TONE_SHARES, NOISE_SHARES, JPEG_SHARES), strict=True):
            values = [shares.get(kind, 0.0) / 2 for kind in self.types]
            layer.weight.copy_(torch.tensor(values) / SLOW)
        path.toned.bias.fill_(-0.1 / SLOW)
        # The decoder's colours at 1/8 size by least squares, on pictures without a photo.
        pictures = _color_fields().to(path.toned.weight)
        latent = self.encode(pictures)
        features = self._features_at(latent, path.levels[-1])
        wanted = F.avg_pool2d(self.decode(latent), 8)
        rows = F.pad(features.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0).double()
        fitted = torch.linalg.lstsq(rows.cpu(), wanted.movedim(1, -1).flatten(0, 2).double().cpu())
        weight = fitted.solution.T.to(path.color.weight) / SLOW
        path.color.weight.copy_(weight[:, :-1, None, None])
        path.color.bias.copy_(weight[:, -1])

    def _features_at(self, latent: Tensor, level: int) -> Tensor:
        """The VAE decoder's features of a scaled latent there."""
        trunk = VaeTrunk.of(self.vae)
        with own_precision(self.vae):
            raw = suited(self.vae, latent / self.latent_scale)
            features = next(h for number, h in decoder_levels(trunk, raw) if number == level)
        return features.float()

    def start_control(self) -> None:
        """Copy the UNet's encoder into the control module (start of stage 1)."""
        self.control = build_control(self.unet).to(memory_format=memory_format())

    def leave_out(self, *ablations: str) -> None:
        """Run without these parts of the method; raises ValueError for one that is not in
        `ABLATIONS`."""
        if unknown := set(ablations) - set(ABLATIONS):
            raise ValueError(f"ablations: unknown {sorted(unknown)}; known are {ABLATIONS}")
        self.ablations |= set(ablations)
        if "control_time" in ablations and self.control.class_embedding is None:
            self.control.class_embedding = build_time_mlp(self.unet)

    def train_classifier(self, classification: str) -> None:
        """The classifier trains, as `CheckpointInfo.classification` says: thresholds that were
        fitted to it before hold no more, and `training.calibrate` has to fit them again."""
        self.classification, self.abstention = classification, None

    def freeze(self, dtype: torch.dtype) -> None:
        """No part trains; SD 1.5's own networks, which no file of ours holds, are kept in `dtype`.

        Nano's stay as they are, because each stage writes them again.
        """
        self.requires_grad_(False)
        if self.base_model == SD15:
            for module in (self.unet, self.vae, self.vision):
                nn.Module.to(module, dtype)  # diffusers' own `to` warns of every cast

    def checkpoint_gradients(self) -> None:
        """Compute activations of UNet and control module again in the backward pass: less memory.

        The frozen UNet, too: gradients cross its decoder on their way to the control module, and
        its encoder on their way to P_S.
        """
        self.unet.enable_gradient_checkpointing()
        self.control.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latent mean (B, 4, H/8, W/8) of pixels (B, 3, H, W) in [-1, 1]."""
        trunk = VaeTrunk.of(self.vae)
        with own_precision(self.vae):
            moments, _ = encode_with_features(trunk, suited(self.vae, pixels), ())
        return moments[:, : trunk.latent_channels].float() * self.latent_scale

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) around [-1, 1] of a scaled latent, by the VAE's stock decoder."""
        with own_precision(self.vae):
            return self.vae.decode(suited(self.vae, latent / self.latent_scale)).sample.float()

    def without_haze(self, restored: Tensor, pooled: Tensor) -> Tensor:
        """`DetailPath.without_haze` of photos (B, 3, H, W) around [0, 1], where there is one."""
        extension = self.decoder.extension
        if not isinstance(extension, DetailPath):
            return restored
        return extension.without_haze(restored, pooled, self.types)

    def read(self, batch: Mapping[str, Tensor]) -> PromptOutput:
        """P_S of the whole photo (`clip_view`); P_D and logits of the view that this model reads
        them from (maybe `native_view`): a row per view, of training batches one per part."""
        return self.prompt_of(*self.tokens(batch))

    def read_pooled(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`read(batch).pooled` for half its cost."""
        tokens = self.degradation_tokens(batch)
        return self.prompt_of(tokens, tokens).pooled

    def tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """P_CLIP (B, T, width) for P_S and for P_D; the same tensor where the views are."""
        close = self.degradation_tokens(batch)
        if self.degradation_view == WHOLE:
            return close, close
        return clip_tokens(self.vision, batch["clip_view"]), close

    @property
    def degradation_key(self) -> str:
        """What P_D is read from in a batch."""
        return "clip_view" if self.degradation_view == WHOLE else "native_view"

    def degradation_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """P_CLIP (B, T, width) for P_D."""
        return clip_tokens(self.vision, batch[self.degradation_key])

    def prompt_of(self, whole: Tensor, close: Tensor) -> PromptOutput:
        """The Prompt Processor on the two results of `tokens`."""
        read = self.prompt(close)
        if whole is not close:
            read = read._replace(semantic=self.prompt.semantic(whole))
        if "without_semantic" in self.ablations:
            read = read._replace(semantic=torch.zeros_like(read.semantic))
        if "decoder_without_degradation" in self.ablations:
            read = read._replace(pooled=torch.zeros_like(read.pooled))
        return read

    def denoise(
        self, noisy: Tensor, timestep: Tensor, hint: Tensor, p_s: Tensor, p_d: Tensor
    ) -> Tensor:
        """The UNet's prediction with P_S, steered by the control module with hint and P_D."""
        context, degradation = p_d, None
        if self.ablations & {"control_time", "control_none"}:  # as a ControlNet beside a prompt
            context = p_s
        if "control_time" in self.ablations:
            degradation = p_d.mean(dim=1)
        down, middle = self.control(
            noisy,
            timestep,
            encoder_hidden_states=context,
            controlnet_cond=hint,
            class_labels=degradation,
            return_dict=False,
        )
        with own_precision(self.unet):
            return self.unet(
                suited(self.unet, noisy),
                timestep,
                encoder_hidden_states=suited(self.unet, p_s),
                down_block_additional_residuals=[suited(self.unet, h) for h in down],
                mid_block_additional_residual=suited(self.unet, middle),
            ).sample

    @property
    def decoder_parts(self) -> tuple[str, ...]:
        """File prefixes of the aware decoder."""
        if isinstance(self.decoder.extension, DetailPath):
            return (DETAIL_PREFIX,)
        return "decoder.fusion.", "decoder.vae."

    @property
    def _vae_is_tiny(self) -> bool:
        return not hasattr(self.vae, "quant_conv")

    def _parts(self) -> list[tuple[str, nn.Module, dict[str, str] | None]]:
        """(file prefix, module, diffusers key -> LDM key where the file has the latter)."""
        keys_of_vae = tiny_vae_keys if self._vae_is_tiny else vae_keys
        parts: list[tuple[str, nn.Module, dict[str, str] | None]] = [
            ("prompt_processor.", self.prompt, None),
            ("base.clip_vision.", self.vision, None),
            (self.decoder_parts[0], self.decoder.extension, None),
            ("base.unet.", self.unet, unet_keys(self.unet.state_dict())),
            ("control.", self.control, unet_keys(self.control.state_dict())),
            ("base.vae.", self.vae, keys_of_vae(self.vae.state_dict())),
        ]
        if self.decoder.decoder is not None:
            decoder_only = nn.Module()
            decoder_only.decoder = self.decoder.decoder
            decoder_only.post_quant_conv = self.decoder.post_quant_conv
            parts.append(("decoder.vae.", decoder_only, keys_of_vae(decoder_only.state_dict())))
        return parts

    def file_tensors(self, prefixes: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of the parts whose file prefix is in `prefixes`, under the file's keys."""
        if self.base_model == SD15:  # its UNet, VAE and CLIP have files of their own
            prefixes = [prefix for prefix in prefixes if not prefix.startswith("base.")]
        tensors: dict[str, Tensor] = {}
        for prefix, module, keys in self._parts():
            if prefix in prefixes:
                state = module.state_dict()
                named = to_ldm(state, keys) if keys else state
                tensors |= {prefix + key: value for key, value in named.items()}
        if "base.vae." in prefixes and self._vae_is_tiny:
            # The host's TAESD also holds a scale and a shift of its latent.
            tensors |= {"base.vae.vae_scale": torch.ones(()), "base.vae.vae_shift": torch.zeros(())}
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

    def load(self, checkpoint: Checkpoint, decoder: bool = True) -> set[str]:
        """Read every part that a file holds, but for its decoder if so told; returns the prefixes
        read."""
        check_base(checkpoint, self.base_model)
        self.leave_out(*checkpoint.info.config.get("ablations", ()))
        if "loop" not in checkpoint.info.config:  # once the last program's alone, without its name
            self.history |= checkpoint.info.config
        loaded: set[str] = set()
        unwanted = () if decoder else self.decoder_parts
        for prefix, module, keys in self._parts():
            if prefix not in unwanted and (state := checkpoint.state(prefix, torch.float32)):
                own = from_ldm(state, keys) if keys else state
                _load_strictly(module, own, prefix, checkpoint.path)
                loaded.add(prefix)
        if "base.vae." in loaded:
            self.latent_scale = checkpoint.info.latent_scale
        if "base.unet." in loaded:
            self.prediction = checkpoint.info.prediction
        if "prompt_processor." in loaded:
            self.degradation_view = checkpoint.info.clip.get("degradation_view", WHOLE)
            self.classification = checkpoint.info.classification
            self.abstention = checkpoint.info.abstention
        return loaded


def _color_fields() -> Tensor:
    """Pictures of smooth and rough colours, (32, 3, 64, 64) in [-1, 1], always the same."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.zeros(32, 3, 64, 64)
    for cells in (1, 2, 4, 8, 32):
        field = torch.rand(32, 3, cells, cells, generator=generator)
        weight = torch.rand(32, 1, 1, 1, generator=generator)
        fields += weight * F.interpolate(field, size=(64, 64), mode="bilinear")
    low, high = (end[:, None, None, None] for end in fields.flatten(1).aminmax(dim=1))
    ends = torch.rand(2, 32, 1, 1, 1, generator=generator)
    return torch.lerp(ends[0] - 1, 1 - ends[1], (fields - low) / (high - low))


def check_base(checkpoint: Checkpoint, base_model: str) -> None:
    """Raise a ValueError where a file belongs to another base than `base_model`."""
    own = checkpoint.info.base_model
    if own != base_model:
        remedy = "needs" if own == SD15 else "goes without"
        raise ValueError(
            f"{checkpoint.path}: belongs to a {own!r} base, not to a {base_model!r} one; it "
            f"{remedy} --model.sd15.checkpoint and --model.sd15.clip"
        )


def _load_strictly(module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path) -> None:
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    remedy = "Give --model the sizes that the file was trained with."
    check_fit(module, state, path, f"part {prefix!r}", remedy)
    module.load_state_dict(state)


def to_pixels(image: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return (image * 2 - 1).contiguous(memory_format=memory_format())


def psnr_gain(image: Tensor, degraded: Tensor, reference: Tensor) -> Tensor:
    """Mean gain in PSNR of `image` over `degraded`, in dB, each in [-20, 30], of the samples that
    are degraded at all; NaN where none is."""
    before = psnr(degraded, reference)
    gain = (psnr(image, reference) - before).clamp(-20, 30)
    return gain.where(before < psnr(reference, reference), torch.nan).nanmean()
