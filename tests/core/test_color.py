"""Colours come from the reference, detail from the picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer import color
from diff_restorer.color import METHODS, match_colors
from tests import photos


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return photos.photo("coffee")[..., :300, :400]


@pytest.fixture(scope="module")
def tinted(photo: Tensor) -> Tensor:
    return (photo * torch.tensor([0.9, 0.8, 0.6])[:, None, None] + 0.05).clamp(0, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_tint_is_taken_back(method: str, photo: Tensor, tinted: Tensor) -> None:
    found = match_colors(tinted, photo, method)
    assert found.min() >= 0
    assert found.max() <= 1

    def tint(image: Tensor) -> Tensor:
        mean = image.mean(dim=(2, 3))
        return mean - mean.mean(dim=1, keepdim=True)

    before, after = ((tint(image) - tint(photo)).abs().mean() for image in (tinted, found))
    assert after < 0.5 * before


@pytest.mark.parametrize("method", METHODS)
def test_own_colours_stay(method: str, photo: Tensor) -> None:
    torch.testing.assert_close(match_colors(photo, photo, method), photo, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_strength_goes_from_nothing_to_all(method: str, photo: Tensor, tinted: Tensor) -> None:
    whole = match_colors(tinted, photo, method)
    assert torch.equal(match_colors(tinted, photo, method, 0.0), tinted)
    half = match_colors(tinted, photo, method, 0.5)
    torch.testing.assert_close(half, (whole + tinted) / 2)


def test_wavelets_keep_detail_and_follow_the_place(photo: Tensor) -> None:
    reference = F.avg_pool2d(photo, 9, 1, 4)  # a blurred photo with another tint on each half
    reference[..., :200] *= 0.7
    found = match_colors(photo, reference, "wavelet")
    means = [float(part.mean()) for part in (found[..., :150], reference[..., :150])]
    assert means[0] == pytest.approx(means[1], rel=0.05)

    def detail(image: Tensor) -> Tensor:
        return (image - F.avg_pool2d(image, 3, 1, 1))[..., 1:-1, 250:-1]

    assert (detail(found) - detail(photo)).abs().mean() < 0.2 * detail(photo).abs().mean()


def test_lab_keeps_the_brightness(photo: Tensor, tinted: Tensor) -> None:
    found = match_colors(tinted, photo, "lab")
    luma = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]
    change = ((found - tinted) * luma).sum(dim=1).abs().mean()
    assert change < 0.03
    assert ((photo - tinted) * luma).sum(dim=1).abs().mean() > 2 * change


def test_bands_make_no_seam(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = photo.flip(-1)
    whole = match_colors(photo, reference)
    monkeypatch.setattr(color, "_BAND", 37)
    torch.testing.assert_close(match_colors(photo, reference), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (5, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_tiny_pictures(method: str, size: tuple[int, int]) -> None:
    found = match_colors(torch.rand(2, 3, *size), torch.rand(2, 3, *size), method)
    assert torch.isfinite(found).all()


def test_wrong_arguments(photo: Tensor) -> None:
    with pytest.raises(ValueError, match="method: 'hsv', expected one of wavelet, adain, lab"):
        match_colors(photo, photo, "hsv")
    with pytest.raises(ValueError, match="reference: its shape"):
        match_colors(photo, photo[..., 1:], "adain")
