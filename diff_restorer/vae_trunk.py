"""A Stable Diffusion autoencoder as a list of steps, whichever library built it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor], Tensor]


class UnsupportedVaeError(ValueError):
    """The VAE is not an AutoencoderKL of the Stable Diffusion kind."""


@dataclass(frozen=True)
class Level:
    """One resolution of the encoder or decoder: residual blocks, then a change of size."""

    blocks: tuple[Step, ...]
    resample: Step | None
    """Downsampling (encoder) or upsampling (decoder); None at the end of the pyramid."""


@dataclass(frozen=True)
class VaeTrunk:
    """Layer-by-layer view of an AutoencoderKL; calls the modules, owns and copies nothing.

    Levels are indexed by their number of halvings: 0 is full size, 1 is 1/2, 2 is 1/4, 3 is 1/8.
    Walking all steps gives the very result of the library's own encode and decode.
    """

    encoder_stem: Step
    encoder_levels: tuple[Level, ...]
    encoder_head: Step
    """To the moments (B, 2*latent_channels, H/8, W/8), quant_conv included."""
    decoder_stem: Step
    """From the unscaled latent, post_quant_conv and mid block included."""
    decoder_levels: tuple[Level, ...]
    decoder_head: Step
    latent_channels: int

    @classmethod
    def of(cls, vae: nn.Module) -> VaeTrunk:
        """View `vae` as steps.

        Args:
            vae: AutoencoderKL in LDM layout (the host's `first_stage_model`) or diffusers' one.

        Raises:
            UnsupportedVaeError: `vae` is of another kind, such as TAESD or a video VAE.
        """
        # Any: two libraries' modules are read here by attribute, and neither is imported.
        module = cast(Any, vae)
        decoder = getattr(module, "decoder", None)
        if hasattr(decoder, "up") and hasattr(getattr(module, "encoder", None), "down"):
            return _ldm_trunk(module)
        if hasattr(decoder, "up_blocks") and hasattr(module, "quant_conv"):
            return _diffusers_trunk(module)
        raise UnsupportedVaeError(
            f"vae: found a {type(vae).__name__}, expected an AutoencoderKL with encoder and "
            "decoder levels (SD 1.5). TAESD and video VAEs have no such levels: connect the VAE "
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

    def mid(module: Any) -> Step:
        return _chain(_block(module.block_1), module.attn_1, _block(module.block_2))

    def head(module: Any) -> Step:
        return _chain(module.norm_out, F.silu, module.conv_out)

    return VaeTrunk(
        encoder_stem=encoder.conv_in,
        encoder_levels=tuple(
            Level(tuple(map(_block, level.block)), getattr(level, "downsample", None))
            for level in encoder.down
        ),
        encoder_head=_chain(mid(encoder.mid), head(encoder), getattr(vae, "quant_conv", None)),
        decoder_stem=_chain(
            getattr(vae, "post_quant_conv", None), decoder.conv_in, mid(decoder.mid)
        ),
        decoder_levels=tuple(
            Level(tuple(map(_block, level.block)), getattr(level, "upsample", None))
            for level in decoder.up
        ),
        decoder_head=head(decoder),
        latent_channels=decoder.conv_in.weight.shape[1],
    )


def _diffusers_trunk(vae: Any) -> VaeTrunk:
    encoder, decoder = vae.encoder, vae.decoder

    def level(block: Any, resamplers: str) -> Level:
        found = getattr(block, resamplers)
        return Level(tuple(map(_block, block.resnets)), None if found is None else found[0])

    def head(module: Any) -> Step:
        return _chain(module.conv_norm_out, module.conv_act, module.conv_out)

    return VaeTrunk(
        encoder_stem=encoder.conv_in,
        encoder_levels=tuple(level(block, "downsamplers") for block in encoder.down_blocks),
        encoder_head=_chain(encoder.mid_block, head(encoder), vae.quant_conv),
        decoder_stem=_chain(vae.post_quant_conv, decoder.conv_in, decoder.mid_block),
        decoder_levels=tuple(level(block, "upsamplers") for block in reversed(decoder.up_blocks)),
        decoder_head=head(decoder),
        latent_channels=decoder.conv_in.weight.shape[1],
    )
