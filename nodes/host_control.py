"""Degradation Control as a ControlNet of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import Tensor

from ..diff_restorer import make_hint_conv

TRUNK = ("model_channels", "channel_mult", "num_res_blocks", "transformer_depth")
"""Sizes of a UNet, in the host's terms, that its control shares; inpainting has more inputs."""


def _trunk(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: config.get(name) for name in TRUNK}
    return {name: list(s) if isinstance(s, tuple) else s for name, s in sizes.items()}


class ControlModel(comfy.cldm.cldm.ControlNet):
    """The host's ControlNet trunk with P_D as its context and the LQ latent as its hint."""

    def __init__(
        self,
        config: dict[str, Any],
        latent_channels: int,
        operations: Any,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            **config,
            hint_channels=latent_channels,
            operations=operations,
            device=device,
            dtype=dtype,
        )
        self.input_hint_block = TimestepEmbedSequential(
            make_hint_conv(
                latent_channels, config["model_channels"], operations, device=device, dtype=dtype
            )
        )
        self.context_width = config["context_dim"]
        self.trunk = _trunk(config)
        self.latent_channels = latent_channels

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        degradation: Tensor,
        y: Tensor | None = None,
    ) -> dict[str, list[Tensor]]:
        """One evaluation.

        Args:
            x: Noisy latent, (chunks * B, 4, h, w); the host stacks positive and negative.
            hint: Scaled LQ latent, of x's shape or with batch 1.
            timesteps: (chunks * B,).
            context: What the UNet attends to; this module attends to P_D instead.
            degradation: P_D, (B, T, C) or (1, T, C), the same for all chunks.
            y: Of the host's signature; Stable Diffusion 1.5 has none.
        """
        repeats = x.shape[0] // degradation.shape[0]
        tokens = degradation.to(device=x.device, dtype=x.dtype).repeat(repeats, 1, 1)
        return super().forward(x, hint, timesteps, tokens)


class EncodedPhoto:
    """The VAE of a control whose photo is encoded already.

    The host encodes a control's hint by itself when sampling starts, at the size it then needs.
    At the photo's own size that would repeat the encode of Degradation Control; for areas and
    tiles, which resize or crop the hint, it would repeat in every step.
    """

    _KEPT = 4

    def __init__(self, vae: Any, pixels: Tensor, latent: Tensor) -> None:
        self._vae = vae
        self._known = [(pixels, latent)]

    @property
    def latent(self) -> Tensor:
        """Raw latent of the photo."""
        return self._known[0][1]

    def encode(self, pixels: Tensor) -> Tensor:
        """Raw latent of (B, H, W, 3); only pixels not seen lately are given to the VAE."""
        for known, latent in self._known:
            if known.device == pixels.device and torch.equal(known, pixels):
                return latent
        latent = self._vae.encode(pixels.clamp(0, 1))  # bicubic resizing overshoots
        self._known = [self._known[0], *self._known[1:][1 - self._KEPT :], (pixels, latent)]
        return latent

    def __getattr__(self, name: str) -> Any:
        if name == "_vae":
            raise AttributeError(name)
        return getattr(self._vae, name)


class DegradationControlNet(comfy.controlnet.ControlNet):
    """A ControlNet that brings its own cross-attention context, P_D.

    P_D travels as an extra argument of the network, which the host copies with the control and
    hands over in every step. The `cross_attn_controlnet` entry of a CONDITIONING would reach all
    ControlNets of the chain instead.
    """

    @property
    def network(self) -> ControlModel:
        """The network itself, which copies share."""
        return cast(ControlModel, self.control_model)

    def attach(
        self,
        pixels: Tensor,
        latent: Tensor,
        degradation: Tensor,
        vae: Any,
        strength: float,
        percents: tuple[float, float],
    ) -> DegradationControlNet:
        """A copy for one batch of photos.

        Args:
            pixels: Padded photos, (B, H, W, 3) in [0, 1].
            latent: The same from the VAE, unscaled, (B, 4, H/8, W/8).
            degradation: P_D, (B, T, C).
            vae: For hints that another node crops or resizes.
            strength: Factor of what is added to the UNet.
            percents: Part of the sampling during which the control acts, each in [0, 1].
        """
        control = self.copy()
        control.upscale_algorithm = "bicubic"  # for latents of another size than the photos'
        photo = EncodedPhoto(vae, pixels, latent)
        control.set_cond_hint(pixels.movedim(-1, 1), strength, percents, vae=photo)
        control.set_extra_arg("degradation", degradation)
        return control

    def copy(self) -> DegradationControlNet:
        """Like the host's own, which would turn every subclass into a plain ControlNet."""
        control = type(self)(
            None,
            global_average_pooling=self.global_average_pooling,
            load_device=self.load_device,
            manual_cast_dtype=self.manual_cast_dtype,
        )
        control.control_model = self.control_model
        control.control_model_wrapped = self.control_model_wrapped
        self.copy_to(control)
        return control

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Called once per conditioning entry before sampling.

        Raises:
            ValueError: The model is not of the kind that the control was trained for.
        """
        config = model.model_config.unet_config
        own, needed = config.get("context_dim"), self.network.context_width
        if own != needed:
            width = f"{own} wide" if own else "of another kind"
            family = " (Stable Diffusion 1.5)" if needed == 768 else ""
            raise ValueError(
                f"model: its cross-attention is {width}, this Diff-Restorer file needs {needed}"
                f"{family}. SDXL (2048), SD 2 (1024) and Flux models do not work with it: "
                "connect the model that the file was trained for."
            )
        # What does not fit, the host leaves out with a line in its log.
        trunk = _trunk(config)
        for name, size in self.network.trunk.items():
            if trunk[name] != size:
                raise ValueError(
                    f"model: its {name} is {trunk[name]}, this Diff-Restorer file needs {size}. "
                    "Connect the model that the file was trained for."
                )
        # The host does not clean up after an interrupt, and the next run may have another size.
        self.cond_hint = None
        getattr(self, "cond_hints", {}).clear()
        super().pre_run(model, percent_to_timestep_function)

    def check_batch(self, latents: int) -> None:
        """Raises ValueError where so many latents are not of the photos that the control was made
        for: the host would repeat some of the photos."""
        hint = cast(Tensor, self.cond_hint_original)
        photos = max(len(self.extra_args["degradation"]), len(hint))
        if latents % photos:
            raise ValueError(
                f"latent_image: a batch of {latents}, but Degradation Control was given {photos} "
                "photos. Use its LATENT output, or a batch that is a multiple of it."
            )

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, *rest: Any
    ) -> Any:
        """The host's evaluation, once the batches are known to go together."""
        self.check_batch(x_noisy.shape[0] // batched_number)
        return super().get_control(x_noisy, t, cond, batched_number, *rest)
