"""Edit Degradation, Simulate Degradation and Measure Restoration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from diff_restorer.degradations import ALL_KINDS, degrade


@pytest.fixture
def degradation(look, photo) -> Any:
    """What the toy's Prompt Processor reads from two photos; its prototypes are not zero."""
    return look("DiffRestorerPromptProcessor", photo(batch=2))[2]


@pytest.fixture
def edit(run, degradation) -> Any:
    def execute(**inputs: Any) -> Any:
        return run("DiffRestorerEditDegradation", **({"degradation": degradation} | inputs))[0]

    return execute


def test_mix_goes_from_what_was_found_to_the_prototype(edit, degradation) -> None:
    place = degradation.types.index("haze")
    none, whole = edit(type="haze", weight=0.0), edit(type="haze", weight=1.0)
    assert torch.equal(none.tokens, degradation.tokens)
    prototype = degradation.prototypes[place].expand_as(whole.pooled)
    torch.testing.assert_close(whole.pooled, prototype)
    torch.testing.assert_close(whole.tokens.mean(dim=1), prototype, atol=1e-5, rtol=1e-5)
    assert whole.probabilities[:, place].tolist() == [1.0, 1.0]
    half = edit(type="haze", weight=0.5)
    torch.testing.assert_close(half.pooled, (degradation.pooled + prototype) / 2)
    torch.testing.assert_close(half.probabilities.sum(dim=1), torch.ones(2))


def test_add_and_its_opposite_cancel(edit, degradation) -> None:
    more = edit(type="rain", mode="add", weight=1.5)
    assert not torch.equal(more.tokens, degradation.tokens)
    back = edit(degradation=more, type="rain", mode="add", weight=-1.5)
    torch.testing.assert_close(back.tokens, degradation.tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "weight"), [("mix", 0.3), ("scale", 0.5), ("add", -1.0)])
def test_parts_are_edited_as_the_photo_is(
    pack, edit, degradation, mode: str, weight: float
) -> None:
    """A part that is like the whole photo becomes like the edited whole photo."""
    pooled = degradation.pooled
    tiles = torch.stack([pooled, pooled + 1], dim=-1)[:, :, None]
    local = pack.diff_restorer.LocalPooled(tiles, torch.ones(1, 4), torch.ones(2, 4) / 2)
    found = edit(mode=mode, weight=weight, degradation=replace(degradation, local=local))
    torch.testing.assert_close(found.local.tiles[..., 0, 0], found.pooled)
    share = {"mix": 0.7, "scale": 0.5, "add": 1.0}[mode]
    torch.testing.assert_close(found.local.tiles[..., 0, 1], found.pooled + share)
    assert found.local.rows is local.rows


def test_scale(edit, degradation) -> None:
    assert torch.equal(edit(mode="scale", weight=1.0).tokens, degradation.tokens)
    average = degradation.prototypes.mean(dim=0)
    found = edit(mode="scale", weight=0.0, type="whatever").pooled
    torch.testing.assert_close(found, average.expand_as(found), atol=1e-5, rtol=1e-5)


def test_the_input_is_not_changed(edit, degradation) -> None:
    before = degradation.tokens.clone()
    edit(type="snow", weight=0.7)
    assert torch.equal(degradation.tokens, before)


