"""Tiled Diffusion as a patch of the host's MODEL: every step in tiles, each with its own view."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import comfy.conds
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor

from ..diff_restorer import LocalPooled
from ..diff_restorer.maps import UNIT, Window
from .host import at_once, check_interrupt
from .host_control import DegradationControlNet, EncodedPhoto

KEY = "diff_restorer_tiles"
SEMANTIC_KEY = "diff_restorer_semantic"
"""Entry of a CONDITIONING that ends with P_S: the strength of it, and this end, (B, T, C)."""

Cond = dict[str, Any]
Conds = list[list[Cond] | None]


@dataclass(frozen=True)
class Grid:
    """Overlapping tiles of equal size; all lengths in latent pixels."""

    size: tuple[int, int]
    """(height, width) of the latent."""
    tile: int
    overlap: int

    @property
    def windows(self) -> list[Window]:
        """The tiles, row by row, evenly spread."""
        (tops, height), (lefts, width) = (self._spread(side) for side in self.size)
        return [Window(top, left, height, width) for top in tops for left in lefts]

    def _spread(self, side: int) -> tuple[list[int], int]:
        if side <= self.tile:
            return [0], side
        count = math.ceil((side - self.overlap) / (self.tile - self.overlap))
        last = side - self.tile
        return [round(last * place / (count - 1)) for place in range(count)], self.tile

    def weight(self, window: Window) -> Tensor:
        """(height, width): 1 in the middle, falling smoothly over the overlap on each side."""
        rows, columns = (_ramps(length, self.overlap) for length in (window.height, window.width))
        return rows[:, None] * columns

    def local(self, values: Tensor) -> LocalPooled:
        """Pooled P_D of the tiles, (tiles, B, C), each true of its tile's middle."""
        rows, columns = (self._shares(side) for side in self.size)
        tiles = rearrange(values, "(rows columns) b c -> b c rows columns", rows=len(rows))
        return LocalPooled(tiles.contiguous(), rows, columns)

    def _shares(self, side: int) -> Tensor:
        """How much each tile along a side counts at each place, (tiles, side).

        Linear from middle to middle: within the overlap alone, the decoder's tone would change so
        fast that a smooth sky shows it.
        """
        starts, length = self._spread(side)
        if len(starts) == 1:
            return torch.ones(1, side)
        middles = torch.tensor(starts) + (length - 1) / 2
        places = torch.arange(side)
        after = torch.searchsorted(middles, places.float()).clamp(1, len(starts) - 1)
        first, second = middles[after - 1], middles[after]
        share = ((places - first) / (second - first)).clamp(0, 1)
        shares = torch.zeros(len(starts), side)
        shares[after - 1, places], shares[after, places] = 1 - share, share
        return shares


def _ramps(length: int, overlap: int) -> Tensor:
    distance = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 1
    share = (distance / (min(overlap, length) + 1)).clamp(max=1)
    return torch.sin(share * math.pi / 2) ** 2


@dataclass(frozen=True)
class LocalView:
    """What the Prompt Processor reads from each tile of the photos."""

    semantic: Tensor
    """P_S, (tiles, B, T, C)."""
    degradation: Tensor
    """P_D, (tiles, B, T, C)."""


