"""The node for photos that are larger than the model's home size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from .chart import degradation_map
from .checks import checked
from .conditioning import check_degradation
from .host_models import DiffRestorer
from .host_tiled import Grid, LocalView, TiledDiffusion
from .host_vae import SCALE
from .images import common_batch, pad_to_multiple, split_alpha
from .sockets import CATEGORY, Degradation, DegradationSocket, DiffRestorerSocket, found_by
from .sources import COMPLETE, OVERRIDE, clip_vision_of, photos_of, restorer_of


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
                DiffRestorerSocket.Input(
                    "diff_restorer", optional=True, tooltip=OVERRIDE + "From Load Diff-Restorer."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip=COMPLETE + "Else the vision model that the file was trained with.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        OVERRIDE + "The degraded photos, the same as for Degradation Control."
                    ),
                ),
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
                io.Float.Input(
                    "locality",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How much each tile goes by its own content and degradation. 0 takes those "
                        "of the whole photo for all tiles."
                    ),
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
        if tile_size % SCALE or overlap % SCALE:
            raise ValueError(
                f"tile_size: {tile_size} px with overlap {overlap} px. Both must be multiples of "
                f"{SCALE}."
            )
        if 2 * overlap > tile_size:
            raise ValueError(
                f"overlap: {overlap} px with tiles of {tile_size} px. Use at most half a tile."
            )
        restorer, photos = restorer_of(diff_restorer, degradation), photos_of(image, degradation)
        vision = clip_vision_of(clip_vision, restorer)
        rgb, _ = split_alpha(photos)
        padded = pad_to_multiple(rgb, SCALE)
        height, width = (side // SCALE for side in padded.shape[1:3])
        grid = Grid((height, width), tile_size // SCALE, overlap // SCALE)
        parts = [
            (SCALE * w.top, SCALE * w.left, SCALE * w.height, SCALE * w.width) for w in grid.windows
        ]
        crops = torch.cat([
            padded[:, top : top + high, left : left + wide] for top, left, high, wide in parts
        ])  # fmt: skip
        whole = restorer.read(vision, photos)[1]
        edited = replace(degradation or whole, local=None, restorer=restorer, image=photos)
        check_degradation(edited, restorer)
        common_batch(image=len(rgb), degradation=edited.batch)
        change = edited.pooled - whole.pooled
        p_s, read = restorer.read_tiles(vision, crops, whole)

        def by_tile(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (len(parts), len(padded)))

        view = LocalView(by_tile(p_s), by_tile(read.tokens) + change[:, None])
        seen = by_tile(read.probabilities)
        if len(parts) > 1 and locality > 0:
            pooled = by_tile(read.pooled) + change
            local = grid.local(torch.lerp(edited.pooled.expand_as(pooled), pooled, locality))
            edited = replace(edited.repeated(pooled.shape[1]), local=local)
        types = restorer.info.types
        maps = []
        for index, photo in enumerate(padded):
            best = [row.max(dim=0) for row in seen[:, index]]
            found = [(int(i), types[int(i)], float(value)) for value, i in best]
            maps.append(degradation_map(photo, parts, found))
        pictures = torch.stack(maps)
        patched = TiledDiffusion(grid, view, locality).patched(model)
        return io.NodeOutput(patched, pictures, edited, ui=ui.PreviewImage(pictures, cls=cls))
