"""JPEG in torch against the real codec; resampling by matrices against torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.degradations import jpeg_codec
from diff_restorer.degradations.compression import compress_jpeg
from diff_restorer.degradations.draw import Draw
from diff_restorer.degradations.resampling import rescale
from diff_restorer.similarity import psnr
from tests.photos import photo


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """A cup, a cat and an astronaut, (3, 3, 240, 320) in steps of 1/255."""
    images = [
        F.interpolate(photo(name), size=(240, 320), mode="bicubic", antialias=True)
        for name in ("coffee", "chelsea", "astronaut")
    ]
    return (torch.cat(images).clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("size", [(240, 320), (233, 317)])
@pytest.mark.parametrize("halve_chroma", [True, False])
@pytest.mark.parametrize("quality", [5, 10, 20, 30, 45, 60, 70, 80, 90, 95])
def test_jpeg_is_as_far_from_the_photo_as_pillows(
    quality: int, halve_chroma: bool, size: tuple[int, int], photos: Tensor
) -> None:
    image = photos[..., : size[0], : size[1]]
    qualities = torch.full((len(image),), float(quality))
    halved = torch.full((len(image),), halve_chroma)
    expected = jpeg_codec(image, qualities, 2 * halved.int())
    found = compress_jpeg(image, qualities, halved)
    assert (psnr(found, image) - psnr(expected, image)).abs().max() < 0.02
    assert psnr(found, expected).min() > 45
    assert torch.equal((found * 255).round() / 255, found)


def test_jpeg_treats_each_photo_as_if_it_were_alone(photos: Tensor) -> None:
    quality, halved = torch.tensor([90.0, 10.0, 40.0]), torch.tensor([True, False, True])
    found = compress_jpeg(photos, quality, halved)
    for index in range(3):
        one = slice(index, index + 1)
        alone = compress_jpeg(photos[one], quality[one], halved[one])
        assert (alone - found[one]).abs().mean() < 1e-4  # sums in another order


def test_the_real_codec_has_its_quality(photos: Tensor) -> None:
    both = photos[:1].expand(2, -1, -1, -1)
    error = psnr(jpeg_codec(both, torch.tensor([90.0, 10.0])), both)
    assert error[0] > error[1] + 5


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("factor", [0.3, 0.5, 0.77, 1.0])
def test_matrices_resize_as_torch_does(factor: float, cubic: bool, photos: Tensor) -> None:
    """Next to a sample of another factor, which makes the matrices larger than its own."""
    image = photos[:2, :, :120, :161]
    size = [round(side * factor) for side in image.shape[-2:]]
    mode = "bicubic" if cubic else "bilinear"
    small = F.interpolate(image[:1], size=size, mode=mode, antialias=True)
    expected = F.interpolate(small, size=(120, 161), mode=mode, antialias=True)
    yes = torch.ones(2).bool()
    factors, use = torch.tensor([factor, 1.0]), yes if cubic else ~yes
    found = rescale(image, factors, (120, 161), Draw(image, torch.Generator()), use, yes)
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[1:], image[1:], rtol=0, atol=1e-5)
