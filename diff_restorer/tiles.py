"""Networks with group norms, tile by tile, with the result of the whole picture.

A network is cut into stages of few layers. Each stage runs tile by tile, and its output, a `Map`,
is kept outside of the device's memory, or in a file; where it can, it overwrites the stage's input.
Tiles see as much of their surroundings as the convolutions of the stage reach. A group norm needs
the mean and variance of the whole picture: until they are known, the tiles run up to that norm and
no further, and then start again.

The tiled VAE of https://github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111 likewise
stops at every norm, but estimates its statistics from a small picture or keeps all tiles waiting
in memory, and does not show its networks the true surroundings of a tile at the norms. Estimates
are not good enough: with those of a quarter of a picture we measured errors of up to 14 levels.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .maps import Cut, Map, Window

Function = Callable[..., Tensor]
"""(crops of maps, each (1, C, h, w)) -> crop of the result, at its own resolution. It consists of
convolutions with zero padding or after `pad`, means of the pixels around (`avg_pool2d`), group
norms, what works on each pixel alone, and resizing by powers of two."""


@dataclass(frozen=True)
class Output:
    """The map after a level of the same plan, for a later level."""

    level: int
    """Counted from 0."""


@dataclass(frozen=True)
class Stage:
    """A part of a network: a function of the map before it, and of others."""

    function: Function
    others: tuple[Map | Output, ...] = ()
    summary: Function | None = None
    """Runs first on the map before; all of its output is the last argument of `function`."""


@dataclass(frozen=True)
class _Planned:
    """A stage, and what a run on one unit of nothing told of it."""

    stage: Stage
    output: Tensor
    margin: int
    """How many units its convolutions look around."""
    norms: int
    """Number of group norms: it visits each tile once, and once more for each of them."""
    summary: _Planned | None = None

    @property
    def turns(self) -> int:
        """How often it visits each tile, its summary included."""
        return 1 + self.norms + (self.summary.turns if self.summary else 0)


class Plan:
    """A network of several levels, ready to run on a picture, once.

    It lets go of each map as soon as no stage reads it any more; within a level, maps are
    overwritten. A picture's memory then is that of its largest map and a row of tiles, and of the
    maps that wait for a later level.
    """

    def __init__(self, levels: Sequence[Sequence[Stage]], value: Map, cut: Cut) -> None:
        """Looks at the network.

        Args:
            levels: Its stages, in groups; those of a group run at once where there is no norm, for
                wider margins cost less than maps between the stages.
            value: The map that enters the first stage.
            cut: The tiles.
        """
        self._value, self._cut = value, cut
        self._levels: deque[list[_Planned]] = deque()
        self._outputs: list[Map | None] = []
        self._last_use: dict[int, int] = {}
        blank, blanks = value.blank(cut.like), list[Tensor]()
        for number, stages in enumerate(levels):
            planned = _look(stages, blank, blanks)
            if len(stages) > 1 and not any(p.norms for p in planned):
                planned = _look([_joined(stages)], blank, blanks)
            blank = planned[-1].output
            blanks.append(blank)
            self._levels.append(planned)
            others = (other for stage in stages for other in stage.others)
            read = (other.level for other in others if isinstance(other, Output))
            self._last_use |= dict.fromkeys(read, number)

    @property
    def visits(self) -> int:
        """How often `cut.on_tile` will be called from here on."""
        turns = sum(planned.turns for level in self._levels for planned in level)
        return turns * len(self._cut.windows(self._value.size))

    def run(self) -> Iterator[Map]:
        """The map after each level."""
        while self._levels:
            self._advance()
            yield self._value

    def result(self) -> Map:
        """The map after the last level."""
        while self._levels:
            self._advance()
        return self._value

    def _advance(self) -> None:
        number = len(self._outputs)
        for place, planned in enumerate(self._levels.popleft()):
            others = [self._other(other) for other in planned.stage.others]
            # The map that enters a level may be of use to others.
            self._value = _run(planned, self._value, others, self._cut, overwrite=place > 0)
        self._outputs.append(self._value if number in self._last_use else None)
        for level, last in self._last_use.items():
            if last == number:
                self._outputs[level] = None

    def _other(self, other: Map | Output) -> Map:
        source = self._outputs[other.level] if isinstance(other, Output) else other
        assert source is not None
        return source


def _look(stages: Sequence[Stage], blank: Tensor, outputs: Sequence[Tensor]) -> list[_Planned]:
    """Try stages on one unit of nothing, given what the levels before them made of it."""

    def of(other: Map | Output, like: Tensor) -> Tensor:
        return outputs[other.level] if isinstance(other, Output) else other.blank(like)

    planned: list[_Planned] = []
    for stage in stages:
        inputs, summary = [blank, *(of(other, blank) for other in stage.others)], None
        if stage.summary is not None:
            (summary,) = _look([Stage(stage.summary)], blank, ())
            inputs.append(summary.output)
        with _Counting() as seen, _counting_norm_modules() as modules:
            blank = stage.function(*inputs)
        if len(modules) > seen.norms:
            raise HiddenNormError(
                f"found {modules[-1]}, which does not norm by torch's group_norm: tiles cannot "
                "give it the statistics of the whole picture"
            )
        planned.append(_Planned(stage, blank, math.ceil(seen.reach), seen.norms, summary))
    return planned


@contextmanager
def _counting_norm_modules() -> Generator[list[str], None, None]:
    """Classes of the group norms that run meanwhile in this thread, whatever they compute by."""
    names, thread = list[str](), threading.get_ident()

    def note(module: nn.Module, inputs: Any) -> None:
        name = type(module).__name__
        is_norm = isinstance(module, nn.GroupNorm) or "groupnorm" in name.lower()
        if is_norm and threading.get_ident() == thread:
            names.append(name)

    hook = register_module_forward_pre_hook(note)
    try:
        yield names
    finally:
        hook.remove()


def _joined(stages: Sequence[Stage]) -> Stage:
    def function(value: Tensor, *others: Tensor) -> Tensor:
        left = iter(others)
        for stage in stages:
            value = stage.function(value, *itertools.islice(left, len(stage.others)))
        return value

    return Stage(function, tuple(other for stage in stages for other in stage.others))


def _run(
    planned: _Planned, value: Map, others: Sequence[Map], cut: Cut, overwrite: bool = False
) -> Map:
    """The stage on all tiles; its output lies in `value` itself where it may and fits."""
    inputs, size = (value, *others), value.size
    channels, scale = planned.output.shape[1], planned.output.shape[-1]
    summary: list[Tensor] = []
    if planned.summary is not None:
        summary.append(_run(planned.summary, value, (), cut).whole().to(cut.like))
    windows = cut.windows(size)
    if overwrite and (channels, scale) == (value.channels, value.scale):
        out, behind = value, _last_reader(windows, planned.margin)
    else:
        out, behind = Map.empty(channels, scale, size, cut.dtype, cut.folder), 0
    known: list[tuple[Tensor, Tensor]] = []
    while True:
        sums: list[_Sums] = []
        waiting: deque[tuple[Window, Tensor]] = deque()
        for window in windows:
            cut.on_tile()
            around = window.grown(planned.margin, *size)
            crops = [source.read(around, cut.like) for source in inputs]
            with _WholeNorms(known, window.inside(around), around) as norms:
                try:
                    result = planned.stage.function(*crops, *summary)
                except _NormReachedError:
                    sums.append(norms.sums)
                    continue
            waiting.append((window, out.kept(window.inside(around).of(result, scale))))
            if len(waiting) > behind:
                out.write(*waiting.popleft())
        for window, part in waiting:
            out.write(window, part)
        if not sums:
            return out
        known.append(_merged(sums))


def _last_reader(windows: Sequence[Window], margin: int) -> int:
    """How many tiles after a tile the last one comes that looks into it."""
    columns = sum(window.top == 0 for window in windows)
    reach = math.ceil(margin / min(min(window.height, window.width) for window in windows))
    return reach * (columns + 1)


class HiddenNormError(ValueError):
    """Norms that tiles cannot reach, such as fused ones of a host to come."""


class _Counting(TorchFunctionMode):
    """Counts group norms, and how far the convolutions reach on one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.reach, self.norms = 0.0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            pixels, weight = args[:2]
            self.reach += weight.shape[-1] // 2 / pixels.shape[-1]
        elif func is F.conv_transpose2d:
            pixels, weight = args[:2]
            stride = kwargs["stride"] if "stride" in kwargs else args[3]
            step = stride if isinstance(stride, int) else stride[0]
            self.reach += (weight.shape[-1] - step) / 2 / step / pixels.shape[-1]
        elif func is F.pad:
            self.reach += args[1][0] / args[0].shape[-1]
        elif func is F.avg_pool2d:
            self.reach += kwargs.get("padding", 0) / args[0].shape[-1]
        elif func is F.interpolate and kwargs.get("mode") == "bilinear":
            self.reach += 1 / args[0].shape[-1]
        self.norms += func is F.group_norm
        return func(*args, **kwargs)


