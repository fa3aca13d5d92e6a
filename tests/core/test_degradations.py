"""Degradations: pure functions of (image, severity, generator) that get worse with severity."""

from typing import Any

import pytest
import torch
from skimage import filters
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diff_restorer.degradations import (
    ALL_KINDS,
    KINDS,
    add_gaussian_noise,
    degrade,
    degrade_chain,
    random_look,
    sample_severity,
)
from diff_restorer.degradations.filters import convolve, gaussian_blur
from diff_restorer.degradations.kernels import disk_kernels
from diff_restorer.degradations.optics import _uneven
from diff_restorer.degradations.sensor import _developed
from diff_restorer.similarity import psnr
from tests import photos
from tests.photos import seeded

DEGRADING = tuple(kind for kind in ALL_KINDS if kind != "clean")


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """The coffee cup, (1, 3, 120, 180) in [0, 1]."""
    image = photos.photo("coffee")
    return F.interpolate(image, size=(120, 180), mode="bicubic", antialias=True).clamp(0, 1)


def mean_psnr(kind: str, photo: Tensor, severity: float) -> float:
    """Of 8 draws, each against the photo, (1, 3, H, W)."""
    drawn = [degrade(kind, photo, severity, seeded(seed)) for seed in range(8)]
    return psnr(torch.cat(drawn), photo.expand(8, -1, -1, -1)).mean().item()


def test_the_default_kinds_are_the_papers_eight_and_clean() -> None:
    assert KINDS == (
        "noise", "blur", "jpeg", "low_light", "haze", "rain", "snow", "raindrop", "clean",
    )  # fmt: skip


@pytest.mark.parametrize("severity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_keeps_shape_and_range_and_leaves_the_input_alone(
    kind: str, severity: float, photo: Tensor
) -> None:
    before = photo.clone()
    batch = photo.expand(2, -1, -1, -1)
    degraded = degrade(kind, batch, severity, seeded())
    assert degraded.shape == batch.shape
    assert degraded.dtype == torch.float32
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    assert torch.equal(photo, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (33, 64)])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_any_size_works(kind: str, size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size, generator=seeded())
    degraded = degrade(kind, image, 1.0, seeded())
    assert degraded.shape == image.shape
    assert degraded.isfinite().all()


@pytest.mark.parametrize("kind", DEGRADING)
def test_the_generator_decides_everything(kind: str, photo: Tensor) -> None:
    torch.manual_seed(1)
    first = degrade(kind, photo, 0.7, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, degrade(kind, photo, 0.7, seeded(5)))
    if kind not in ("jpeg", "low_res"):  # these draw from a handful of settings
        assert not torch.equal(first, degrade(kind, photo, 0.7, seeded(6)))


@pytest.mark.parametrize("kind", DEGRADING)
def test_severity_lowers_psnr_on_average(kind: str, photo: Tensor) -> None:
    means = [mean_psnr(kind, photo, severity) for severity in (0.05, 0.35, 0.65, 0.95)]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 5


@pytest.mark.parametrize("kind", DEGRADING)
def test_severity_zero_is_all_but_invisible_whatever_the_neighbours_are(
    kind: str, photo: Tensor
) -> None:
    severity = torch.tensor([0.0, 1.0, 0.0, 0.6] * 4)
    degraded = degrade(kind, photo.expand(16, -1, -1, -1), severity, seeded())
    mild = psnr(degraded[::2], photo.expand(8, -1, -1, -1))
    assert mild.min() > (26 if kind == "low_res" else 31)
    assert mild.mean() > (30 if kind == "low_res" else 33)


@pytest.mark.parametrize("kind", DEGRADING)
def test_samples_of_a_batch_have_their_own_severity_and_their_own_picture(
    kind: str, photo: Tensor
) -> None:
    others = torch.stack([photo[0].flip(-1), photo[0], photo[0] ** 2])
    severity = torch.tensor([0.9, 0.5, 0.1])
    degraded = degrade(kind, others, severity, seeded())
    # The middle sample must not notice what its neighbours show.
    changed = others.clone()
    changed[0], changed[2] = changed[0].flip(-2), changed[2].flip(-2)
    again = degrade(kind, changed, severity, seeded())
    torch.testing.assert_close(again[1], degraded[1], rtol=0, atol=1e-5)
    repeated = photo.expand(12, -1, -1, -1)
    mild = degrade(kind, repeated, torch.tensor([0.95, 0.05] * 6), seeded())
    errors = (mild - repeated).square().mean((1, 2, 3))
    assert errors[::2].mean() > 2 * errors[1::2].mean()