def test_an_override_reaches_the_restoration(toy, prepare, photo, edit, sample_on) -> None:
    image = photo(batch=2)
    override = edit(type="snow", weight=1.0)
    plain, changed = (
        sample_on(toy.model, restoration)
        for restoration in (prepare(image), prepare(image, degradation=override))
    )
    assert not torch.allclose(changed, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"type": "dust"}, "type: 'dust' is not known .* It knows noise, blur"),
        ({"weight": 1.5}, "weight: 1.5, mix takes 0 to 1"),
        ({"mode": "other"}, "mode: 'other', expected mix, add or scale"),
    ],
)
def test_wrong_edits(edit, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit(**inputs)


def test_prototypes_are_needed(edit, degradation) -> None:
    bare = replace(degradation, prototypes=torch.zeros_like(degradation.prototypes))
    with pytest.raises(ValueError, match="holds no class prototypes"):
        edit(degradation=bare)


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "clean"])
def test_simulates_as_training_does(run, photo, kind: str) -> None:
    image = photo(72, 80)
    (found,) = run("DiffRestorerSimulateDegradation", image=image, type=kind, severity=0.6, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = degrade(kind, image.movedim(-1, 1).contiguous(), 0.6, generator).movedim(1, -1)
    assert torch.equal(found, expected)
    (again,) = run("DiffRestorerSimulateDegradation", image=image, type=kind, severity=0.6, seed=6)
    assert kind == "jpeg" or not torch.equal(again, found)


def test_simulate_takes_batches_alpha_and_any_seed(run, photo) -> None:
    image = photo(40, 40, batch=2, channels=4)
    (found,) = run("DiffRestorerSimulateDegradation", image=image, seed=2**64 - 1)
    assert found.shape == image.shape
    assert torch.equal(found[..., 3], image[..., 3])
    noise = (found - image)[..., :3]
    assert not torch.equal(noise[0], noise[1])  # each photo has its own


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"type": "clean"}, "type: 'clean', expected one of noise"), ({"severity": 2.0}, "severity")],
)
def test_wrong_simulations(run, photo, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("DiffRestorerSimulateDegradation", image=photo(), **inputs)


@pytest.mark.parametrize("kind", ["noise", "jpeg", "low_light"])
def test_values_outside_of_the_range_are_cut_off(run, photo, kind: str) -> None:
    """The host's own resizing overshoots."""
    wide = photo() * 3 - 1
    found, expected = (
        run("DiffRestorerSimulateDegradation", image=image, type=kind, severity=0.9, seed=2)[0]
        for image in (wide, wide.clamp(0, 1))
    )
    assert torch.equal(found, expected)


def test_strips_have_no_ssim(run, photo) -> None:
    image = photo(1, 500)
    psnr, ssim, lpips, report, _ = run("DiffRestorerMeasure", image=image, reference=1 - image)
    assert 0 < psnr < 100
    assert (ssim, lpips) == (-1, -1)
    assert json.loads(report)["ssim"] is None


def test_measures_against_scikit_image(run, photo) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    clean = photo(80, 96)
    noisy = (clean + 0.05 * torch.randn(clean.shape)).clamp(0, 1)
    psnr, ssim, lpips, report, picture = run(
        "DiffRestorerMeasure", image=noisy, reference=clean, lq=noisy
    )
    a, b = clean[0].numpy(), noisy[0].numpy()
    assert psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
    expected: Any = structural_similarity(
        a, b, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim == pytest.approx(expected, abs=1e-4)
    assert lpips == -1 or lpips > 0
    figures = json.loads(report)
    assert figures["gain"] == 0
    assert figures["psnr_lq"] == pytest.approx(psnr, abs=1e-3)
    assert picture.shape == (1, 80, 3 * 96, 3)


def test_equal_pictures(run, photo) -> None:
    image = photo()
    psnr, ssim, _, report, picture = run(
        "DiffRestorerMeasure", image=image, reference=image, view="difference"
    )
    assert (psnr, ssim) == (100.0, pytest.approx(1))
    assert set(json.loads(report)) == {"psnr", "ssim", "lpips"}
    assert picture.shape == (1, 64, 64, 3)
    assert picture[:, 30:].max() == 0  # but for the label


def test_a_batch_has_a_row_for_each(run, photo) -> None:
    images = photo(batch=3)
    psnr, _, _, report, picture = run("DiffRestorerMeasure", image=images, reference=images[:1])
    rows = json.loads(report)
    assert len(rows) == len(picture) == 3
    assert rows[0]["psnr"] == 100
    assert psnr == pytest.approx(sum(row["psnr"] for row in rows) / 3, abs=1e-3)


def test_sizes_must_agree(run, photo) -> None:
    with pytest.raises(ValueError, match=r"reference: 60 x 64 px, but the image is 64 x 64 px"):
        run("DiffRestorerMeasure", image=photo(), reference=photo(64, 60))
    with pytest.raises(ValueError, match="view: 'other'"):
        run("DiffRestorerMeasure", image=photo(), reference=photo(), view="other")