class _NormReachedError(Exception):
    """A tile has come to a group norm whose statistics are not known yet."""


@dataclass(frozen=True)
class _Sums:
    """Count, mean and sum of squared deviations per group, (groups,) in fp64."""

    count: int
    mean: Tensor
    squares: Tensor


class _WholeNorms(TorchFunctionMode):
    """Group norms with the statistics of the whole picture, in the order in which they come."""

    def __init__(
        self, known: Sequence[tuple[Tensor, Tensor]], inner: Window, around: Window
    ) -> None:
        super().__init__()
        self._known = iter(known)
        self._inner, self._around = inner, around
        self.sums: Any = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return self._norm(*args, **kwargs) if func is F.group_norm else func(*args, **kwargs)

    def _norm(
        self,
        value: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        moments = next(self._known, None)
        if moments is None:
            self.sums = _sums(
                self._inner.of(value, value.shape[-1] // self._around.width), num_groups
            )
            raise _NormReachedError
        mean, variance = (moment.float().to(value.device) for moment in moments)
        scale = torch.rsqrt(variance + eps)
        shift = -mean * scale
        width = value.shape[1] // num_groups
        scale, shift = scale.repeat_interleave(width), shift.repeat_interleave(width)
        if weight is not None:
            scale, shift = scale * weight.float(), shift * weight.float()
        if bias is not None:
            shift = shift + bias.float()
        # In fp32, as torch's own: rounded factors would tint the picture a little at every norm.
        normed = torch.addcmul(shift[:, None, None], value.float(), scale[:, None, None])
        return normed.to(value.dtype)


def _sums(value: Tensor, groups: int) -> _Sums:
    pixels = value[0].float().reshape(groups, -1)
    variance, mean = torch.var_mean(pixels, dim=1, correction=0)
    count = pixels.shape[1]
    # On the CPU first: Apple's GPUs have no fp64.
    return _Sums(count, mean.cpu().double(), variance.cpu().double() * count)


def _merged(sums: Sequence[_Sums]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all; by deviations, because squares would cancel."""
    counts = torch.tensor([part.count for part in sums], dtype=torch.float64)[:, None]
    means = torch.stack([part.mean for part in sums])
    mean = (counts * means).sum(dim=0) / counts.sum()
    within = torch.stack([part.squares for part in sums]).sum(dim=0)
    between = (counts * (means - mean).square()).sum(dim=0)
    return mean, (within + between) / counts.sum()
