"""A Stable Diffusion autoencoder as a list of steps, whichever library built it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor], Tensor]


class UnsupportedVaeError(ValueError):
    """The VAE is neither an AutoencoderKL of the Stable Diffusion kind nor a TAESD."""


@dataclass(frozen=True)
class Level:
    """One resolution of the encoder or decoder: residual blocks, then a change of size."""

    blocks: tuple[Step, ...]
    resample: Step | None
    """Downsampling (encoder) or upsampling (decoder); None at the end of the pyramid."""


@dataclass(frozen=True, eq=False)  # torch.compile hashes it before its fields are there
class Attention:
    """Self-attention of all pixels to all, with one head, and its residual.

    Called, it is the library's own; its parts, each of which works on pixels alone, serve to do
    the same in pieces: x + out(attend(query(n), key(n), value(n))) with n = norm(x).
    """

    whole: Step
    norm: Step
    query: Step
    key: Step
    value: Step
    out: Step

    def __call__(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.whole(h)


@dataclass(frozen=True)
class VaeTrunk:
    """Layer-by-layer view of an AutoencoderKL or TAESD; calls modules, owns and copies nothing.

    Levels are indexed by their number of halvings: 0 is full size, 1 is 1/2, 2 is 1/4, 3 is 1/8.
    Walking all steps gives the very result of the library's own encode and decode.
    """

    encoder_stem: Step
    encoder_levels: tuple[Level, ...]
    encoder_mid: tuple[Step | Attention, ...]
    """Blocks and attention after the levels; TAESD has none."""
    encoder_head: Step
    """To the moments (B, 2*latent_channels, H/8, W/8), quant_conv included; TAESD: the latent."""
    decoder_stem: Step
    """From the unscaled latent, post_quant_conv included."""
    decoder_mid: tuple[Step | Attention, ...]
    """Blocks and attention before the levels; TAESD has none."""
    decoder_levels: tuple[Level, ...]
    decoder_head: Step
    latent_channels: int
    channels: tuple[int, ...]
    """Channels of encoder and decoder at each level."""

    @classmethod
    def of(cls, vae: Any) -> VaeTrunk:
        """View `vae` as steps.

        Args:
            vae: AutoencoderKL in LDM layout (the host's `first_stage_model`) or diffusers' one;
                TAESD of the host or AutoencoderTiny of diffusers.

        Raises:
            UnsupportedVaeError: `vae` is of another kind, such as a video VAE.
        """
        # Two libraries' modules are read here by attribute, and neither is imported.
        decoder = getattr(vae, "decoder", None)
        if hasattr(decoder, "up") and hasattr(getattr(vae, "encoder", None), "down"):
            return _ldm_trunk(vae)
        if hasattr(decoder, "up_blocks") and hasattr(vae, "quant_conv"):
            return _diffusers_trunk(vae)
        if hasattr(vae, "taesd_decoder"):
            scale, shift = vae.vae_scale, vae.vae_shift
            return _tiny_trunk(vae.taesd_encoder, vae.taesd_decoder, scale, shift)
        if hasattr(decoder, "layers"):
            return _tiny_trunk(vae.encoder.layers, vae.decoder.layers, 1, 0)
        raise UnsupportedVaeError(
            f"vae: found a {type(vae).__name__}, expected an AutoencoderKL with encoder and "
            "decoder levels (SD 1.5) or Nano's. Video VAEs have no such levels: connect the VAE "
            "of your SD 1.5 checkpoint."
        )


def _chain(*steps: Step | None) -> Step:
    present = tuple(step for step in steps if step is not None)

    def run(h: Tensor) -> Tensor:
        for step in present:
            h = step(h)
        return h

    return run


def _block(module: Any) -> Step:
    """Residual blocks of both libraries take a time embedding, which a VAE does not have."""
    return lambda h: module(h, None)


def _ldm_trunk(vae: Any) -> VaeTrunk:
    encoder, decoder = vae.encoder, vae.decoder

    def attention(module: Any) -> Attention:
        return Attention(module, module.norm, module.q, module.k, module.v, module.proj_out)

    def mid(module: Any) -> tuple[Step, ...]:
        return _block(module.block_1), attention(module.attn_1), _block(module.block_2)

    def head(module: Any) -> Step:
        return _chain(module.norm_out, F.silu, module.conv_out)

    return VaeTrunk(
        encoder_stem=encoder.conv_in,
        encoder_levels=tuple(
            Level(tuple(map(_block, level.block)), getattr(level, "downsample", None))
            for level in encoder.down
        ),
        encoder_mid=mid(encoder.mid),
        encoder_head=_chain(head(encoder), getattr(vae, "quant_conv", None)),
        decoder_stem=_chain(getattr(vae, "post_quant_conv", None), decoder.conv_in),
        decoder_mid=mid(decoder.mid),
        decoder_levels=tuple(
            Level(tuple(map(_block, level.block)), getattr(level, "upsample", None))
            for level in decoder.up
        ),
        decoder_head=head(decoder),
        latent_channels=decoder.conv_in.weight.shape[1],
        channels=tuple(level.block[-1].conv2.weight.shape[0] for level in encoder.down),
    )


def _diffusers_trunk(vae: Any) -> VaeTrunk:
    encoder, decoder = vae.encoder, vae.decoder

    def level(block: Any, resamplers: str) -> Level:
        samplers = getattr(block, resamplers)
        return Level(tuple(map(_block, block.resnets)), None if samplers is None else samplers[0])

    def on_pixels(linear: Any) -> Step:
        return lambda h: linear(h.movedim(1, -1)).movedim(-1, 1)

    def attention(module: Any) -> Attention:
        parts = map(on_pixels, (module.to_q, module.to_k, module.to_v, module.to_out[0]))
        return Attention(module, module.group_norm, *parts)

    def mid(module: Any) -> tuple[Step, ...]:
        first, second = map(_block, module.resnets)
        return first, attention(module.attentions[0]), second

    def head(module: Any) -> Step:
        return _chain(module.conv_norm_out, module.conv_act, module.conv_out)

    return VaeTrunk(
        encoder_stem=encoder.conv_in,
        encoder_levels=tuple(level(block, "downsamplers") for block in encoder.down_blocks),
        encoder_mid=mid(encoder.mid_block),
        encoder_head=_chain(head(encoder), vae.quant_conv),
        decoder_stem=_chain(vae.post_quant_conv, decoder.conv_in),
        decoder_mid=mid(decoder.mid_block),
        decoder_levels=tuple(level(block, "upsamplers") for block in reversed(decoder.up_blocks)),
        decoder_head=head(decoder),
        latent_channels=decoder.conv_in.weight.shape[1],
        channels=tuple(level.resnets[-1].conv2.weight.shape[0] for level in encoder.down_blocks),
    )


def _tiny_trunk(encoder: Any, decoder: Any, scale: Any, shift: Any) -> VaeTrunk:
    """TAESD (https://github.com/madebyollin/taesd): plain convs and blocks, in sequences.

    The host's latent, divided by `scale` and shifted, is that of a larger VAE.

    Encoder: conv, block, then per level a conv of stride 2 and blocks, conv. Decoder: (clamp,)
    conv, ReLU, then per level blocks, upsampling and a conv, and a last conv. Images in it are in
    [0, 1], and latents pass a soft clamp first.
    """
    down, up = list(encoder), list(decoder)
    up = up[next(i for i, module in enumerate(up) if isinstance(module, nn.Conv2d)) :]
    halvings = [i for i, m in enumerate(down) if getattr(m, "stride", None) == (2, 2)]
    doublings = [i for i, m in enumerate(up) if isinstance(m, nn.Upsample)]
    ends = [*halvings, len(down) - 1]
    encoder_levels = tuple(
        Level(tuple(down[start:end]), down[end] if end in halvings else None)
        for start, end in zip([1, *(i + 1 for i in halvings)], ends, strict=True)
    )
    starts = [2, *(i + 2 for i in doublings)]
    decoder_levels = tuple(
        Level(tuple(up[start:end]), _chain(up[end], up[end + 1]) if end in doublings else None)
        for start, end in zip(starts, [*doublings, len(up) - 1], strict=True)
    )
    return VaeTrunk(
        encoder_stem=lambda pixels: down[0]((pixels + 1) / 2),
        encoder_levels=encoder_levels,
        encoder_mid=(),
        encoder_head=lambda h: down[-1](h) / scale + shift,
        decoder_stem=lambda latent: up[1](up[0](torch.tanh((latent - shift) * scale / 3) * 3)),
        decoder_mid=(),
        decoder_levels=decoder_levels[::-1],
        decoder_head=lambda h: up[-1](h) * 2 - 1,
        latent_channels=up[0].weight.shape[1],
        channels=tuple(down[end - 1].conv[-1].weight.shape[0] for end in ends),
    )