@dataclass(eq=False)
class TiledDiffusion:
    """Evaluates the model tile by tile and blends the results, in every step.

    It wraps the host's evaluation of all conditionings, so that samplers, CFG, LoRA and model
    patches know nothing of tiles. Tiles at the same time form a batch. Blending as in
    MultiDiffusion (arXiv 2302.08113) with smooth weights; P_S and P_D of each tile are ours.
    """

    grid: Grid
    view: LocalView | None
    locality: float
    """Weight of the tiles' own P_S and P_D against those of the whole photo, in [0, 1]."""
    _controls: dict[Any, Any] = field(default_factory=dict)
    _counts: dict[Any, int] = field(default_factory=dict)
    """How many tiles are evaluated at once, chosen once per run: the controls are made for them."""
    _own_tokens: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)
    """By the id of tokens: these, so that the id stays theirs, and whether they end with P_S."""
    _hints: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By the id of other controls' hints: these, and the same in the photo's size."""

    def __deepcopy__(self, memo: Any) -> TiledDiffusion:
        """Model options are copied with every clone of the model; tensors need not be."""
        return self

    def patched(self, model: Any) -> Any:
        """A clone of the MODEL that works in tiles."""
        model = model.clone()
        kinds = comfy.patcher_extension.WrappersMP
        model.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, self.outer_sample)
        model.add_wrapper_with_key(kinds.PREPARE_SAMPLING, KEY, self.prepare_sampling)
        model.add_wrapper_with_key(kinds.CALC_COND_BATCH, KEY, self.calc_cond_batch)
        return model

    def outer_sample(self, execute: Any, *args: Any, **kwargs: Any) -> Any:
        """One run of a sampler: the tiles' controls live as long as it does."""
        try:
            return execute(*args, **kwargs)
        finally:
            for control in self._controls.values():
                control.cleanup()
            self._controls.clear()
            self._counts.clear()
            self._own_tokens.clear()
            self._hints.clear()

    def prepare_sampling(
        self, execute: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> Any:
        """The host makes room for a tile; for the whole photo it might send the model away."""
        tile = self.grid.windows[0]
        shape = [*noise_shape[:-2], tile.height, tile.width]
        return execute(model, shape, *args, **kwargs)

    def calc_cond_batch(
        self, execute: Any, model: Any, conds: Conds, x: Tensor, timestep: Tensor, options: Any
    ) -> list[Tensor]:
        """The model's predictions for each list of conditionings, each like `x`."""
        size = cast(tuple[int, int], tuple(x.shape[-2:]))
        if size != self.grid.size:
            given, needed = (f"{UNIT * w} x {UNIT * h} px" for h, w in (size, self.grid.size))
            raise ValueError(
                f"latent_image: {given}, but Tiled Diffusion was given a photo of {needed} "
                "(padded to multiples of 8). Use the LATENT of Degradation Control for the same "
                "photo."
            )
        windows = self.grid.windows
        if len(windows) == 1:
            return execute(model, conds, x, timestep, options)
        totals = [torch.zeros_like(x) for _ in conds]
        weights = x.new_zeros(size)
        for some in self._groups(windows, conds, x, model):
            check_interrupt()
            parts = [self._cropped(cond, some, windows, len(x), model) for cond in conds]
            crops = torch.cat([windows[place].of(x, 1) for place in some])
            predictions = execute(model, parts, crops, timestep.repeat(len(some)), options)
            for index, place in enumerate(some):
                window = windows[place]
                weight = self.grid.weight(window).to(x)
                window.of(weights, 1).add_(weight)
                for total, result in zip(totals, predictions, strict=True):
                    window.of(total, 1).add_(result.chunk(len(some))[index] * weight)
        return [total / weights for total in totals]

    def _groups(
        self, windows: Sequence[Window], conds: Conds, x: Tensor, model: Any
    ) -> list[list[int]]:
        """Tiles for one evaluation each: as many as fit into memory, alone where areas differ."""
        entries = [entry for cond in conds for entry in cond or ()]
        if any("gligen" in entry for entry in entries):
            raise ValueError(
                "positive: GLIGEN places its boxes in the whole picture, which tiles do not see. "
                "Leave it out, or do without Tiled Diffusion."
            )
        alone = any(key in entry for entry in entries for key in ("area", "mask"))
        lists = max(1, sum(cond is not None for cond in conds))
        key = alone, lists, len(x)
        if key not in self._counts:
            count = 1
            if not alone:
                crop = windows[0].of(x, 1).shape
                needed = 1.5 * max(1, model.memory_required([lists * crop[0], *crop[1:]]))
                fit = at_once(needed, x.device, getattr(model, "current_patcher", None))
                count = max(1, min(len(windows), fit))
            self._counts[key] = math.ceil(len(windows) / math.ceil(len(windows) / count))
        count = self._counts[key]
        places = list(range(len(windows)))
        return [places[start : start + count] for start in range(0, len(places), count)]

    def _cropped(
        self,
        cond: list[Cond] | None,
        some: Sequence[int],
        windows: Sequence[Window],
        batch: int,
        model: Any,
    ) -> list[Cond] | None:
        if cond is None:
            return None
        cropped = []
        for entry in cond:
            part = entry.copy()
            chosen = [windows[place] for place in some]
            if "area" in part and not _crop_area(part, chosen[0]):
                continue
            if "mask" in part:
                part["mask"] = chosen[0].of(part["mask"], 1)
            part["model_conds"] = {
                name: self._model_cond(name, value, entry, some, chosen, batch)
                for name, value in entry["model_conds"].items()
            }
            if part.get("control") is not None:
                seen = [_part_of(part["area"], chosen[0])] if "area" in part else chosen
                part["control"] = self._control(part["control"], some, seen, batch, model)
            cropped.append(part)
        return cropped

    def _model_cond(
        self,
        name: str,
        value: Any,
        entry: Mapping[str, Any],
        some: Sequence[int],
        windows: Sequence[Window],
        batch: int,
    ) -> Any:
        tensor: Any = getattr(value, "cond", None)
        if isinstance(value, comfy.conds.CONDNoiseShape):
            whole = comfy.utils.repeat_to_batch_size(tensor, batch)
            return type(value)(torch.cat([window.of(whole, 1) for window in windows]))
        if name == "c_crossattn" and SEMANTIC_KEY in entry and self.view and self.locality:
            strength, semantic = entry[SEMANTIC_KEY]
            if id(tensor) not in self._own_tokens:
                self._own_tokens[id(tensor)] = tensor, _ends_with(tensor, semantic)
            if self._own_tokens[id(tensor)][1]:
                tokens = comfy.utils.repeat_to_batch_size(tensor, batch)
                return type(value)(self._with_local(tokens, strength, some))
        return value

    def _with_local(self, tokens: Tensor, strength: float, some: Sequence[int]) -> Tensor:
        """Tokens of each tile, (tiles * B, T, C): its own P_S in place of the photo's."""
        view = cast(LocalView, self.view)
        count, batch = view.semantic.shape[2], len(tokens)
        before, whole = tokens[:, :-count], tokens[:, -count:]
        rows = []
        for place in some:
            own = comfy.utils.repeat_to_batch_size(view.semantic[place].to(tokens), batch)
            mixed = torch.lerp(whole, strength * own, self.locality)
            rows.append(torch.cat([before, mixed], dim=1))
        return torch.cat(rows)

    def _control(
        self, control: Any, some: Sequence[int], windows: Sequence[Window], batch: int, model: Any
    ) -> Any:
        """The chain of controls for these tiles, made once per run."""
        key = id(control), tuple(some), tuple(windows), batch
        if key not in self._controls:
            to_sigma = model.model_sampling.percent_to_sigma
            made = self._controls[key] = self._tiles_of(control, some, windows, batch)
            made.pre_run(model, to_sigma)
            # Newer hosts have a copy of each control on each further GPU, and evaluate that there.
            further: dict[torch.device, Any] = {}
            for device, copy in getattr(control, "multigpu_clones", {}).items():
                there = self._controls[key, device] = self._tiles_of(copy, some, windows, batch)
                there.pre_run(_model_on(device, model), to_sigma)
                further[device] = there
            made.multigpu_clones = further
        return self._controls[key]

    def _tiles_of(
        self, control: Any, some: Sequence[int], windows: Sequence[Window], batch: int
    ) -> Any:
        tiles = control.copy()
        height, width = (UNIT * side for side in self.grid.size)

        def crops(hint: Tensor) -> Tensor:
            if hint.shape[-2:] != (height, width):
                if id(hint) not in self._hints:
                    self._hints[id(hint)] = (
                        hint,
                        comfy.utils.common_upscale(
                            hint, width, height, control.upscale_algorithm, "center"
                        ),
                    )
                hint = self._hints[id(hint)][1]
            whole = comfy.utils.repeat_to_batch_size(hint, batch)
            return torch.cat([window.of(whole, UNIT) for window in windows])

        tiles.cond_hint_original = crops(control.cond_hint_original)
        tiles.extra_concat_orig = [crops(hint) for hint in control.extra_concat_orig]
        if isinstance(control, DegradationControlNet):
            control.check_batch(batch)
            if isinstance(control.vae, EncodedPhoto):
                latent = comfy.utils.repeat_to_batch_size(control.vae.latent, batch)
                if latent.shape[-2:] == self.grid.size:
                    known = torch.cat([window.of(latent, 1) for window in windows])
                    pixels = tiles.cond_hint_original.movedim(1, -1)
                    tiles.vae = EncodedPhoto(control.vae, pixels, known)
            tiles.set_extra_arg("degradation", self._degradation(control, some, batch))
        if control.previous_controlnet is not None:
            previous = self._tiles_of(control.previous_controlnet, some, windows, batch)
            tiles.set_previous_controlnet(previous)
        return tiles

    def _degradation(
        self, control: DegradationControlNet, some: Sequence[int], batch: int
    ) -> Tensor:
        whole = comfy.utils.repeat_to_batch_size(control.extra_args["degradation"], batch)
        if not self.view or not self.locality:
            return torch.cat([whole] * len(some))
        own = (
            comfy.utils.repeat_to_batch_size(self.view.degradation[place].to(whole), batch)
            for place in some
        )
        return torch.cat([torch.lerp(whole, tokens, self.locality) for tokens in own])


def _model_on(device: torch.device, model: Any) -> Any:
    """The copy of the model on a further GPU, as newer hosts have it."""
    copies = model.current_patcher.get_additional_models_with_key("multigpu")
    return next((patcher.model for patcher in copies if patcher.load_device == device), model)


def _ends_with(tokens: Tensor, semantic: Tensor) -> bool:
    """Whether P_S is still there: other nodes may have zeroed, averaged or followed it."""
    end = tokens[:, -semantic.shape[1] :]
    return end.shape == semantic.shape and torch.equal(end, semantic.to(end))


def _part_of(area: tuple[int, int, int, int], window: Window) -> Window:
    """Where an area of a tile lies in the picture."""
    height, width, top, left = area
    return Window(window.top + top, window.left + left, height, width)


def _crop_area(part: Cond, window: Window) -> bool:
    """Cut the area (height, width, top, left) of a conditioning to a tile; whether any is left."""
    height, width, top, left = part["area"]
    first = max(top, window.top), max(left, window.left)
    end = (
        min(top + height, window.top + window.height),
        min(left + width, window.left + window.width),
    )
    if end[0] <= first[0] or end[1] <= first[1]:
        return False
    part["area"] = (
        end[0] - first[0], end[1] - first[1], first[0] - window.top, first[1] - window.left
    )  # fmt: skip
    return True
