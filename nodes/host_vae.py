"""What encode and decode do alike with the host's VAE: checks, memory, tiles, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..diff_restorer import VaeTrunk
from ..diff_restorer.maps import UNIT, Cut
from ..diff_restorer.tiles import Plan
from .host import check_interrupt, is_oom, map_folder
from .host_models import DiffRestorer

Result = TypeVar("Result")
AUTO_TILE, LEAST_TILE = 512, 128
"""Side of a tile in pixels, where tiles are needed and the user has not said which, and the side
below which a lack of memory is not answered by smaller tiles."""


def check_vae(vae: Any, restorer: DiffRestorer) -> None:
    """Raises ValueError for VAEs whose latents are of another kind: channels, scale or
    architecture."""
    vae.throw_exception_if_invalid()
    needed = restorer.control.network.latent_channels
    channels, scale = vae.latent_channels, vae.spacial_compression_encode()
    if (channels, scale) != (needed, UNIT):
        raise ValueError(
            f"vae: its latents have {channels} channels at 1/{scale} size, needed are {needed} at "
            f"1/{UNIT}. VAEs of SD 3, Flux and video models do not fit: connect the VAE of your "
            "Stable Diffusion 1.5 checkpoint, or of Nano for Nano."
        )
    tiny = hasattr(vae.first_stage_model, "taesd_decoder")
    if restorer.has_tiny_vae not in (None, tiny):
        raise ValueError(
            f"vae: found {'a TAESD' if tiny else 'an AutoencoderKL'}, but {restorer.path.name} was "
            f"trained with {'an AutoencoderKL' if tiny else 'a TAESD (Nano)'}. Connect the VAE "
            "that the file was trained for: that of your SD 1.5 checkpoint, or Nano's for Nano."
        )


def load(vae: Any, others: Sequence[Any], needed: float, in_a_tile: float) -> None:
    """Bring a VAE and other models to the device, which then has the memory to work.

    Of a picture that the device could never hold whole, a tile's: for more, the host would leave
    the weights themselves behind.
    """
    total = cast(int, comfy.model_management.get_total_memory(vae.device))
    required = int(needed if needed <= total else in_a_tile)
    comfy.model_management.load_models_gpu(
        [vae.patcher, *others], memory_required=required, force_full_load=vae.disable_offload
    )


def try_whole(count: int, work: Callable[[int], Result], node: str) -> Result | None:
    """Do the work on whole pictures, `count` at once; None where memory is too small for one."""
    if not count:
        logging.info("%s: the picture is too large at once, using tiles.", node)
        return None
    try:
        return work(count)
    except Exception as error:
        if not is_oom(error):
            raise
    # Out of `except`: the exception keeps tensors alive as long as it is handled.
    logging.warning("%s: out of memory, trying again in tiles.", node)
    return None


def in_smaller_tiles(side: int, work: Callable[[int], Result], done: str) -> Result:
    """Do the work in tiles of `side` pixels, or of less where memory is too small for that."""
    while True:
        try:
            result = work(side)
            logging.info("%s tiles of %d px.", done, side)
            return result
        except Exception as error:
            side //= 2
            if side < LEAST_TILE or not is_oom(error):
                raise
            node = done.split(":")[0]
            logging.warning("%s: out of memory, trying tiles of %d px.", node, side)


def cut(vae: Any, trunk: VaeTrunk, pixels: Tensor, tile: int, report: Report) -> Cut:
    """How one of the pictures is cut; its maps go to the disk where memory is small."""
    like = torch.empty(0, device=vae.device, dtype=vae.vae_dtype)
    folder = map_folder(2 * like.dtype.itemsize * trunk.channels[0] * pixels[0, 0].numel())
    return Cut(max(1, tile // UNIT), like, folder, report.tile)


class Report:
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
