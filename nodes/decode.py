"""The node from latent to picture."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..diff_restorer import LocalPooled
from ..diff_restorer.maps import UNIT
from .checks import checked
from .conditioning import check_degradation
from .host_decode import EXACT, FAST, AwareDecoder
from .host_encode import PhotoFeatures
from .host_models import DiffRestorer
from .host_vae import AUTO_TILE
from .images import check_finite, common_batch, pad_to_multiple, split_alpha, to_batch
from .sockets import CATEGORY, Degradation, found_by
from .sources import (
    degradation_input,
    photos_input,
    photos_of,
    restorer_input,
    restorer_of,
    share_input,
    vae_input,
    vae_of,
)


class DiffRestorerAwareVAEDecode(io.ComfyNode):
    """Aware VAE Decode: the VAE's decoder with the photo's own detail fused in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerAwareVAEDecode",
            display_name="Aware VAE Decode",
            category=CATEGORY,
            **found_by("restore", "vae decode", "keep detail", "sharpen"),
            description=(
                "Decodes like VAE Decode, but puts back detail of the degraded photo that the "
                "VAE loses, filtered by what is known of its degradation. The result has the "
                "exact size of the photo, and its transparency if it has any."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The sampler's result."),
                vae_input(),
                restorer_input(),
                degradation_input(),
                photos_input("The degraded photos that were restored."),
                share_input(
                    "fidelity",
                    "How much of the photo's own detail is put back. 0 decodes the latent alone.",
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip=(
                        "Side of the tiles in pixels. 0 decodes the whole picture at once and "
                        "uses tiles only where memory is too small for it."
                    ),
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=1024,
                    step=8,
                    tooltip=(
                        "Overlap of fast tiles in pixels, at most half a tile. More hides their "
                        "borders better and takes longer. Exact tiles have no borders to hide."
                    ),
                ),
                io.Combo.Input(
                    "tiling",
                    options=[EXACT, FAST],
                    default=EXACT,
                    optional=True,
                    tooltip=(
                        "exact: tiles give the same picture as decoding it whole. fast: tiles are "
                        "decoded on their own and blended; colours may drift from tile to tile."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The restored photos, at their exact size."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        samples: dict[str, Any],
        degradation: Degradation,
        fidelity: float,
        tile_size: int,
        overlap: int,
        vae: Any = None,
        diff_restorer: DiffRestorer | None = None,
        image: Tensor | None = None,
        tiling: str = EXACT,
    ) -> io.NodeOutput:
        check_tiling(tile_size, overlap, tiling)
        restorer = restorer_of(diff_restorer, degradation)
        check_degradation(degradation, restorer)
        rgb, alpha = split_alpha(photos_of(image, degradation))
        latent, photo = samples["samples"], pad_to_multiple(rgb, UNIT)
        check_size(latent, photo, restorer.control.network.latent_channels)
        check_batches(len(latent), image=len(photo), degradation=degradation.batch)
        features = samples.get(PhotoFeatures.KEY)
        decoder = AwareDecoder(vae_of(vae, restorer), restorer, fidelity, features)
        pooled = local_degradation(degradation, latent)
        restored = decoder.decode(latent, photo, pooled, tile_size, overlap, tiling)
        check_finite(
            "vae",
            restored,
            f"It made them of samples that reach {latent.abs().max():.3g}. Where that is above "
            "100, the sampler has diverged: lower its cfg or take another one. Else the VAE is "
            "damaged, or overflows in fp16: start the host with --fp32-vae.",
        )
        height, width = rgb.shape[1:3]
        restored = restored[:, :height, :width]
        if alpha is not None:
            restored = torch.cat([restored, to_batch(alpha, len(latent)).to(restored)], dim=-1)
        return io.NodeOutput(restored)


def check_tiling(tile_size: int, overlap: int, tiling: str) -> None:
    """Raise a ValueError for tiles that cannot be, sides in pixels."""
    if tiling not in (EXACT, FAST):
        raise ValueError(f"tiling: {tiling!r}, expected {EXACT} or {FAST}.")
    if tile_size and (tile_size < 64 or tile_size % UNIT):
        raise ValueError(
            f"tile_size: {tile_size} px. Use 0, or a multiple of {UNIT} from 64 px on."
        )
    if tiling == FAST and 2 * overlap > (tile_size or AUTO_TILE):
        raise ValueError(
            f"overlap: {overlap} px with tiles of {tile_size or AUTO_TILE} px. Use at most half a "
            "tile."
        )


def check_batches(latents: int, **photos: int) -> None:
    """Raises ValueError where the latents are no multiple of the photos, by the name of their
    input, or the inputs do not go together."""
    common_batch(**photos)
    for name, count in photos.items():
        if latents % count:
            raise ValueError(
                f"{name}: of {count} photos, but samples hold {latents} latents. Give it the "
                "photos that the latents are of, in their order; latents may be a multiple of "
                "them. After Latent From Batch take the same from the images, too, and let a "
                "Prompt Processor read those."
            )


def local_degradation(degradation: Degradation, latent: Tensor) -> Tensor | LocalPooled:
    """Pooled P_D of the photos, (B, C), or of each place, where Tiled Diffusion has looked there;
    raises ValueError where that was a photo of another size."""
    local = degradation.local
    if local is None:
        return degradation.pooled
    sizes = [(local.rows.shape[1], local.columns.shape[1]), tuple(latent.shape[-2:])]
    if sizes[0] != sizes[1]:
        seen, needed = (f"{UNIT * width} x {UNIT * height} px" for height, width in sizes)
        raise ValueError(
            f"degradation: Tiled Diffusion has read it from a photo of {seen}, but samples are a "
            f"latent of {needed}. Give Tiled Diffusion the same photo as Degradation Control."
        )
    return local


def check_size(latent: Tensor, photo: Tensor, channels: int) -> None:
    """Raises ValueError where the latent does not show the photo, padded to a multiple of 8 pixels,
    or has other channels."""
    if latent.shape[1] != channels:
        raise ValueError(
            f"samples: latents of {latent.shape[1]} channels, needed are {channels}. Those of "
            "other models do not fit: use the LATENT of Degradation Control."
        )
    height, width = photo.shape[1:3]
    if latent.shape[-2:] != (height // UNIT, width // UNIT):
        shown = " x ".join(str(UNIT * side) for side in reversed(latent.shape[-2:]))
        raise ValueError(
            f"samples: a latent of {shown} px, but the image is {width} x {height} px (padded to "
            f"multiples of {UNIT}). Scale the image like the latent, or use the LATENT of "
            "Degradation Control."
        )
