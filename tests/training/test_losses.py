"""Each loss is what it says, and tells which perceptual distance runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from training.losses import (
    VGG_FILE,
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    adversarial,
    band_means,
    hinge_discriminator,
    kind_loss,
    kind_scores,
    psnr_loss,
    spectral_distance,
)
from training.models import psnr_gain


def picture(seed: int, side: int = 48) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_bands_are_means_over_their_quarter_and_nan_where_empty() -> None:
    found = band_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 249, 999]), 1000)
    assert (float(found["mse_t0"]), float(found["mse_t3"])) == (2.0, 5.0)
    assert found["mse_t1"].isnan()
    assert found["mse_t2"].isnan()


def labels(*rows: dict[int, float]) -> dict[str, Tensor]:
    """Batches of three kinds, the last of which is clean, of severities by kind."""
    kinds, severities = torch.zeros(len(rows), 3), torch.zeros(len(rows), 3)
    for row, levels in enumerate(rows):
        for kind, severity in levels.items():
            kinds[row, kind], severities[row, kind] = 1, severity
    label = torch.tensor([max(levels, key=lambda kind: levels[kind]) for levels in rows])
    return {"kinds": kinds, "severities": severities, "label": label}


LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def test_mild_photos_count_less_for_the_kind_and_clean_ones_in_full() -> None:
    batch = labels({2: 0.0}, {1: 0.05}, {0: 0.01, 1: 0.9}, {0: -1.0})
    each = F.cross_entropy(LOGITS, torch.tensor([2, 1, 1, 0]), reduction="none")
    torch.testing.assert_close(kind_loss(LOGITS, batch, "ce"), each.mean())
    expected = (torch.tensor([1.0, 0.25, 1.0, 1.0]) * each).sum() / 3.25
    torch.testing.assert_close(kind_loss(LOGITS, batch, "ce", mild=0.2), expected)


def test_each_kind_of_a_mix_counts_by_its_own_severity() -> None:
    batch = labels({2: 0.0}, {1: 0.05}, {0: 0.01, 1: 0.9}, {0: -1.0})
    each = F.binary_cross_entropy_with_logits(LOGITS, batch["kinds"], reduction="none")
    torch.testing.assert_close(kind_loss(LOGITS, batch, "bce"), each.mean())
    weight = torch.ones(4, 3)
    weight[1] = 0.25  # also of being called clean
    weight[2, 0] = 0.05
    expected = (weight * each).sum() / weight.sum()
    torch.testing.assert_close(kind_loss(LOGITS, batch, "bce", mild=0.2), expected)


def test_naming_one_kind_of_a_mix_is_right_and_naming_all_is_exact() -> None:
    kinds = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[2.0, 1, -1], [-1, 1, -1], [2, -1, -1], [1, -1, -2]])
    assert kind_scores(logits, kinds, "ce") == {"accuracy": torch.tensor(0.75)}
    assert kind_scores(logits, kinds, "bce")["accuracy"] == 0.75
    assert kind_scores(logits, kinds, "bce")["exact"] == 0.5


def test_the_psnr_loss_is_minus_the_psnr_and_minds_each_photo_alike() -> None:
    clean = picture(1) / 2 + 0.25
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    image = (clean + noise * torch.tensor([0.1, 0.02])[:, None, None, None]).requires_grad_()
    loss = psnr_loss(image, clean)
    assert float(loss.detach()) == pytest.approx(-(20 + 34) / 2 / 100, abs=0.01)
    loss.backward()
    assert image.grad is not None
    worse, better = image.grad.flatten(1).norm(dim=1)
    assert better > 2 * worse
    assert float(psnr_loss(clean, clean)) == pytest.approx(-0.4)
    assert float(psnr_loss(clean, clean, floor=1e-3)) == pytest.approx(-0.3)


def test_the_spectral_distance_minds_texture_more_than_its_place() -> None:
    image = picture(0)
    assert float(spectral_distance(image, image)) == 0
    blurred = F.avg_pool2d(image, 5, 1, 2)
    moved = image.roll((1, 1), dims=(2, 3))
    assert F.l1_loss(blurred, image) < F.l1_loss(moved, image)
    assert spectral_distance(blurred, image) > 2 * spectral_distance(moved, image)


def test_the_spectral_distance_of_a_flat_image_has_a_finite_gradient() -> None:
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    spectral_distance(flat, picture(0, 32)[:1]).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_without_weights_the_fallback_runs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with caplog.at_level(logging.INFO):
        fallback = Perceptual()
    assert f"LPIPS's backbone is not there; put torchvision's {VGG_FILE}" in caplog.text
    image, other = picture(0), picture(1)
    assert torch.equal(fallback(image, other), spectral_distance(image, other))
    with pytest.raises(FileNotFoundError, match=r"--lpips-weights: .*nothing\.pth"):
        Perceptual(tmp_path / "nothing.pth")


def test_what_is_not_degraded_has_no_part_in_the_gain() -> None:
    clean = torch.full((3, 3, 4, 4), 0.5)
    lq, image = clean.clone(), clean.clone()
    lq[0] += 0.1  # 20 dB
    image[0] += 0.05  # 6 dB more
    image[1] += 0.01  # of a clean photo
    lq[2] += 0.4
    image[2] += 0.2
    assert float(psnr_gain(image, lq, clean)) == pytest.approx(6.0206, abs=1e-3)
    assert psnr_gain(image[1:2], lq[1:2], clean[1:2]).isnan()


def test_lpips_runs_on_local_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    features = torchvision.models.vgg16(weights=None).features
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    with caplog.at_level(logging.INFO):
        perceptual = Perceptual(tmp_path / "vgg.pth")
    assert "perceptual loss: LPIPS" in caplog.text
    own = perceptual.lpips.net.slice1[0].weight
    assert torch.equal(own, state["features.0.weight"])
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    image = picture(0).requires_grad_(True)
    assert float(perceptual(image, image).detach()) == 0
    perceptual(image, picture(1)).backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: lacks .*torchvision's VGG16"):
        Perceptual(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no pickle")
    with pytest.raises(ValueError, match=r"text\.pth: cannot be read .*torchvision's VGG16"):
        Perceptual(tmp_path / "text.pth")


def test_the_discriminator_learns_and_neither_player_moves_the_other() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    fake = picture(0).requires_grad_(True)
    real = picture(1) * 0.1
    hinge_discriminator(discriminator, real, fake).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    discriminator.zero_grad()
    adversarial(discriminator, fake).backward()
    assert fake.grad is not None
    assert fake.grad.abs().max() > 0
    assert all(p.grad is None for p in discriminator.parameters())

    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    first = last = torch.zeros(())
    for step in range(30):
        last = hinge_discriminator(discriminator, real, fake)
        first = last if step == 0 else first
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert last < 0.7 * first


def test_the_adaptive_weight_balances_gradients_and_is_at_most_one() -> None:
    image = nn.Parameter(torch.ones(1, 3, 4, 4))
    small, large = image.sum(), (10 * image).sum()
    assert float(adaptive_weight(small, large, image)) == pytest.approx(0.1)
    assert float(adaptive_weight(large, small, image)) == 1.0
