"""Classical baselines: what goes in and out, and that each does what it is there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data

from diff_restorer.degradations import KINDS, degrade
from training.evaluation import baselines, smoothing
from training.evaluation.baselines import BASELINES, COMPETITORS, Pixels, apply

DENOISERS = ["guided filter", "NL means", "total variation", "sliding DCT"]


@pytest.fixture(scope="module")
def photo() -> Pixels:
    """Part of a photo with edges, texture and smooth places, of odd size."""
    return data.astronaut()[40:171, 150:303].astype(np.float32) / 255


def psnr(image: Pixels, reference: Pixels) -> float:
    return -10 * float(np.log10(np.square(image - reference).mean()))


def degraded(kind: str, photo: Pixels, severity: float) -> Pixels:
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].contiguous()
    found = degrade(kind, image, severity, torch.Generator().manual_seed(3))
    return found[0].permute(1, 2, 0).numpy()


def noisy(photo: Pixels, sigma: float = 50) -> Pixels:
    added = np.random.default_rng(0).normal(0, sigma / 255, photo.shape)
    return (photo + added).clip(0, 1).astype(np.float32)


def test_a_baseline_competes_for_each_degraded_kind():
    assert set(COMPETITORS) == {*KINDS[:-1], "low_res"}
    named = {name for names in COMPETITORS.values() for name in names}
    assert named == set(BASELINES), "a baseline without a contest, or the other way round"


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_keeps_shape_and_range(name: str, photo: Pixels):
    before = photo.copy()
    result = apply(name, photo)
    assert result.shape == photo.shape
    assert result.dtype == np.float32
    assert 0 <= result.min() <= result.max() <= 1
    assert np.array_equal(photo, before), "the photo was changed in place"
    assert np.array_equal(apply(name, photo), result), "not a function of the photo alone"


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_baseline_survives_a_photo_of_one_value(name: str, level: float):
    flat = np.full((33, 47, 3), level, np.float32)
    assert np.isfinite(apply(name, flat)).all()


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_remove_noise(name: str, photo: Pixels):
    lq = noisy(photo)
    assert psnr(apply(name, lq), photo) > psnr(lq, photo) + 3


def test_noise_is_estimated():
    flat = np.full((128, 128, 3), 0.5, np.float32)
    for sigma in (5, 20, 50):
        assert smoothing.noise_sigma(noisy(flat, sigma)) == pytest.approx(sigma / 255, rel=0.1)


@pytest.mark.parametrize("name", ["Richardson-Lucy, Gaussian kernel", "unsharp mask"])
def test_sharpeners_undo_a_gaussian_blur(name: str, photo: Pixels):
    lq = ndimage.gaussian_filter(photo, (1.5, 1.5, 0))
    assert psnr(apply(name, lq), photo) > psnr(lq, photo) + 0.5


def test_a_sharpener_undoes_a_defocus(photo: Pixels):
    kernel = baselines.disk_psf(3.0)[..., None]
    lq = ndimage.convolve(photo, kernel, mode="mirror").astype(np.float32)
    assert psnr(apply("Richardson-Lucy, disk kernel", lq), photo) > psnr(lq, photo) + 0.5


def test_jpeg_blocks_get_weaker(photo: Pixels):
    lq = degraded("jpeg", photo, 0.72)
    for name in ("sliding DCT, strong", "total variation", "guided filter"):
        assert psnr(apply(name, lq), photo) > psnr(lq, photo)


@pytest.mark.parametrize(
    ("kind", "severity", "least"),
    [("noise", 0.6, 4), ("jpeg", 0.72, 0.1), ("low_light", 0.5, 5), ("haze", 0.6, 2),
     ("rain", 0.6, 0.3), ("snow", 0.6, 0.3), ("blur", 0.3, 0.1)],
)  # fmt: skip
def test_the_best_baseline_of_a_kind_improves_it(
    kind: str, severity: float, least: float, photo: Pixels
):
    lq = degraded(kind, photo, severity)
    best = max(psnr(apply(name, lq), photo) for name in COMPETITORS[kind])
    assert best > psnr(lq, photo) + least


def test_bright_spots_are_filled_and_the_rest_is_kept():
    clean = np.full((64, 64, 3), 0.3, np.float32)
    clean[:, 40:] = 0.5
    lq = clean.copy()
    lq[10:13, 20:23] = lq[50:52, 50:52] = 0.95
    for name in ("bright spots inpainted", "darker median 9", "opening 1x5"):
        result = apply(name, lq)
        assert np.abs(result - clean)[10:13, 20:23].max() < 0.05
        assert np.abs(result - clean)[:8].max() < 0.05


def test_equalising_spreads_a_dark_photo(photo: Pixels):
    dark = (photo * 0.1).astype(np.float32)
    value = apply("histogram equalisation", dark).max(-1)
    assert np.histogram(value, 4, (0, 1))[0] / value.size == pytest.approx(0.25, abs=0.05)
    stretched = apply("histogram stretch", dark)
    assert stretched.min() == 0
    assert stretched.max() == 1