def test_clean_is_the_identity(photo: Tensor) -> None:
    assert torch.equal(degrade("clean", photo, 1.0, seeded()), photo)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("noise", 14, 31),  # a third of it is camera noise, which is milder
        ("jpeg", 24, 31),
        ("low_light", 8, 12.5),
        ("haze", 10, 17),
        ("rain", 15, 27),
        ("snow", 17, 26),
        ("raindrop", 19, 31),
    ],
)
def test_the_middle_half_of_severity_is_as_bad_as_the_benchmarks(
    kind: str, low: float, high: float, photo: Tensor
) -> None:
    for severity in (0.25, 0.75):
        assert low < mean_psnr(kind, photo, severity) < high


def test_gaussian_noise_has_the_sigma_asked_for() -> None:
    grey = torch.full((2, 3, 64, 64), 0.5)
    noisy = add_gaussian_noise(grey, torch.tensor([10 / 255, 30 / 255]), seeded())
    assert (noisy - grey).std(dim=(1, 2, 3)).mul(255).tolist() == pytest.approx([10, 30], rel=0.05)


def test_developed_camera_noise_is_mild_and_blotchy() -> None:
    grey = torch.full((1, 3, 256, 256), 0.5)
    added = torch.randn(grey.shape, generator=seeded()) * 20 / 255
    noise = _developed(added, grey, torch.tensor([20 / 255]), seeded())
    assert noise.std().item() * 255 == pytest.approx(20 / 3, rel=0.1)
    correlations = [
        ((noise[..., :-step] * noise[..., step:]).mean() / noise.var()).item() for step in (1, 2, 4)
    ]
    assert correlations == pytest.approx([0.7, 0.35, 0.15], abs=0.1)
    assert 0.25 < torch.corrcoef(noise[0].flatten(1))[0, 1] < 0.9


def test_the_worst_low_light_is_as_dark_as_that_of_lol(photo: Tensor) -> None:
    levels = [degrade("low_light", photo, 1.0, seeded(seed)).mean().item() for seed in range(8)]
    assert sum(levels) / 8 * 255 == pytest.approx(12, abs=4)


def test_a_chain_ignores_the_order_of_its_kinds(photo: Tensor) -> None:
    severity = torch.tensor([[0.5, 0.3, 0.2]])
    chained = degrade_chain(("jpeg", "haze", "noise"), photo, severity, seeded())
    swapped = degrade_chain(("noise", "jpeg", "haze"), photo, severity[:, [2, 0, 1]], seeded())
    assert torch.equal(chained, swapped)
    generator = seeded()
    step = degrade("haze", photo, 0.3, generator)
    step = degrade("noise", step, 0.2, generator)
    assert torch.equal(chained, degrade("jpeg", step, 0.5, generator))


def test_severities_are_uniform() -> None:
    generator = seeded()
    drawn = torch.tensor([sample_severity(generator) for _ in range(2000)])
    assert torch.histc(drawn, 4, 0, 1).min() > 430


