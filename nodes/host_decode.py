"""The degradation-aware decode by the host's VAE: whole pictures, or tiles where they are large."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ..diff_restorer import (
    DetailPath,
    LocalPooled,
    VaeTrunk,
    aware_decode,
    encoder_features,
    local_statistics,
    photo_statistics,
)
from ..diff_restorer.decoder import PIXELS, Features
from ..diff_restorer.maps import UNIT, Cut, Map
from ..diff_restorer.tiled_vae import plan_decode, plan_features
from ..diff_restorer.tiles import HiddenNormError
from .host import at_once, check_interrupt
from .host_build import with_tuned_decoder
from .host_encode import PhotoFeatures
from .host_models import DiffRestorer
from .host_vae import AUTO_TILE, Report, check_vae, cut, in_smaller_tiles, load, try_whole
from .images import to_batch

EXACT, FAST = "exact", "fast"
"""Ways of tiling: as if the picture were whole, or tiles on their own and blended."""


@dataclass(frozen=True)
class AwareDecoder:
    """One decode: a VAE, the parts of a Diff-Restorer file that extend it, and how to use them."""

    vae: Any
    restorer: DiffRestorer
    fidelity: float
    """How much of the LQ photo's detail is injected, in [0, 1]."""
    carried: PhotoFeatures | None = None
    """From the encode, where the LATENT still carries them."""

    @property
    def _fuses(self) -> bool:
        return self.restorer.fusion is not None and self.fidelity > 0

    def decode(
        self,
        latent: Tensor,
        photo: Tensor,
        pooled: Tensor | LocalPooled,
        tile: int,
        overlap: int,
        tiling: str,
    ) -> Tensor:
        """Decode a batch, whole pictures where they fit into memory.

        Args:
            latent: Unscaled, (B, C, h, w).
            photo: Padded LQ photos, (B, 8h, 8w, 3) in [0, 1], or fewer, which are repeated.
            pooled: Pooled P_D, (B, width), or of each place of B photos; or fewer.
            tile: Side of the tiles in pixels; 0 decodes whole pictures if that is possible.
            overlap: Of the tiles, in pixels; exact ones need none.
            tiling: EXACT or FAST.

        Returns:
            Images (B, 8h, 8w, 3) in [0, 1].
        """
        trunk, carried = self._trunk(), self._carried_features(photo)
        needed = self._load(latent, carried, tile)
        inputs = self._inputs(trunk, latent, photo, pooled, carried)
        images = None
        if tile == 0:
            images = try_whole(
                at_once(needed, self.vae.device, self.vae.patcher),
                lambda count: self._whole(inputs, count),
                "Aware VAE Decode",
            )
        if images is None:
            images = self._in_tiles(inputs, tile or AUTO_TILE, overlap, tiling)
        self._take_haze(images, pooled)
        return images.to(self.vae.output_device).movedim(1, -1)

    def _take_haze(self, images: Tensor, pooled: Tensor | LocalPooled) -> None:
        """What is left of it in whole images (B, 3, H, W), in place, one after the other."""
        path = self.restorer.fusion.model if self._fuses else None
        if not isinstance(path, DetailPath):
            return
        if isinstance(pooled, LocalPooled):
            pooled = pooled.tiles.mean(dim=(2, 3))
        pooled = to_batch(pooled, len(images)).to(self.vae.device).float()
        for index in range(len(images)):
            one = slice(index, index + 1)
            done = path.without_haze(images[one], pooled[one], self.restorer.info.types)
            images[one] = torch.lerp(images[one], done, self.fidelity)

    def _trunk(self) -> VaeTrunk:
        module, tuned = self.vae.first_stage_model, self.restorer.tuned_decoder
        check_vae(self.vae, self.restorer)
        trunk = VaeTrunk.of(module)
        if tuned is not None:
            tuned.model.to(self.vae.vae_dtype)
            trunk = VaeTrunk.of(with_tuned_decoder(module, tuned.model))
        if self._fuses:
            self._check_fusion(trunk, type(module).__name__)
        return trunk

    def _condition(self, pooled: Tensor | LocalPooled, pixels: Tensor) -> Tensor | LocalPooled:
        """What modulates the decoder; of whole photos, so that their tiles agree."""
        if not self._fuses:
            return pooled
        photo = (pixels + 1) / 2
        is_local = isinstance(pooled, LocalPooled)
        statistics = local_statistics(photo, pooled) if is_local else photo_statistics(photo)
        statistics = statistics.to(self.vae.device)
        return self.restorer.fusion.model.condition(pooled.to(statistics), statistics)

    def _check_fusion(self, trunk: VaeTrunk, kind: str) -> None:
        for level, channels in self.restorer.fusion.model.config.channels:
            own = trunk.channels[level]
            if own != channels:
                raise ValueError(
                    f"vae: found a {kind} with {own} channels at 1/{2**level} size, but "
                    f"{self.restorer.path.name} was "
                    f"trained with {channels}. Connect the VAE that the file was trained for."
                )

    def _carried_features(self, photo: Tensor) -> Features:
        """Those of the encode, if they are right; else none."""
        if not self._fuses or self.carried is None:
            return {}
        levels = self.restorer.fusion.model.levels
        fits = self.carried.fits(self.vae, photo, levels)
        return {level: self.carried.by_level[level] for level in levels} if fits else {}

    def _load(self, latent: Tensor, carried: Features, tile: int) -> float:
        """Bring all parts to the device, with room for tiles of that side or, for 0, for a whole
        picture; bytes that a whole one needs there."""
        vae, dtype = self.vae, self.vae.vae_dtype
        fusion = self.restorer.fusion if self._fuses else None
        models = [model for model in (fusion, self.restorer.tuned_decoder) if model is not None]

        def bytes_of(height: int, width: int) -> float:
            count = vae.memory_used_decode((1, latent.shape[1], height, width), dtype)
            if fusion is not None and not carried:
                count += vae.memory_used_encode((1, 3, UNIT * height, UNIT * width), dtype)
            return count

        needed, side = bytes_of(*latent.shape[-2:]), (tile or AUTO_TILE) // UNIT
        in_a_tile = bytes_of(side, side)
        load(vae, models, min(needed, in_a_tile) if tile else needed, in_a_tile)
        return needed

    def _inputs(
        self,
        trunk: VaeTrunk,
        latent: Tensor,
        photo: Tensor,
        pooled: Tensor | LocalPooled,
        carried: Features,
    ) -> _Inputs:
        """All for as many pictures as there are latents."""
        batch = len(latent)
        if isinstance(pooled, LocalPooled):
            pooled = replace(pooled, tiles=to_batch(pooled.tiles, batch))
        else:
            pooled = to_batch(pooled, batch)
        features = {level: to_batch(value, batch) for level, value in carried.items()}
        pixels = self.vae.process_input(to_batch(photo, batch).movedim(-1, 1))
        return _Inputs(trunk, latent, pixels, self._condition(pooled, pixels), features)

    def _in_tiles(self, inputs: _Inputs, side: int, overlap: int, tiling: str) -> Tensor:
        """Tiles as asked for, but fast ones where exact ones cannot be."""

        def exact(side: int) -> Tensor:
            return self._exact(inputs, side)

        def fast(side: int) -> Tensor:
            return self._blended(inputs, side, min(overlap, side // 2))

        if tiling == EXACT:
            try:
                return in_smaller_tiles(side, exact, "Aware VAE Decode: decoded in exact")
            except HiddenNormError as error:
                logging.warning("Aware VAE Decode: %s. Using fast tiles.", error)
        return in_smaller_tiles(side, fast, "Aware VAE Decode: decoded in fast")

    def _pixels(self, inputs: _Inputs) -> Tensor:
        """One evaluation on the device; (B, 3, 8h, 8w) around [-1, 1]."""
        check_interrupt()
        dtype, device = self.vae.vae_dtype, self.vae.device
        features, fusion = {}, None
        if self._fuses:
            fusion, photo = self.restorer.fusion.model, inputs.photo.to(device)
            if inputs.features:
                held = inputs.features.items()
                features = {level: value.to(device, dtype) for level, value in held}
            else:
                features = encoder_features(inputs.trunk, photo.to(dtype), fusion.levels)
            features[PIXELS] = photo
        raw, condition = inputs.latent.to(dtype).to(device), inputs.condition
        return aware_decode(inputs.trunk, fusion, raw, features, condition.to(raw), self.fidelity)

    def _whole(self, inputs: _Inputs, count: int) -> Tensor:
        """Whole pictures, `count` at once."""
        total = len(inputs.latent)
        progress, done = comfy.utils.ProgressBar(total), []
        for start in range(0, total, count):
            some = inputs.rows(slice(start, start + count))
            pixels = self._pixels(some).to(self.vae.output_device).float()
            done.append(self.vae.process_output(pixels))
            progress.update(len(pixels))
        return torch.cat(done)

    def _exact(self, inputs: _Inputs, tile: int) -> Tensor:
        """Tiles that give the same as the whole picture."""
        vae, trunk = self.vae, inputs.trunk
        fusion = self.restorer.fusion.model if self._fuses else None
        report, done = Report(len(inputs.latent)), []
        for index in range(len(inputs.latent)):
            one = inputs.rows(slice(index, index + 1))
            tiles = cut(vae, trunk, one.photo, tile, report)
            condition = one.condition.to(tiles.like)
            features = self._feature_maps(one, tiles, report, index)
            plan = plan_decode(
                trunk, fusion, one.latent, one.photo, features, condition, self.fidelity, tiles
            )
            del features  # the plan lets go of them when it has used them
            report.start(plan, index, 0.3, 1.0)
            image = plan.result().whole().float()
            if isinstance(fusion, DetailPath):
                image = image + self.fidelity * one.photo.to(image)
            done.append(image)
        report.finish()
        return vae.process_output(torch.cat(done))

    def _feature_maps(self, one: _Inputs, tiles: Cut, report: Report, index: int) -> dict[int, Map]:
        """The encoder features of picture `index` at the fusion blocks' levels."""
        if one.features or not self._fuses:
            return {level: Map(value, UNIT >> level) for level, value in one.features.items()}
        levels = self.restorer.fusion.model.levels
        if not levels:
            return {}
        plan = plan_features(one.trunk, one.photo, levels, tiles)
        report.start(plan, index, 0.0, 0.3)
        return {level: features for level, features in enumerate(plan.run()) if level in levels}

    def _blended(self, inputs: _Inputs, tile: int, overlap: int) -> Tensor:
        """Overlapping tiles, blended by the host.

        The host passes tiles without their position, so the photo and what is known of each place
        ride along as channels of the latent. Each tile has its own GroupNorm statistics and
        attention: tiles differ a little from the whole picture, which the overlap hides.
        """
        side, margin = tile // UNIT, overlap // UNIT
        batch, _, height, width = inputs.latent.shape
        parts = [inputs.latent, F.pixel_unshuffle(inputs.photo, UNIT)]
        if isinstance(inputs.condition, LocalPooled):
            parts += [w.expand(batch, -1, -1, -1) for w in inputs.condition.weights]
        sizes = [part.shape[1] for part in parts]
        steps = comfy.utils.get_tiled_scale_steps(width, height, side, side, margin)
        progress = comfy.utils.ProgressBar(batch * steps)
        stacked = torch.cat([part.to(inputs.latent) for part in parts], dim=1)
        done = []
        for index in range(batch):
            one = inputs.rows(slice(index, index + 1))

            def decode(part: Tensor, one: _Inputs = one) -> Tensor:
                latent, photo, *weights = part.split(sizes, dim=1)
                condition = one.condition
                if isinstance(condition, LocalPooled):
                    condition = condition.within(*weights)
                photo = F.pixel_shuffle(photo, UNIT)
                return self._pixels(_Inputs(one.trunk, latent, photo, condition, {})).float()

            done.append(
                comfy.utils.tiled_scale(
                    stacked[index : index + 1],
                    decode,
                    tile_x=side,
                    tile_y=side,
                    overlap=margin,
                    upscale_amount=UNIT,
                    out_channels=3,
                    output_device=self.vae.output_device,
                    pbar=progress,
                )
            )
        return self.vae.process_output(torch.cat(done))


@dataclass(frozen=True)
class _Inputs:
    """What a decode works on: all photos of a batch, or some, or a part of one."""

    trunk: VaeTrunk
    latent: Tensor
    """Unscaled, (B, C, h, w)."""
    photo: Tensor
    """As the VAE takes it, (B, 3, 8h, 8w) in [-1, 1]."""
    condition: Tensor | LocalPooled
    """What modulates the decoder, from P_D and, for a detail path, the photos' tone."""
    features: Features
    """The photo's encoder features where they came with the latent, else empty."""

    def rows(self, photos: slice) -> _Inputs:
        """Some of the photos."""
        features = {level: value[photos] for level, value in self.features.items()}
        latent, photo, condition = self.latent[photos], self.photo[photos], self.condition[photos]
        return _Inputs(self.trunk, latent, photo, condition, features)
