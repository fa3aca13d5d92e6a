"""The host's VAE: encoding photos of any size and the degradation-aware decode."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ..diff_restorer import (
    DetailPath,
    LocalPooled,
    UnsupportedVaeError,
    VaeTrunk,
    aware_decode,
    encode_with_features,
    encoder_features,
    local_statistics,
    photo_statistics,
)
from ..diff_restorer.decoder import PIXELS, Features
from ..diff_restorer.tiled_vae import plan_decode, plan_encode, plan_features
from ..diff_restorer.tiles import Cut, HiddenNormError, Map, Plan
from .host import at_once, check_interrupt, is_oom, map_folder
from .host_build import with_tuned_decoder
from .host_models import DiffRestorer
from .images import digest, pad_to_multiple, to_batch

Result = TypeVar("Result")
SCALE = 8
"""Pixels per latent pixel of a Stable Diffusion 1.5 VAE."""
AUTO_TILE, LEAST_TILE = 512, 128
"""Side of a tile in pixels, where tiles are needed and the user has not said which, and the side
below which a lack of memory is not answered by smaller tiles."""
MOST_FEATURES = 2**30
"""Bytes of encoder features that all LATENTs of a file may carry together, such as those of a
folder of photos; more are made again by the decode."""
EXACT, FAST = "exact", "fast"
"""Ways of tiling: as if the picture were whole, or tiles on their own and blended."""


@dataclass(frozen=True, eq=False)
class PhotoFeatures:
    """What the VAE's encoder saw in photos; travels with their latent to the decode."""

    KEY = "diff_restorer_features"
    """Of a LATENT, which samplers hand on with all its entries."""

    vae: weakref.ref[Any]
    photos: bytes
    """Digest of the padded photos."""
    by_level: Features

    def get_ram_usage(self) -> int:
        """In bytes; newer hosts clear their cache by it."""
        return sum(each.nbytes for each in self.by_level.values())

    def fits(self, vae: Any, padded: Tensor, levels: Collection[int]) -> bool:
        """Whether they are those of this VAE and these photos, at all these levels."""
        has_all = set(levels) <= set(self.by_level)
        return self.vae() is vae and has_all and self.photos == digest(padded)


def encode_photo(
    vae: Any, rgb: Tensor, restorer: DiffRestorer
) -> tuple[Tensor, Tensor, PhotoFeatures | None]:
    """Pad photos and encode them, once for control and decode.

    Args:
        vae: The host's VAE.
        rgb: (B, H, W, 3) in [0, 1].
        restorer: Whose control module and fusion blocks will read what is encoded.

    Returns:
        The padded photos (B, H', W', 3); their unscaled latent (B, C, H'/8, W'/8), the mean of the
        VAE's distribution; and the encoder's features for Aware VAE Decode, None where they are
        not needed or would take too much memory.

    Raises:
        ValueError: The VAE is of another kind.
    """
    check_vae(vae, restorer)
    padded = pad_to_multiple(rgb, SCALE)
    levels = restorer.fusion.model.levels if restorer.fusion is not None else ()
    try:
        trunk = VaeTrunk.of(vae.first_stage_model)
    except UnsupportedVaeError:  # the decode will say so, where one is asked for
        return padded, vae.encode(padded), None
    if not levels:
        return padded, vae.encode(padded), None
    carried = sum(each.get_ram_usage() for each in restorer.carried)
    if carried + _features_bytes(trunk, levels, padded, vae.vae_dtype) > MOST_FEATURES:
        levels = ()
    latent, by_level = _encode(vae, trunk, padded, levels)
    if not by_level:
        return padded, latent, None
    features = PhotoFeatures(weakref.ref(vae), digest(padded), by_level)
    restorer.carried.add(features)
    return padded, latent, features


def _features_bytes(
    trunk: VaeTrunk, levels: Collection[int], padded: Tensor, dtype: torch.dtype
) -> int:
    numbers = sum(trunk.channels[level] / 4**level for level in levels)
    return int(numbers * padded[..., 0].numel() * dtype.itemsize)


def _encode(
    vae: Any, trunk: VaeTrunk, padded: Tensor, levels: Collection[int]
) -> tuple[Tensor, Features]:
    """The host's own encode, step by step, with the features on the way; in tiles if need be."""
    pixels = padded.movedim(-1, 1)
    needed = vae.memory_used_encode((1, *pixels.shape[1:]), vae.vae_dtype)
    in_a_tile = vae.memory_used_encode((1, 3, AUTO_TILE, AUTO_TILE), vae.vae_dtype)
    _load(vae, [], needed, in_a_tile)
    if count := at_once(needed, vae.device, vae.patcher):
        try:
            return _encode_whole(vae, trunk, pixels, levels, count)
        except Exception as error:
            if not is_oom(error):
                raise
            # Handled below: the exception keeps tensors alive as long as it is handled.
            logging.warning("Degradation Control: out of memory, encoding again in tiles.")
    try:
        return _in_smaller_tiles(
            AUTO_TILE,
            lambda side: _encode_tiled(vae, trunk, pixels, levels, side),
            "Degradation Control: encoded in exact",
        )
    except HiddenNormError as error:
        logging.warning("Degradation Control: %s. Using the host's tiles.", error)
        return vae.encode_tiled(padded), {}


