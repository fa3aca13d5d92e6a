"""Camera noise: aligned, of the strength asked for, correlated as that of real cameras."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.degradations.draw import Draw
from diff_restorer.degradations.raw import (
    _demosaicked,
    _developed_noise,
    _encoded,
    _linear,
    _mosaic,
    camera_noise,
)
from tests import photos
from tests.photos import seeded


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """The coffee cup in grey, whose colours JPEG does not smooth, (1, 3, 240, 360) in [0, 1]."""
    image = photos.photo("coffee")
    image = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return F.interpolate(image, size=(240, 360), mode="bicubic", antialias=True).clamp(0, 1)


def test_development_is_exactly_inverted() -> None:
    levels = (torch.arange(256) / 255).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    torch.testing.assert_close(_encoded(_linear(levels)), levels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [[0, 0], [0, 1], [1, 0], [1, 1]])
def test_demosaicking_keeps_colours_and_what_was_measured(shift: list[int]) -> None:
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 6, 8)
    torch.testing.assert_close(_demosaicked(_mosaic(flat, shift), shift), flat)
    planes = torch.rand(1, 3, 6, 8, generator=seeded())
    mosaic = _mosaic(planes, shift)
    again = _mosaic(_demosaicked(mosaic, shift), shift)
    torch.testing.assert_close(again, mosaic)
    assert (mosaic == planes[:, :1]).sum() == (mosaic == planes[:, 2:]).sum() == 12
    assert (mosaic == planes[:, 1:2]).sum() == 24


def test_the_strength_is_that_of_the_severity(photo: Tensor) -> None:
    severity = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0]).repeat(8)
    found = camera_noise(photo.expand(40, -1, -1, -1), severity, seeded())
    levels = (found - photo).std((1, 2, 3)).view(8, 5).median(0).values * 255
    # JPEG adds to little noise and takes from much; black and white cut off.
    assert levels.tolist() == pytest.approx([0.3, 3.2, 7.5, 13.3, 25], rel=0.15, abs=0.7)


def test_noise_is_correlated_as_that_of_cameras(photo: Tensor) -> None:
    """PolyU (arXiv 1804.02603): 0.5 to 0.7, 0.2 to 0.5 and 0.05 to 0.26 at 1, 2 and 4 px."""
    noise = camera_noise(photo.expand(24, -1, -1, -1), torch.full((24,), 0.25), seeded()) - photo
    noise = noise - noise.mean((2, 3), keepdim=True)
    power = noise.square().mean((1, 2, 3))
    for step, low, high in ((1, 0.45, 0.75), (2, 0.2, 0.5), (4, 0.05, 0.26)):
        along = (noise[..., step:] * noise[..., :-step]).mean((1, 2, 3)) / power
        down = (noise[..., step:, :] * noise[..., :-step, :]).mean((1, 2, 3)) / power
        assert low < ((along + down) / 2).mean() < high
    channels = torch.stack([torch.corrcoef(one.flatten(1))[0, 1] for one in noise])
    assert 0.3 < channels.mean() < 0.85


def test_the_photo_stays_where_it_is(photo: Tensor) -> None:
    """The mean of much noise has nothing of the photo's edges, as a demosaicked copy would."""
    sharp = (photo * 0.6 + 0.2).expand(8, -1, -1, -1)
    severity = torch.full((8,), 0.3)
    draws = [Draw(sharp, seeded(seed)) for seed in range(4)]
    mean = torch.cat([_developed_noise(sharp, severity, draw) for draw in draws]).mean(0)
    moved = sharp[0].roll(1, -1) - sharp[0]
    assert mean.abs().mean() * 255 < 1
    assert torch.corrcoef(torch.stack((mean.flatten(), moved.flatten())))[0, 1].abs() < 0.05


def test_bright_parts_have_more_noise_in_linear_light() -> None:
    levels = torch.tensor([0.1, 0.8]).view(2, 1, 1, 1).expand(2, 3, 128, 128)
    noisy = camera_noise(levels, torch.tensor([0.3, 0.3]), seeded())
    assert (_linear(noisy)[1] - _linear(levels)[1]).std() > (
        2 * (_linear(noisy)[0] - _linear(levels)[0]).std()
    )


def test_blown_highlights_are_no_error() -> None:
    """A white area that is resized is brighter than white by a rounding."""
    white = torch.rand(1, 3, 128, 128, generator=seeded())
    white[..., :64, :] = 1
    for seed in range(40):
        noisy = camera_noise(white, torch.tensor([0.5]), seeded(seed))
        assert noisy.isfinite().all()
