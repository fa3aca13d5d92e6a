"""The host's VAE: encoding photos of any size and the degradation-aware decode."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ..diff_restorer import VaeTrunk, aware_decode, encoder_features
from .host import check_interrupt
from .host_build import with_tuned_decoder
from .host_models import DiffRestorer
from .images import pad_to_multiple

SCALE = 8
"""Pixels per latent pixel of a Stable Diffusion 1.5 VAE."""
AUTO_TILE = 512
"""Side of a tile in pixels, where tiles are needed and the user has not said which."""


def encode_photo(vae: Any, rgb: Tensor, latent_channels: int) -> tuple[Tensor, Tensor]:
    """Pad photos and encode them.

    Args:
        vae: The host's VAE.
        rgb: (B, H, W, 3) in [0, 1].
        latent_channels: What the control module takes.

    Returns:
        The padded photos (B, H', W', 3) and their unscaled latent (B, C, H'/8, W'/8), the mean of
        the VAE's distribution.

    Raises:
        ValueError: The VAE is of another kind.
    """
    check_vae(vae, latent_channels)
    padded = pad_to_multiple(rgb, SCALE)
    return padded, vae.encode(padded)


def check_vae(vae: Any, latent_channels: int) -> None:
    """Refuse VAEs whose latents are of another kind.

    Raises:
        ValueError: Channels or scale differ.
    """
    vae.throw_exception_if_invalid()
    found, scale = vae.latent_channels, vae.spacial_compression_encode()
    if (found, scale) != (latent_channels, SCALE):
        raise ValueError(
            f"vae: its latents have {found} channels at 1/{scale} size, needed are "
            f"{latent_channels} at 1/{SCALE}. VAEs of SD 3, Flux and video models do not fit: "
            "connect the VAE of your Stable Diffusion 1.5 checkpoint, or of Nano for Nano."
        )


@dataclass(frozen=True)
class AwareDecoder:
    """One decode: a VAE, the parts of a Diff-Restorer file that extend it, and how to use them."""

    vae: Any
    restorer: DiffRestorer
    fidelity: float
    """How much of the LQ photo's detail is injected, in [0, 1]."""

    @property
    def _fuses(self) -> bool:
        return self.restorer.fusion is not None and self.fidelity > 0

    def decode(
        self, latent: Tensor, photo: Tensor, pooled: Tensor, tile: int, overlap: int
    ) -> Tensor:
        """Decode a batch, whole pictures where they fit into memory.

        Args:
            latent: Unscaled, (B, C, h, w).
            photo: Padded LQ photos, (B, 8h, 8w, 3) in [0, 1].
            pooled: Pooled P_D, (B, width).
            tile: Side of the tiles in pixels; 0 decodes whole pictures if that is possible.
            overlap: Of the tiles, in pixels.

        Returns:
            Images (B, 8h, 8w, 3) in [0, 1].
        """
        trunk = self._trunk()
        needed = self._load(latent)
        free = cast(int, comfy.model_management.get_free_memory(self.vae.device))
        images = None
        if tile == 0 and needed <= free:
            try:
                images = self._whole(trunk, latent, photo, pooled, int(free // needed))
            except comfy.model_management.OOM_EXCEPTION:
                # Handled below: the exception keeps tensors alive as long as it is handled.
                logging.warning("Aware VAE Decode: out of memory, trying again in tiles.")
        elif tile == 0:
            logging.info("Aware VAE Decode: the picture is too large at once, using tiles.")
        if images is None:
            images = self._tiled(trunk, latent, photo, pooled, tile or AUTO_TILE, overlap)
        return images.to(self.vae.output_device).movedim(1, -1)

    def _trunk(self) -> VaeTrunk:
        module, tuned = self.vae.first_stage_model, self.restorer.tuned_decoder
        trunk = VaeTrunk.of(module)
        check_vae(self.vae, self.restorer.control.network.latent_channels)
        if tuned is not None:
            tuned.model.to(self.vae.vae_dtype)
            trunk = VaeTrunk.of(with_tuned_decoder(module, tuned.model))
        if self._fuses:
            self._check_fusion(trunk, type(module).__name__)
        return trunk

    def _check_fusion(self, trunk: VaeTrunk, kind: str) -> None:
        for level, channels in self.restorer.fusion.model.config.channels:
            found = trunk.channels[level]
            if found != channels:
                raise ValueError(
                    f"vae: found a {kind} with {found} channels at 1/{2**level} size, but "
                    f"{self.restorer.path.name} was "
                    f"trained with {channels}. Connect the VAE that the file was trained for."
                )

    def _load(self, latent: Tensor) -> float:
        """Bring all parts to the device; bytes that one picture needs there."""
        vae, dtype = self.vae, self.vae.vae_dtype
        batch, _, height, width = latent.shape
        needed = vae.memory_used_decode(latent.shape, dtype)
        models = [vae.patcher]
        if self._fuses:
            pixels = (batch, 3, SCALE * height, SCALE * width)
            needed += vae.memory_used_encode(pixels, dtype)
            models.append(self.restorer.fusion)
        if self.restorer.tuned_decoder is not None:
            models.append(self.restorer.tuned_decoder)
        comfy.model_management.load_models_gpu(
            models, memory_required=needed, force_full_load=vae.disable_offload
        )
        return needed

    def _pixels(self, trunk: VaeTrunk, latent: Tensor, photo: Tensor, pooled: Tensor) -> Tensor:
        """One evaluation on the device; (B, 3, 8h, 8w) around [-1, 1]."""
        check_interrupt()
        vae, dtype, device = self.vae, self.vae.vae_dtype, self.vae.device
        features, fusion = {}, None
        if self._fuses:
            fusion = self.restorer.fusion.model
            pixels = vae.process_input(photo).to(dtype).to(device)
            features = encoder_features(trunk, pixels, fusion.levels)
        return aware_decode(
            trunk,
            fusion,
            latent.to(dtype).to(device),
            features,
            pooled.to(dtype).to(device),
            self.fidelity,
        )

    def _whole(
        self, trunk: VaeTrunk, latent: Tensor, photo: Tensor, pooled: Tensor, at_once: int
    ) -> Tensor:
        progress = comfy.utils.ProgressBar(latent.shape[0])
        done = []
        chunks = (part.split(at_once) for part in (latent, photo.movedim(-1, 1), pooled))
        for chunk in zip(*chunks, strict=True):
            pixels = self._pixels(trunk, *chunk).to(self.vae.output_device).float()
            done.append(self.vae.process_output(pixels))
            progress.update(len(pixels))
        return torch.cat(done)

    def _tiled(
        self,
        trunk: VaeTrunk,
        latent: Tensor,
        photo: Tensor,
        pooled: Tensor,
        tile: int,
        overlap: int,
    ) -> Tensor:
        """Overlapping tiles, blended by the host.

        The host passes tiles without their position, so the photo rides along as channels of the
        latent. Each tile has its own GroupNorm statistics and attention: tiles differ a little
        from the whole picture, which the overlap hides.
        """
        side, margin = tile // SCALE, overlap // SCALE
        channels, height, width = latent.shape[1:]
        steps = comfy.utils.get_tiled_scale_steps(width, height, side, side, margin)
        progress = comfy.utils.ProgressBar(latent.shape[0] * steps)
        both = torch.cat([latent, F.pixel_unshuffle(photo.movedim(-1, 1), SCALE)], dim=1)
        done = []
        for index in range(len(latent)):

            def decode(part: Tensor, index: int = index) -> Tensor:
                pixels = F.pixel_shuffle(part[:, channels:], SCALE)
                here = pooled[index : index + 1]
                return self._pixels(trunk, part[:, :channels], pixels, here).float()

            done.append(
                comfy.utils.tiled_scale(
                    both[index : index + 1],
                    decode,
                    tile_x=side,
                    tile_y=side,
                    overlap=margin,
                    upscale_amount=SCALE,
                    out_channels=3,
                    output_device=self.vae.output_device,
                    pbar=progress,
                )
            )
        return self.vae.process_output(torch.cat(done))