def _load(vae: Any, others: Sequence[Any], needed: float, in_a_tile: float) -> None:
    """Bring a VAE and other models to the device, which then has the memory to work.

    Of a picture that the device could never hold whole, a tile's: for more, the host would leave
    the weights themselves behind.
    """
    total = cast(int, comfy.model_management.get_total_memory(vae.device))
    required = int(needed if needed <= total else in_a_tile)
    comfy.model_management.load_models_gpu(
        [vae.patcher, *others], memory_required=required, force_full_load=vae.disable_offload
    )


def _in_smaller_tiles(side: int, work: Callable[[int], Result], done: str) -> Result:
    """Do the work in tiles of `side` pixels, or of less where memory is too small for that."""
    while True:
        try:
            found = work(side)
            logging.info("%s tiles of %d px.", done, side)
            return found
        except Exception as error:
            side //= 2
            if side < LEAST_TILE or not is_oom(error):
                raise
            node = done.split(":")[0]
            logging.warning("%s: out of memory, trying tiles of %d px.", node, side)


def _encode_whole(
    vae: Any, trunk: VaeTrunk, pixels: Tensor, levels: Collection[int], count: int
) -> tuple[Tensor, Features]:
    dtype, device, home = vae.vae_dtype, vae.device, vae.output_device
    latents, parts = [], []
    for some in pixels.split(count):
        check_interrupt()
        moments, features = encode_with_features(
            trunk, vae.process_input(some).to(dtype).to(device), levels
        )
        latents.append(moments[:, : trunk.latent_channels].to(home).float())
        parts.append({level: features[level].to(home) for level in levels})
    return torch.cat(latents), _joined(parts)


