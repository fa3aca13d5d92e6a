"""Aware VAE Decode with a file whose decoder is a detail path."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from diff_restorer import photo_statistics
from tests import toy_weights


@pytest.fixture(scope="module")
def restorer(pack, toy_folder) -> Any:
    """A toy Nano's file with a detail path in place of fusion blocks; all else is the same."""
    path = toy_weights.write_restorer(toy_folder / "detail.safetensors", detail=True)
    return pack.nodes.host_models.load_restorer(path)


@pytest.fixture
def decode(decode_with, restorer) -> Any:
    return functools.partial(decode_with, restorer)


def test_fidelity_goes_from_the_stock_decode_to_the_detail_path(
    toy, decode, prepare, photo
) -> None:
    import nodes

    image = photo(64, 72, batch=2)
    stock = nodes.VAEDecode().decode(toy.vae, prepare(image).latent)[0]  # type: ignore
    assert torch.equal(decode(image, fidelity=0.0), stock)
    full = decode(image)
    assert not torch.allclose(full, stock, atol=1e-2)
    inner = (full > 0) & (full < 1) & (stock > 0) & (stock < 1)  # elsewhere one was clamped
    mixed = decode(image, fidelity=0.4)
    torch.testing.assert_close(mixed[inner], torch.lerp(stock, full, 0.4)[inner])


@pytest.fixture
def untrained(restorer, keep) -> Any:
    """The detail path with zeros where one starts with zeros."""
    model = restorer.fusion.model
    keep(model)
    for zero_at_start in (model.out, model.finer, model.toned, model.thresholds):
        for parameter in zero_at_start.parameters():
            parameter.zero_()
    return model


@pytest.mark.usefixtures("untrained")
def test_an_untrained_detail_path_gives_the_photo_with_all_its_digits(decode, photo) -> None:
    image = photo(61, 75)
    for tile in (0, 64):
        torch.testing.assert_close(decode(image, tile_size=tile), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fidelity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(150, 200), (9, 300)])
def test_exact_tiles_are_the_whole_picture(decode, photo, fidelity: float, size: Any) -> None:
    image = photo(*size, batch=2)
    error = decode(image, fidelity=fidelity, tile_size=64) - decode(image, fidelity=fidelity)
    assert (255 * error).abs().max() < 0.02


def test_haze_is_taken_from_the_whole_photo(decode, restorer, untrained, photo) -> None:
    """In tiles as without them, each photo by itself, and not from the plain decode."""
    hazy = torch.cat([0.3 + 0.4 * photo(96, 150), 0.5 + 0.3 * photo(96, 150, seed=1)])
    plain, haze = decode(hazy, fidelity=0.0), restorer.info.types.index("haze")
    untrained.kind.bias[haze] = 50.0
    clear, tiled = decode(hazy), decode(hazy, tile_size=64)
    assert torch.equal(decode(hazy, fidelity=0.0), plain)
    assert (255 * (tiled - clear)).abs().max() < 0.1
    for found, given in zip(clear, hazy, strict=True):
        was, now = (value.quantile(torch.tensor([0.01, 0.99])) for value in (given, found))
        assert was[1] - was[0] < 0.6
        assert now[1] - now[0] > 0.9


def test_all_tiles_know_the_tone_of_the_whole_photo(
    decode, prepare, restorer, photo, monkeypatch
) -> None:
    """Fast tiles, too: a tile of a dark part is decoded as part of a photo that is not dark."""
    image = torch.cat([0.2 * photo(64, 64), photo(64, 64, seed=1)], dim=2)
    restoration = prepare(image, diff_restorer=restorer)
    tiled = decode(image, tile_size=64, overlap=0, tiling="fast")[:, :, :64]
    dark = image[:, :, :64].contiguous()
    latent = {"samples": restoration.latent["samples"][..., :8].contiguous()}
    alone = decode(dark, samples=latent, degradation=restoration.degradation)
    before = (tiled - alone).abs().mean()
    assert before > 1e-3
    model, statistics = restorer.fusion.model, photo_statistics(image.movedim(-1, 1))
    condition = model.condition(restoration.degradation.pooled, statistics)
    monkeypatch.setattr(model, "condition", lambda *_: condition)
    alone = decode(dark, samples=latent, degradation=restoration.degradation)
    assert (tiled - alone).abs().mean() < before / 20


def test_it_goes_by_the_degradation_of_each_place(toy, decode, restorer, photo, look) -> None:
    image = torch.cat([photo(64, 96), 1 - photo(64, 96, seed=3)], dim=2)
    inputs = {"model": toy.model, "diff_restorer": restorer, "tile_size": 64, "overlap": 16}
    local = look("DiffRestorerTiledDiffusion", image, **inputs)[2]
    by_place = decode(image, degradation=local)
    assert (by_place - decode(image)).abs().mean() > 1e-4
    exact = decode(image, degradation=local, tile_size=64)
    assert (255 * (exact - by_place)).abs().max() < 0.02


def test_features_travel_with_the_latent(toy, decode, prepare, restorer, photo, calls) -> None:
    image = photo(64, 64)
    latent = prepare(image, diff_restorer=restorer).latent
    passes = calls(toy.vae.first_stage_model.encoder.conv_in, "forward")
    found = decode(image, samples=latent)
    assert len(passes) == 1  # of the fixture's own Degradation Control
    assert torch.equal(found, decode(image, samples={"samples": latent["samples"]}))
    assert len(passes) == 3
