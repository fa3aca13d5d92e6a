"""What is measured of photos, and taken from them: noise, JPEG's steps, another tone, haze."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diff_restorer import local_statistics, photo_statistics
from diff_restorer.local import LocalPooled
from diff_restorer.photo_statistics import NOISE_LEVELS
from diff_restorer.shrinkage import THRESHOLDS, opponent, shrink
from diff_restorer.tone import guided_tone, no_change, stretched, with_tone
from tests.photos import photo


def astronaut(side: int = 128) -> Tensor:
    """(1, 3, side, side) in [0, 1]."""
    return photo("astronaut")[..., :side, 150 : 150 + side].contiguous()


def noisy(photo: Tensor, sigma: float) -> Tensor:
    return photo + sigma * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))


def psnr(image: Tensor, reference: Tensor) -> float:
    return float(-10 * (image - reference).square().mean().log10())


def same(limit: float) -> Tensor:
    return torch.full((1, THRESHOLDS, 1, 1), limit)


def test_colours_turn_back() -> None:
    photo = astronaut()
    torch.testing.assert_close(opponent(opponent(photo), inverse=True), photo)
    assert torch.allclose(opponent(photo).square().sum(), photo.square().sum())


@pytest.mark.parametrize("sigma", [0.06, 0.1, 0.2])
def test_noise_is_measured_and_taken_away(sigma: float) -> None:
    clean = astronaut()
    photo = noisy(clean, sigma)
    levels = photo_statistics(photo.clamp(0, 1))[:, -NOISE_LEVELS:]
    assert levels.mean() == pytest.approx(sigma, rel=0.25)
    assert psnr(shrink(photo, same(2.8 * sigma)), clean) > psnr(photo, clean) + 5


def test_without_thresholds_a_photo_stays() -> None:
    photo = astronaut()
    assert torch.equal(shrink(photo, same(0.0)), photo)


def test_beyond_all_thresholds_the_brightness_stays() -> None:
    photo = astronaut()
    smooth = shrink(photo, same(100.0))
    assert smooth.std() < photo.std()
    assert smooth.mean() == pytest.approx(float(photo.mean()), abs=0.01)


def test_thresholds_go_by_the_place() -> None:
    photo = noisy(astronaut(), 0.1)
    limits = torch.zeros(1, THRESHOLDS, 64, 64)
    limits[..., 32:] = 0.3
    smooth = shrink(photo, limits)
    assert torch.equal(smooth[..., :56], photo[..., :56])
    torch.testing.assert_close(smooth[..., 72:], shrink(photo, same(0.3))[..., 72:])


def test_thresholds_learn() -> None:
    """Gradients find more noise to be taken away than a threshold that is too low does."""
    clean = astronaut()
    limits = same(0.15).requires_grad_()
    (shrink(noisy(clean, 0.1), limits) - clean).square().mean().backward()
    assert limits.grad is not None
    assert limits.grad.isfinite().all()
    assert limits.grad.sum() < 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_photos_have_finite_gradients(value: float) -> None:
    limits = same(0.0).requires_grad_()
    shrink(torch.full((1, 3, 16, 24), value), limits).square().sum().backward()
    assert limits.grad is not None
    assert limits.grad.isfinite().all()


def test_a_dark_photo_gets_the_tone_it_should_have_had() -> None:
    clean = 2 * astronaut() - 1
    dark = 0.25 * (clean + 1) - 1
    wanted = torch.nn.functional.avg_pool2d(clean, 8)
    tone = guided_tone(dark, wanted)
    assert psnr(with_tone(dark, tone), clean) > psnr(dark, clean) + 15
    assert with_tone(dark, no_change(tone).expand_as(tone)).equal(dark)


@pytest.mark.parametrize("size", [(8, 8), (9, 300), (2, 2), (700, 1100)])
def test_statistics_of_any_size(size: tuple[int, int]) -> None:
    found = photo_statistics(torch.rand(2, 3, *size))
    assert found.shape == (2, 51)
    assert found.isfinite().all()


def test_each_tile_has_its_own_noise_and_the_tone_of_all() -> None:
    photo = torch.full((1, 3, 64, 128), 0.5)
    photo[..., :64] += 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    columns = torch.zeros(2, 16)
    columns[0, :8] = columns[1, 8:] = 1
    places = LocalPooled(torch.zeros(1, 4, 1, 2), torch.ones(1, 8), columns)
    found = local_statistics(photo, places)
    assert found.shape == (1, 1, 2, 51)
    noisy, clean = found[0, 0, :, -NOISE_LEVELS:]
    torch.testing.assert_close(noisy, torch.full((3,), 0.1), rtol=0.1, atol=0)
    assert not clean.any()
    tone = photo_statistics(photo)[0, :-NOISE_LEVELS]
    assert torch.equal(found[0, 0, 0, :-NOISE_LEVELS], tone)
    assert torch.equal(found[0, 0, 1, :-NOISE_LEVELS], tone)


def test_black_and_white_come_back_and_hue_stays() -> None:
    photo = torch.rand(1, 3, 120, 160, generator=torch.Generator().manual_seed(0))
    photo[:, 2] *= 0.5
    hazy = 0.3 + 0.5 * photo
    clear = stretched(hazy, torch.ones(1))
    torch.testing.assert_close(clear, photo, rtol=0, atol=0.02)


def test_each_photo_by_its_own_share() -> None:
    photos = 0.4 + 0.3 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    none, half, whole = stretched(photos, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(none, photos[0])
    assert photos[1].std() < half.std() < whole.std()


def test_a_wall_is_not_hazy() -> None:
    wall = 0.5 + 0.01 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert stretched(wall, torch.ones(1)).std() < 0.02
