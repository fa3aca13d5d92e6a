"""The decode in tiles equals that of the whole picture."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from diff_restorer import (
    DetailConfig,
    DetailPath,
    FusionBlocks,
    FusionConfig,
    LocalPooled,
    VaeTrunk,
    aware_decode,
    encode_with_features,
    encoder_features,
    photo_statistics,
)
from diff_restorer.maps import Cut, Map, Window
from diff_restorer.tiled_vae import plan_decode, plan_encode, plan_features
from diff_restorer.tiles import HiddenNormError, Plan, Stage
from tests.photos import photo
from training.networks import Sizes, build_vae

KINDS = {"kl": Sizes(vae_channels=(32, 32, 64, 64), vae_layers=2), "tiny": Sizes(vae_channels=())}


def levels(error: Tensor, image: Tensor) -> Tensor:
    """Errors in levels of 255, as if the image of random weights had a photo's contrast."""
    return 60 * error.abs() / image.std()


def fusion_blocks(channels: tuple[int, ...]) -> FusionBlocks:
    pairs = tuple((level, channels[level]) for level in (1, 2, 3))
    return FusionBlocks(FusionConfig(pairs, 4, 2, 16, (channels[0], 8)))


def detail_path(channels: tuple[int, ...]) -> DetailPath:
    _, first, second, third = channels
    return DetailPath(DetailConfig((8, 12, 16), (1, 1, 2, 1, 1), (first, second, third), 16))


EXTENSIONS = {"fusion": fusion_blocks, "detail": detail_path}


class Decoder:
    """A small aware decoder with random weights, and a photo."""

    def __init__(self, kind: str, height: int, width: int, extension: str = "fusion") -> None:
        torch.manual_seed(0)
        vae = build_vae(KINDS[kind]).eval().requires_grad_(False)
        self.trunk = VaeTrunk.of(vae)
        self.extension = EXTENSIONS[extension](self.trunk.channels).requires_grad_(False)
        for parameter in self.extension.parameters():
            nn.init.normal_(parameter, std=0.05)
        self.photo = (2 * photo("chelsea") - 1)[..., :height, :width].contiguous()
        self.pooled: Tensor | LocalPooled = torch.randn(1, 16)
        channels = self.trunk.latent_channels
        self.latent = torch.randn(1, channels, height // 8, width // 8)

    @property
    def condition(self) -> Tensor | LocalPooled:
        return self.extension.condition(self.pooled, photo_statistics((self.photo + 1) / 2))

    def whole(self, fidelity: float) -> Tensor:
        features = encoder_features(self.trunk, self.photo, self.extension.levels)
        return aware_decode(
            self.trunk, self.extension, self.latent, features, self.condition, fidelity
        )

    def tiled(self, cut: Cut, fidelity: float) -> Tensor:
        features = dict(enumerate(plan_features(self.trunk, self.photo, (1, 2, 3), cut).run()))
        plan = plan_decode(
            self.trunk, self.extension, self.latent, self.photo, features, self.condition, fidelity,
            cut,
        )  # fmt: skip
        image = plan.result().whole().float()
        return image + fidelity * self.photo if isinstance(self.extension, DetailPath) else image


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("fidelity", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(128, 192, 8), (136, 200, 7), (8, 400, 16), (264, 16, 5), (64, 64, 64), (72, 72, 1)],
)
def test_tiles_equal_the_whole(
    kind: str, extension: str, fidelity: float, height: int, width: int, tile: int
) -> None:
    """In fp32 as near as this, so that a margin which is too small by one cannot hide."""
    decoder = Decoder(kind, height, width, extension)
    found = decoder.tiled(Cut(tile, decoder.photo), fidelity)
    expected = decoder.whole(fidelity)
    assert found.shape == expected.shape
    assert levels(found - expected, expected).max() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width", "tile"), [(136, 200, 7), (8, 400, 16), (64, 64, 64)])
def test_the_encode_in_tiles_equals_the_whole(
    kind: str, height: int, width: int, tile: int
) -> None:
    decoder = Decoder(kind, height, width)
    cut = Cut(tile, decoder.photo)
    found = [each.whole().float() for each in plan_encode(decoder.trunk, decoder.photo, cut).run()]
    moments, features = encode_with_features(decoder.trunk, decoder.photo, (0, 1, 2, 3))
    expected = [*(features[level] for level in range(4)), moments]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.02 * other.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_tiles_know_the_degradation_of_their_place(kind: str, extension: str) -> None:
    """With P_D of each place, tiles equal the whole; and with the same everywhere, that of one."""
    decoder = Decoder(kind, 128, 192, extension)
    one = decoder.whole(1.0)
    columns = torch.linspace(-2, 3, 24).clamp(0, 1)
    columns = torch.stack([1 - columns, columns])
    assert isinstance(decoder.pooled, Tensor)
    tiles = decoder.pooled[:, :, None, None].expand(-1, -1, 1, 2).clone()
    decoder.pooled = LocalPooled(tiles, torch.ones(1, 16), columns)
    torch.testing.assert_close(decoder.whole(1.0), one, rtol=1e-4, atol=1e-4)
    tiles[..., 1] *= -1
    expected = decoder.whole(1.0)
    change = levels(expected - one, one)
    assert change[..., 150:].mean() > 3 * change[..., :40].mean()
    assert levels(decoder.tiled(Cut(7, decoder.photo), 1.0) - expected, expected).max() < 0.02


