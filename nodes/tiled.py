"""The node for photos that are larger than the model's home size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from einops import rearrange
from torch import Tensor

from ..diff_restorer.maps import UNIT
from .chart import degradation_map
from .checks import checked
from .conditioning import check_degradation
from .host_models import DiffRestorer
from .host_tiled import Grid, LocalView, TiledDiffusion
from .images import common_batch, pad_to_multiple, split_alpha
from .sockets import CATEGORY, Degradation, DegradationSocket, found_by
from .sources import (
    clip_vision_input,
    clip_vision_of,
    photos_input,
    photos_of,
    restorer_input,
    restorer_of,
    share_input,
)


class DiffRestorerTiledDiffusion(io.ComfyNode):
    """Tiled Diffusion: large photos in tiles, each with its own P_S and P_D."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerTiledDiffusion",
            display_name="Tiled Diffusion",
            category=CATEGORY,
            **found_by("upscale", "large photo", "tiles", "multidiffusion"),
            description=(
                "Lets the sampler work on large photos in overlapping tiles, at the size that the "
                "model is at home with. Each tile is restored by what is seen in it and by how "
                "it is degraded: one corner may be noisy and another hazy. Works with any "
                "sampler, with CFG, LoRAs, areas and other ControlNets."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model."),
                restorer_input(),
                clip_vision_input(),
                photos_input("The degraded photos, the same as for Degradation Control."),
                io.Int.Input(
                    "tile_size",
                    default=512,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip=(
                        "Side of the tiles in pixels. Stable Diffusion 1.5 is at home at 512 to "
                        "768. A photo that fits into one tile is sampled as without this node."
                    ),
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip=(
                        "Overlap of the tiles in pixels, at most half a tile. More hides their "
                        "borders better and takes longer."
                    ),
                ),
                share_input(
                    "locality",
                    "How much each tile goes by its own content and degradation. 0 takes those of "
                    "the whole photo for all tiles.",
                ),
                DegradationSocket.Input(
                    "degradation",
                    optional=True,
                    tooltip=(
                        "From the Prompt Processor. Brings its file and its photos along. Where "
                        "Edit Degradation has changed it, tiles are changed alike."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The diffusion model, for the sampler."
                ),
                io.Image.Output(
                    display_name="map", tooltip="What each tile of the photo suffers from."
                ),
                DegradationSocket.Output(
                    display_name="degradation",
                    tooltip="With what each part suffers from, for Aware VAE Decode.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        tile_size: int,
        overlap: int,
        locality: float,
        diff_restorer: DiffRestorer | None = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
        degradation: Degradation | None = None,
    ) -> io.NodeOutput:
        check_tiles(tile_size, overlap)
        restorer, photos = restorer_of(diff_restorer, degradation), photos_of(image, degradation)
        vision = clip_vision_of(clip_vision, restorer)
        padded = pad_to_multiple(split_alpha(photos)[0], UNIT)
        height, width = (side // UNIT for side in padded.shape[1:3])
        grid = Grid((height, width), tile_size // UNIT, overlap // UNIT)
        whole = restorer.read(vision, photos)[1]
        edited = replace(degradation or whole, local=None, restorer=restorer, image=photos)
        check_degradation(edited, restorer)
        common_batch(image=len(padded), degradation=edited.batch)
        crops = torch.cat([window.of(padded.movedim(-1, 1), UNIT) for window in grid.windows])
        p_s, seen = restorer.read_tiles(vision, crops.movedim(1, -1).contiguous(), whole)

        def by_tile(rows: Tensor) -> Tensor:
            return rearrange(rows, "(tile photo) ... -> tile photo ...", photo=len(padded))

        read = by_tile(seen.pooled)
        pooled = edited.scale * read + edited.shift
        view = LocalView(by_tile(p_s), by_tile(seen.tokens) + (pooled - read).unsqueeze(2))
        if len(grid.windows) > 1 and locality > 0:
            local = grid.local(torch.lerp(edited.pooled.expand_as(pooled), pooled, locality))
            edited = replace(edited.repeated(pooled.shape[1]), local=local)
        maps = degradation_maps(padded, grid, by_tile(seen.probabilities), restorer.info.types)
        patched = TiledDiffusion(grid, view, locality).patched(model)
        return io.NodeOutput(patched, maps, edited, ui=ui.PreviewImage(maps, cls=cls))


def check_tiles(tile_size: int, overlap: int) -> None:
    """Raise a ValueError for tiles that cannot be, sides in pixels."""
    for name, side in (("tile_size", tile_size), ("overlap", overlap)):
        if side % UNIT:
            raise ValueError(f"{name}: {side} px, expected a multiple of {UNIT}.")
    if 2 * overlap > tile_size:
        raise ValueError(
            f"overlap: {overlap} px with tiles of {tile_size} px. Use at most half a tile."
        )


def degradation_maps(
    photos: Tensor, grid: Grid, probabilities: Tensor, types: Sequence[str]
) -> Tensor:
    """A map for each of the photos (B, H, W, 3), of probabilities (tiles, B, types)."""
    parts = [(UNIT * w.top, UNIT * w.left, UNIT * w.height, UNIT * w.width) for w in grid.windows]
    maps: list[Tensor] = []
    for photo, rows in zip(photos, probabilities.unbind(1), strict=True):
        best = [row.max(dim=0) for row in rows]
        seen = [(int(place), types[int(place)], float(value)) for value, place in best]
        maps.append(degradation_map(photo, parts, seen))
    return torch.stack(maps)