@pytest.mark.parametrize(
    ("kind", "image", "severity", "message"),
    [
        ("fog", torch.zeros(1, 3, 8, 8), 0.5, "unknown degradation 'fog'; known are noise"),
        ("rain", torch.zeros(3, 8, 8), 0.5, r"expected \(B, 3, H, W\) float32"),
        ("rain", torch.zeros(1, 3, 8, 8).half(), 0.5, "float16"),
        ("rain", torch.zeros(1, 3, 8, 8), 1.5, r"expected numbers in \[0, 1\], found 1.5"),
        ("rain", torch.zeros(2, 3, 8, 8), torch.zeros(3), r"one number or 2 numbers"),
    ],
)
def test_wrong_arguments_are_named(
    kind: str, image: Tensor, severity: float | Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(kind, image, severity, seeded())


def test_a_chain_names_a_kind_once(photo: Tensor) -> None:
    with pytest.raises(ValueError, match="each kind may be named once"):
        degrade_chain(("rain", "rain"), photo, 0.5, seeded())


def test_a_lens_does_not_blur_the_noise_of_the_sensor(photo: Tensor) -> None:
    generator = seeded()
    blurred = degrade("blur", photo, 0.5, generator)
    expected = degrade("low_light", blurred, 0.5, generator)
    assert torch.equal(degrade_chain(("low_light", "blur"), photo, 0.5, seeded()), expected)


def test_a_chain_needs_a_severity_for_each_kind(photo: Tensor) -> None:
    with pytest.raises(ValueError, match="a column for each of 2 kinds, found 3"):
        degrade_chain(("rain", "jpeg"), photo, torch.full((1, 3), 0.5), seeded())


class CopiesThatWait(TorchDispatchMode):
    """Raises where a tensor goes to another device in a way that the host waits for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            device = kwargs.get("device")
            moved = device is not None and torch.device(device) != args[0].device
            if moved and not kwargs.get("non_blocking"):
                raise RuntimeError(f"a copy from {args[0].device} to {device} that waits")
        return func(*args, **kwargs)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """On "meta" pixels have no values: what reads one, or needs one for a size, fails.

    So does what mixes host and device tensors.
    """
    image = torch.empty(8, 3, 40, 56, device="meta")
    with CopiesThatWait():
        for seed in range(4):
            degraded = degrade(kind, image, torch.linspace(0, 1, 8), seeded(seed))
            assert degraded.shape == image.shape
            assert degraded.device.type == "meta"
            assert random_look(image, seeded(seed)).shape == image.shape


def test_what_waits_is_found() -> None:
    pixels = torch.empty(2, 3, device="meta")
    with pytest.raises(RuntimeError):
        pixels.max().item()
    with pytest.raises(RuntimeError):
        bool(pixels[0, 0] > 0)
    with pytest.raises(NotImplementedError):
        pixels[pixels > 0]
    with CopiesThatWait(), pytest.raises(RuntimeError, match="that waits"):
        torch.rand(2).to("meta")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_gpu_gives_the_same_picture_but_for_noise(kind: str, photo: Tensor) -> None:
    images = photo.expand(8, -1, -1, -1)
    expected = degrade(kind, images, 0.6, seeded())
    on_device = images.cuda()
    degrade(kind, on_device, 0.6, seeded())  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = degrade(kind, on_device, 0.6, seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = (found.cpu() - expected).abs().mean()
    # 8-bit roundings inside may fall to the other side.
    assert error < (0.2 if kind in ("noise", "low_light", "second_order") else 1e-3)


def test_uneven_blur_adds_light_and_differs_over_the_photo() -> None:
    """A bright point of white, brighter than it looks, keeps more light than its encoded value."""
    image = torch.full((6, 3, 96, 128), 0.2)
    image[..., ::16, ::16] = 1
    kernel = disk_kernels(torch.full((6,), 2.5))
    found = _uneven(image, kernel, torch.ones(6).bool(), torch.full((6,), 0.8), seeded())
    even = convolve(image, kernel)
    assert (found.mean((1, 2, 3)) > even.mean((1, 2, 3))).all()
    sharpness = (found - found.roll(1, -1)).square().mean((1, 2)).view(6, 8, 16).mean(2)
    assert (sharpness.amax(1) > 1.2 * sharpness.amin(1)).float().mean() > 0.5


def test_convolve_gives_each_sample_its_own_kernel_and_mirrors_the_edges(photo: Tensor) -> None:
    kernels = torch.rand(2, 5, 5, generator=seeded())
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    found = convolve(photo.expand(2, -1, -1, -1), kernels)
    padded = F.pad(photo, (2, 2, 2, 2), mode="reflect")
    for index in range(2):
        weight = kernels[index].flip(0, 1).expand(3, 1, 5, 5)
        expected = F.conv2d(padded, weight, groups=3)
        torch.testing.assert_close(found[index : index + 1], expected, rtol=0, atol=1e-5)


def test_gaussian_blur_is_a_normalised_separable_gaussian(photo: Tensor) -> None:
    found = gaussian_blur(photo, 1.3)
    expected = torch.from_numpy(
        filters.gaussian(photo[0].numpy(), 1.3, mode="nearest", truncate=4 / 1.3, channel_axis=0)
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