@torch.no_grad()
def test_norms_that_see_their_tile_alone_would_be_told_apart() -> None:
    decoder = Decoder("kl", 128, 192)
    expected = decoder.whole(0.0)
    alone = decoder.trunk.decoder_stem(decoder.latent)
    for step in decoder.trunk.decoder_mid:
        alone = step(alone)
    for index in (3, 2, 1, 0):
        level = decoder.trunk.decoder_levels[index]
        for block in level.blocks:
            alone = torch.cat([block(half) for half in alone.chunk(2, dim=-1)], dim=-1)
        alone = level.resample(alone) if level.resample else alone
    assert levels(decoder.trunk.decoder_head(alone) - expected, expected).max() > 4


class FusedNorm(torch.nn.GroupNorm):
    """As a host to come might have it: the same sums, by a function that nobody sees."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        grouped = value.unflatten(1, (self.num_groups, -1))
        spread, mean = torch.std_mean(grouped, dim=(2, 3, 4), keepdim=True)
        return ((grouped - mean) / spread).flatten(1, 2)


@torch.no_grad()
def test_norms_out_of_reach_are_refused() -> None:
    norm = FusedNorm(2, 4)
    with pytest.raises(HiddenNormError, match="found FusedNorm, which does not norm by torch's"):
        Plan([[Stage(norm)]], Map(torch.zeros(1, 4, 2, 4), 1), Cut(1, torch.zeros(1)))


@torch.no_grad()
def test_maps_in_a_file_hold_the_same(tmp_path: Path) -> None:
    """But for fp32, of which a file keeps 16 bits."""
    decoder = Decoder("kl", 64, 96)
    error = decoder.tiled(Cut(5, decoder.photo, tmp_path), 1.0) - decoder.whole(1.0)
    assert levels(error, decoder.whole(1.0)).mean() < 0.5
    torch.manual_seed(0)
    half = VaeTrunk.of(build_vae(KINDS["tiny"]).eval().requires_grad_(False).bfloat16())
    cuts = [Cut(5, decoder.photo.bfloat16(), folder) for folder in (tmp_path, None)]
    in_file, in_memory = (plan_encode(half, decoder.photo, cut).run() for cut in cuts)
    for one, other in zip(in_file, in_memory, strict=True):
        assert torch.equal(one.whole(), other.whole())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match=r"need 0\.1 GB of disk in .*No space left") as caught:
        Map.empty(100, 8, (64, 64), torch.float32, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)


def test_what_fp16_cannot_hold_stays_finite() -> None:
    made = Map.empty(1, 1, (1, 3), torch.float16, None)
    made.write(Window(0, 0, 1, 3), made.kept(torch.tensor([[[[1e6, 2.0, -1e6]]]])))
    assert made.whole().flatten().tolist() == [65504, 2, -65504]


@torch.no_grad()
def test_the_number_of_visits_is_known_before() -> None:
    decoder, count = Decoder("kl", 64, 96), mock.Mock()
    plan = plan_features(decoder.trunk, decoder.photo, (0, 2), Cut(3, decoder.photo, None, count))
    visits = plan.visits
    assert len(list(plan.run())) == 3
    # Three tiles by four; each of the three levels has two blocks with two norms.
    assert visits == count.call_count == 12 * 3 * 2 * 3
    assert plan.visits == 0


@torch.no_grad()
def test_a_plan_keeps_no_more_maps_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks write their output over their input, and nothing outlives its last reader."""
    decoder, alive, most = Decoder("kl", 64, 96), weakref.WeakSet[Map](), [0]
    cut = Cut(3, decoder.photo)
    features = dict(enumerate(plan_features(decoder.trunk, decoder.photo, (1, 2, 3), cut).run()))
    read = weakref.WeakSet(features.values())
    plan = plan_decode(
        decoder.trunk, decoder.extension, decoder.latent, decoder.photo, features,
        decoder.condition, 1.0, cut,
    )  # fmt: skip
    del features
    make = Map.empty

    def empty(*args: Any) -> Map:
        made = make(*args)
        alive.add(made)
        most[0] = max(most[0], sum(each.whole().numel() for each in alive))
        return made

    monkeypatch.setattr(Map, "empty", empty)
    plan.result()
    assert not read
    first, second = decoder.trunk.channels[:2]
    assert most[0] == first * 64 * 96 + second * 32 * 48


@torch.no_grad()
def test_an_exception_from_the_caller_stops_the_plan() -> None:
    decoder, stop = Decoder("tiny", 64, 64), mock.Mock(side_effect=KeyboardInterrupt)
    plan = plan_features(decoder.trunk, decoder.photo, (1,), Cut(4, decoder.photo, None, stop))
    with pytest.raises(KeyboardInterrupt):
        list(plan.run())


@torch.no_grad()
def test_no_norm_uses_memory_of_tiles_alone() -> None:
    """No tensor of a stage is larger than a tile with its margin."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    stage = mock.Mock(wraps=conv)
    value = Map(torch.randn(1, 4, 64, 512), 8)
    plan = Plan([[Stage(stage), Stage(stage)]], value, Cut(4, value.whole()))
    (found,) = plan.run()
    torch.testing.assert_close(
        found.whole().float(), conv(conv(value.whole())), atol=2e-3, rtol=2e-3
    )
    assert max(call.args[0].numel() for call in stage.call_args_list) <= 4 * (8 * (4 + 2)) ** 2


def test_windows_cover_the_picture_once() -> None:
    for height, width, tile in ((7, 9, 4), (1, 50, 8), (3, 3, 10)):
        seen = torch.zeros(height, width)
        for window in Cut(tile, seen).windows((height, width)):
            assert max(window.height, window.width) <= tile
            window.of(seen, 1).add_(1)
        assert bool((seen == 1).all())


def test_a_window_grows_within_the_picture() -> None:
    window = Window(0, 4, 3, 3).grown(2, 10, 8)
    assert window == Window(0, 2, 5, 6)
    assert Window(0, 4, 3, 3).inside(window) == Window(0, 2, 3, 3)