def _joined(parts: Sequence[Features]) -> Features:
    """Features of batches as those of one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return {level: torch.cat([part[level] for part in parts]) for level in parts[0]}


def _encode_tiled(
    vae: Any, trunk: VaeTrunk, pixels: Tensor, levels: Collection[int], tile: int
) -> tuple[Tensor, Features]:
    """Tiles that give the same as the whole picture."""
    pixels = vae.process_input(pixels)
    report, home = _Report(len(pixels)), vae.output_device
    latents, parts = [], []
    for index in range(len(pixels)):
        cut = _cut(vae, trunk, pixels, tile, report)
        plan = plan_encode(trunk, pixels[index : index + 1], cut)
        report.start(plan, index, 0.0, 1.0)
        kept: Features = {}
        for level, found in enumerate(plan.run()):
            if level in levels:
                kept[level] = found.whole().to(home)
        parts.append(kept)
        latents.append(found.whole()[:, : trunk.latent_channels].to(home).float())
    report.finish()
    return torch.cat(latents), _joined(parts)


def _cut(vae: Any, trunk: VaeTrunk, pixels: Tensor, tile: int, report: _Report) -> Cut:
    """How one of the pictures is cut; its maps go to the disk where memory is small."""
    like = torch.empty(0, device=vae.device, dtype=vae.vae_dtype)
    folder = map_folder(2 * like.dtype.itemsize * trunk.channels[0] * pixels[0, 0].numel())
    return Cut(max(1, tile // SCALE), like, folder, report.tile)


def check_vae(vae: Any, restorer: DiffRestorer) -> None:
    """Refuse VAEs whose latents are of another kind.

    Raises:
        ValueError: Channels, scale or architecture differ.
    """
    vae.throw_exception_if_invalid()
    needed = restorer.control.network.latent_channels
    found, scale = vae.latent_channels, vae.spacial_compression_encode()
    if (found, scale) != (needed, SCALE):
        raise ValueError(
            f"vae: its latents have {found} channels at 1/{scale} size, needed are {needed} at "
            f"1/{SCALE}. VAEs of SD 3, Flux and video models do not fit: connect the VAE of your "
            "Stable Diffusion 1.5 checkpoint, or of Nano for Nano."
        )
    tiny = hasattr(vae.first_stage_model, "taesd_decoder")
    if restorer.has_tiny_vae not in (None, tiny):
        raise ValueError(
            f"vae: found {'a TAESD' if tiny else 'an AutoencoderKL'}, but {restorer.path.name} was "
            f"trained with {'an AutoencoderKL' if tiny else 'a TAESD (Nano)'}. Connect the VAE "
            "that the file was trained for: that of your SD 1.5 checkpoint, or Nano's for Nano."
        )


@dataclass(frozen=True)
class AwareDecoder:
    """One decode: a VAE, the parts of a Diff-Restorer file that extend it, and how to use them."""

    vae: Any
    restorer: DiffRestorer
    fidelity: float
    """How much of the LQ photo's detail is injected, in [0, 1]."""
    known: PhotoFeatures | None = None
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
        trunk = self._trunk()
        known = self._known(photo)
        needed = self._load(latent, known, tile or AUTO_TILE)
        if isinstance(pooled, LocalPooled):
            pooled = replace(pooled, tiles=to_batch(pooled.tiles, len(latent)))
        else:
            pooled = to_batch(pooled, len(latent))
        known = {level: to_batch(value, len(latent)) for level, value in known.items()}
        pixels = self.vae.process_input(to_batch(photo, len(latent)).movedim(-1, 1))
        given = _Given(trunk, latent, pixels, self._condition(pooled, pixels), known)
        count = at_once(needed, self.vae.device, self.vae.patcher)
        if tile == 0 and not count:
            logging.info("Aware VAE Decode: the picture is too large at once, using tiles.")
        elif tile == 0:
            try:
                images = self._whole(given, count)
                return images.to(self.vae.output_device).movedim(1, -1)
            except Exception as error:
                if not is_oom(error):
                    raise
                # Handled below: the exception keeps tensors alive as long as it is handled.
                logging.warning("Aware VAE Decode: out of memory, trying again in tiles.")

        def in_tiles(tiling: str) -> Tensor:
            def work(side: int) -> Tensor:
                if tiling == EXACT:
                    return self._exact(given, side)
                return self._blended(given, side, min(overlap, side // 2))

            done = f"Aware VAE Decode: decoded in {tiling}"
            return _in_smaller_tiles(tile or AUTO_TILE, work, done)

        try:
            images = in_tiles(tiling)
        except HiddenNormError as error:
            logging.warning("Aware VAE Decode: %s. Using fast tiles.", error)
            images = in_tiles(FAST)
        return images.to(self.vae.output_device).movedim(1, -1)

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
        found = local_statistics(photo, pooled) if is_local else photo_statistics(photo)
        statistics = found.to(self.vae.device)
        return self.restorer.fusion.model.condition(pooled.to(statistics), statistics)

    def _check_fusion(self, trunk: VaeTrunk, kind: str) -> None:
        for level, channels in self.restorer.fusion.model.config.channels:
            found = trunk.channels[level]
            if found != channels:
                raise ValueError(
                    f"vae: found a {kind} with {found} channels at 1/{2**level} size, but "
                    f"{self.restorer.path.name} was "
                    f"trained with {channels}. Connect the VAE that the file was trained for."
                )

    def _known(self, photo: Tensor) -> Features:
        """The carried features, if they are right; else none."""
        if not self._fuses or self.known is None:
            return {}
        levels = self.restorer.fusion.model.levels
        fits = self.known.fits(self.vae, photo, levels)
        return {level: self.known.by_level[level] for level in levels} if fits else {}

    def _load(self, latent: Tensor, known: Features, tile: int) -> float:
        """Bring all parts to the device; bytes that one picture needs there."""
        vae, dtype = self.vae, self.vae.vae_dtype
        fusion = self.restorer.fusion if self._fuses else None
        models = [each for each in (fusion, self.restorer.tuned_decoder) if each is not None]

        def bytes_of(height: int, width: int) -> float:
            found = vae.memory_used_decode((1, latent.shape[1], height, width), dtype)
            if fusion is not None and not known:
                found += vae.memory_used_encode((1, 3, SCALE * height, SCALE * width), dtype)
            return found

        needed, side = bytes_of(*latent.shape[-2:]), tile // SCALE
        _load(vae, models, needed, bytes_of(side, side))
        return needed

    def _pixels(self, given: _Given) -> Tensor:
        """One evaluation on the device; (B, 3, 8h, 8w) around [-1, 1]."""
        check_interrupt()
        dtype, device = self.vae.vae_dtype, self.vae.device
        features, fusion = {}, None
        if self._fuses:
            fusion, photo = self.restorer.fusion.model, given.photo.to(device)
            if given.known:
                features = {level: value.to(device) for level, value in given.known.items()}
            else:
                features = encoder_features(given.trunk, photo.to(dtype), fusion.levels)
            features[PIXELS] = photo
        raw, condition = given.latent.to(dtype).to(device), given.condition
        return aware_decode(given.trunk, fusion, raw, features, condition.to(raw), self.fidelity)

    def _whole(self, given: _Given, count: int) -> Tensor:
        """Whole pictures, `count` at once."""
        total = len(given.latent)
        progress, done = comfy.utils.ProgressBar(total), []
        for start in range(0, total, count):
            some = given.rows(slice(start, start + count))
            pixels = self._pixels(some).to(self.vae.output_device).float()
            done.append(self.vae.process_output(pixels))
            progress.update(len(pixels))
        return torch.cat(done)

    def _exact(self, given: _Given, tile: int) -> Tensor:
        """Tiles that give the same as the whole picture."""
        vae, trunk = self.vae, given.trunk
        fusion = self.restorer.fusion.model if self._fuses else None
        report, done = _Report(len(given.latent)), []
        for index in range(len(given.latent)):
            one = given.rows(slice(index, index + 1))
            cut = _cut(vae, trunk, one.photo, tile, report)
            condition = one.condition.to(cut.like)
            features = self._feature_maps(one, cut, report, index)
            plan = plan_decode(
                trunk, fusion, one.latent, one.photo, features, condition, self.fidelity, cut
            )
            del features  # the plan lets go of them when it has used them
            report.start(plan, index, 0.3, 1.0)
            image = plan.result().whole().float()
            if isinstance(fusion, DetailPath):
                image = image + self.fidelity * one.photo.to(image)
            done.append(image)
        report.finish()
        return vae.process_output(torch.cat(done))

    def _feature_maps(self, one: _Given, cut: Cut, report: _Report, index: int) -> dict[int, Map]:
        """The encoder features of picture `index` at the fusion blocks' levels."""
        if one.known or not self._fuses:
            return {level: Map(value, SCALE >> level) for level, value in one.known.items()}
        levels = self.restorer.fusion.model.levels
        if not levels:
            return {}
        plan = plan_features(one.trunk, one.photo, levels, cut)
        report.start(plan, index, 0.0, 0.3)
        return {level: found for level, found in enumerate(plan.run()) if level in levels}

    def _blended(self, given: _Given, tile: int, overlap: int) -> Tensor:
        """Overlapping tiles, blended by the host.

        The host passes tiles without their position, so the photo and what is known of each place
        ride along as channels of the latent. Each tile has its own GroupNorm statistics and
        attention: tiles differ a little from the whole picture, which the overlap hides.
        """
        side, margin = tile // SCALE, overlap // SCALE
        batch, _, height, width = given.latent.shape
        parts = [given.latent, F.pixel_unshuffle(given.photo, SCALE)]
        if isinstance(given.condition, LocalPooled):
            parts += [each.expand(batch, -1, -1, -1) for each in given.condition.weights]
        sizes = [part.shape[1] for part in parts]
        steps = comfy.utils.get_tiled_scale_steps(width, height, side, side, margin)
        progress = comfy.utils.ProgressBar(batch * steps)
        stacked = torch.cat([part.to(given.latent) for part in parts], dim=1)
        done = []
        for index in range(batch):
            one = given.rows(slice(index, index + 1))

            def decode(part: Tensor, one: _Given = one) -> Tensor:
                latent, photo, *weights = part.split(sizes, dim=1)
                condition = one.condition
                if isinstance(condition, LocalPooled):
                    condition = condition.within(*weights)
                photo = F.pixel_shuffle(photo, SCALE)
                return self._pixels(_Given(one.trunk, latent, photo, condition, {})).float()

            done.append(
                comfy.utils.tiled_scale(
                    stacked[index : index + 1],
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


@dataclass(frozen=True)
class _Given:
    """What a decode works on: all photos of a batch, or some, or a part of one."""

    trunk: VaeTrunk
    latent: Tensor
    """Unscaled, (B, C, h, w)."""
    photo: Tensor
    """As the VAE takes it, (B, 3, 8h, 8w) in [-1, 1]."""
    condition: Tensor | LocalPooled
    """What modulates the decoder, from P_D and, for a detail path, the photos' tone."""
    known: Features
    """The photo's encoder features where they came with the latent, else empty."""

    def rows(self, photos: slice) -> _Given:
        """Some of the photos."""
        known = {level: value[photos] for level, value in self.known.items()}
        latent, photo, condition = self.latent[photos], self.photo[photos], self.condition[photos]
        return _Given(self.trunk, latent, photo, condition, known)


class _Report:
    """Turns the visits of tiles into the host's progress bar, and stops where the user says so."""

    def __init__(self, pictures: int) -> None:
        self._bar, self._pictures = comfy.utils.ProgressBar(pictures), pictures
        self._share, self._step = 0.0, 0.0

    def start(self, plan: Plan, index: int, begin: float, end: float) -> None:
        """A plan that takes picture `index` from one share of its work to another."""
        self._share, self._step = index + begin, (end - begin) / plan.visits

    def tile(self) -> None:
        """Before each tile."""
        check_interrupt()
        self._bar.update_absolute(self._share, self._pictures)
        self._share += self._step

    def finish(self) -> None:
        """All pictures are done."""
        self._bar.update_absolute(self._pictures, self._pictures)
