"""Aware VAE Decode against the host's own decode."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any
from unittest import mock

import pytest
import torch

from tests import toy_weights


@pytest.fixture
def decode(toy, decode_with, photo) -> Any:
    """The node on a photo's own latent, as if nothing had been restored."""

    def execute(image: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        return decode_with(toy.restorer, photo() if image is None else image, **inputs)

    return execute


def stock_decode(vae: Any, latent: dict) -> torch.Tensor:
    import nodes

    return nodes.VAEDecode().decode(vae, latent)[0]  # type: ignore


@pytest.mark.parametrize("batch", [1, 3])
def test_fidelity_zero_is_the_stock_decode(toy, decode, prepare, photo, batch: int) -> None:
    image = photo(batch=batch)
    expected = stock_decode(toy.vae, prepare(image).latent)
    assert torch.equal(decode(image, fidelity=0.0), expected)
    assert not torch.allclose(decode(image), expected, atol=1e-2)


def test_the_photo_is_encoded_once_for_the_whole_graph(
    toy, decode, prepare, photo, calls, run
) -> None:
    """Features travel with the latent through the sampler; a lost or wrong one is made again."""
    import nodes

    passes = calls(toy.vae.first_stage_model.encoder.conv_in, "forward")
    restoration = prepare(photo())
    (out,) = nodes.common_ksampler(  # type: ignore
        toy.model, 1, 2, 1.0, "euler", "normal",
        restoration.positive, restoration.negative, restoration.latent,
    )  # fmt: skip
    entries = {"degradation": restoration.degradation, "image": photo()}
    inputs = {"vae": toy.vae, "diff_restorer": toy.restorer} | entries
    found = run("DiffRestorerAwareVAEDecode", samples=out, **inputs)[0]
    assert len(passes) == 1
    lost = {"samples": out["samples"]}
    assert torch.equal(run("DiffRestorerAwareVAEDecode", samples=lost, **inputs)[0], found)
    assert len(passes) == 2
    run("DiffRestorerAwareVAEDecode", samples=lost, fidelity=0.0, **inputs)
    assert len(passes) == 2
    changed = inputs | {"image": 1 - photo()}
    expected = run("DiffRestorerAwareVAEDecode", samples=lost, **changed)[0]
    assert torch.equal(run("DiffRestorerAwareVAEDecode", samples=out, **changed)[0], expected)
    assert len(passes) == 4


@pytest.mark.parametrize("size", [(64, 64), (61, 75)])
def test_the_encode_is_the_host_s_own(toy, pack, prepare, photo, size: tuple[int, int]) -> None:
    image = photo(*size, batch=2)
    expected = toy.vae.encode(pack.nodes.images.pad_to_multiple(image, 8))
    assert torch.equal(prepare(image).latent["samples"], expected)


@pytest.mark.parametrize("cause", ["little free memory", "out of memory"])
def test_large_photos_are_encoded_in_exact_tiles(
    toy, pack, decode, prepare, photo, monkeypatch, caplog, calls, cause: str
) -> None:
    """In tiles of 128 px, latent and features are nearly those of the whole photos."""
    import comfy.model_management

    image = photo(200, 300, batch=2)
    expected, passes = prepare(image).latent, calls(toy.vae.first_stage_model.encoder, "forward")
    host_encode = pack.nodes.host_encode
    monkeypatch.setattr(host_encode, "AUTO_TILE", 128)
    if cause == "out of memory":
        fail = mock.Mock(side_effect=comfy.model_management.OOM_EXCEPTION("toy"))
        monkeypatch.setattr(host_encode, "_encode_whole", fail)
    else:
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2**22)
    with caplog.at_level(logging.INFO):
        found = prepare(image).latent
    assert "encoded in exact tiles of 128 px" in caplog.text
    assert ("out of memory, trying again in tiles" in caplog.text) == (cause == "out of memory")
    assert not passes  # the host's own encode was not asked
    spread = expected["samples"].std()
    assert (found["samples"] - expected["samples"]).abs().max() < 0.05 * spread
    assert found["samples"].dtype == expected["samples"].dtype
    key = host_encode.PhotoFeatures.KEY
    for level, features in expected[key].by_level.items():
        error = (found[key].by_level[level].float() - features).abs()
        assert error.max() < 0.05 * features.std()


def test_features_that_are_too_large_stay_behind(pack, decode, prepare, photo, monkeypatch) -> None:
    expected = decode(photo())
    monkeypatch.setattr(pack.nodes.host_encode, "MOST_FEATURES", 1000)
    latent = prepare(photo()).latent
    assert set(latent) == {"samples"}
    assert torch.equal(decode(photo(), samples=latent), expected)


def test_features_of_many_photos_are_bounded(toy, pack, prepare, photo, monkeypatch) -> None:
    """As of a folder, whose latents the host keeps all at once."""
    key = pack.nodes.host_encode.PhotoFeatures.KEY
    first = prepare(photo()).latent
    carried = sum(each.get_ram_usage() for each in toy.restorer.carried)
    monkeypatch.setattr(
        pack.nodes.host_encode, "MOST_FEATURES", carried + first[key].get_ram_usage()
    )
    second = prepare(photo(seed=1)).latent
    assert key in second
    assert key not in prepare(photo(seed=2)).latent
    del second
    assert key in prepare(photo(seed=2)).latent


def test_exact_tiles_read_carried_features(toy, decode, prepare, photo, calls) -> None:
    image = photo(100, 150, batch=2)
    restoration = prepare(image)
    passes = calls(toy.vae.first_stage_model.encoder.conv_in, "forward")
    found = decode(
        image, samples=restoration.latent, degradation=restoration.degradation, tile_size=64
    )
    assert len(passes) == 1  # of the fixture's own Degradation Control
    error = (found - decode(image)).abs() * 255
    assert error.max() < 0.02


def test_an_untrained_fusion_is_the_stock_decode(toy, decode, prepare, photo, keep) -> None:
    """Fusion blocks end in zero convs, which training starts from."""
    blocks = toy.restorer.fusion.model
    keep(blocks)
    for block in blocks.values():
        for parameter in block.out.parameters():
            parameter.zero_()
    expected = stock_decode(toy.vae, prepare(photo()).latent)
    assert torch.equal(decode(fidelity=1.0), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_identity_in_both_number_formats(
    toy, pack, prepare, photo, run, monkeypatch, bf16: bool
) -> None:
    """The loader takes bf16 where the CPU has it; the identity holds in either."""
    nano = pack.nodes.host_nano
    dtype = torch.bfloat16 if bf16 else None
    monkeypatch.setattr(nano, "nano_unet_dtype", lambda: dtype)
    monkeypatch.setattr(nano, "nano_vae_dtype", lambda: dtype)
    model, clip_vision, vae, restorer = nano.load_nano(toy.path)
    wanted = dtype or torch.float32
    assert {model.model.get_dtype(), vae.vae_dtype, restorer.control.network.dtype} == {wanted}
    loaded = {"diff_restorer": restorer, "vae": vae, "image": photo(60, 68)}
    positive, negative, degradation = run(
        "DiffRestorerPromptProcessor",
        diff_restorer=restorer, clip_vision=clip_vision, image=photo(60, 68),
    )  # fmt: skip
    *prompts, latent = run(
        "DiffRestorerDegradationControl",
        positive=positive, negative=negative, degradation=degradation, **loaded,
    )  # fmt: skip
    import nodes

    (out,) = nodes.common_ksampler(  # type: ignore
        model, 1, 2, 1.0, "euler", "normal", *prompts, latent
    )
    found = run(
        "DiffRestorerAwareVAEDecode",
        samples=out, degradation=degradation, fidelity=0.0, **loaded,
    )  # fmt: skip
    assert torch.equal(found[0], stock_decode(vae, out)[:, :60, :68])


def test_fidelity_goes_from_stock_to_full(decode) -> None:
    zero, half, one = (decode(fidelity=w) for w in (0.0, 0.5, 1.0))
    assert (half - zero).abs().mean() < (one - zero).abs().mean()


@pytest.mark.parametrize("size", [(61, 75), (8, 200), (1, 1), (9, 7), (64, 64)])
@pytest.mark.parametrize("tile", [0, 64])
def test_exact_size(decode, photo, size: tuple[int, int], tile: int) -> None:
    restored = decode(photo(*size), tile_size=tile, overlap=16)
    assert restored.shape == (1, *size, 3)
    assert restored.min() >= 0
    assert restored.max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels(decode, photo, channels: int) -> None:
    """Grey becomes RGB; transparency comes back as it was."""
    image = photo(40, 40, channels=channels)
    restored = decode(image)
    has_alpha = channels in (2, 4)
    assert restored.shape == (1, 40, 40, 4 if has_alpha else 3)
    if has_alpha:
        assert torch.equal(restored[..., 3:], image[..., -1:])
    if channels == 1:
        assert torch.equal(restored, decode(image.expand(-1, -1, -1, 3).contiguous()))


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_one_tile_is_the_whole_picture(decode, photo, fidelity: float) -> None:
    whole = decode(photo(), fidelity=fidelity)
    fast = decode(photo(), fidelity=fidelity, tile_size=128, overlap=32, tiling="fast")
    torch.testing.assert_close(fast, whole, rtol=0, atol=1e-4)
    exact = decode(photo(), fidelity=fidelity, tile_size=128)
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
@pytest.mark.parametrize("size", [(150, 200), (64, 70), (9, 300), (300, 1)])
def test_exact_tiles_are_the_whole_picture(decode, photo, fidelity: float, size: Any) -> None:
    image = photo(*size, batch=2)
    whole = decode(image, fidelity=fidelity)
    error = (decode(image, fidelity=fidelity, tile_size=64) - whole).abs() * 255
    assert error.max() < 0.02


def _fused_norm(norm: torch.nn.GroupNorm, value: torch.Tensor) -> torch.Tensor:
    """As a host to come might have it: the same sums, by a function that nobody sees."""
    weight, bias = (each.to(value) for each in (norm.weight, norm.bias))
    return torch.native_group_norm(
        value, weight, bias, len(value), value.shape[1], value[0, 0].numel(), norm.num_groups,
        norm.eps,
    )[0]  # fmt: skip


def test_norms_that_exact_tiles_cannot_reach_make_them_fast(
    toy, pack, decode, prepare, photo, monkeypatch, caplog
) -> None:
    """Instead of the statistics of each tile in the place of the picture's, without a word."""
    norms = [m for m in toy.vae.first_stage_model.modules() if isinstance(m, torch.nn.GroupNorm)]
    for norm in norms:
        monkeypatch.setattr(norm, "forward", functools.partial(_fused_norm, norm))
    image = photo(128, 128)
    fast = decode(image, tile_size=64, overlap=16, tiling="fast")
    assert torch.equal(decode(image, tile_size=64, overlap=16), fast)
    assert "Using fast tiles" in caplog.text
    monkeypatch.setattr(pack.nodes.host_encode, "AUTO_TILE", 64)
    monkeypatch.setattr(pack.nodes.host_encode, "at_once", lambda *_: 0)
    assert pack.nodes.host_encode.PhotoFeatures.KEY not in prepare(image).latent
    assert "Using the host's tiles" in caplog.text


def test_fast_tiles_see_their_own_part_of_each_photo(decode, prepare, photo) -> None:
    """Without overlap the tiles are the decodes of the parts of latent and photo."""
    image = photo(64, 128, batch=2)
    restoration = prepare(image)
    latent, degradation = restoration.latent["samples"], restoration.degradation
    tiled = decode(image, tile_size=64, overlap=0, tiling="fast")
    for index in range(2):
        columns, cells = slice(64 * index, 64 * index + 64), slice(8 * index, 8 * index + 8)
        alone = decode(
            image[:, :, columns], samples={"samples": latent[..., cells]}, degradation=degradation
        )
        torch.testing.assert_close(tiled[:, :, columns], alone, rtol=0, atol=1e-4)


def test_latents_are_a_multiple_of_the_photos(decode, prepare, photo) -> None:
    many = photo(batch=2)
    restoration = prepare(many)
    latent = restoration.latent["samples"]
    expected = decode(many, samples={"samples": latent})
    twice = decode(many, samples={"samples": latent.repeat(2, 1, 1, 1)})
    four = decode(many.repeat(2, 1, 1, 1), samples={"samples": latent.repeat(2, 1, 1, 1)})
    torch.testing.assert_close(twice, four, rtol=0, atol=1e-5)
    first = decode(many[:1], samples=restoration.latent, degradation=prepare(many[:1]).degradation)
    torch.testing.assert_close(first[:1], expected[:1], rtol=0, atol=1e-5)
    assert first.shape[0] == 2
    with pytest.raises(ValueError, match="image: of 3 photos, but samples hold 2 latents"):
        decode(photo(batch=3), samples=restoration.latent)
    with pytest.raises(ValueError, match=r"image: of 2 photos, .* 1 latents.*Latent From Batch"):
        decode(many, samples={"samples": latent[:1]})
    with pytest.raises(ValueError, match="degradation: of 2 photos, but samples hold 1 latents"):
        decode(many[:1], samples={"samples": latent[:1]}, degradation=restoration.degradation)
    with pytest.raises(ValueError, match="image 3, degradation 2"):
        decode(photo(batch=3), samples=restoration.latent, degradation=restoration.degradation)


def test_batch_equals_photos_one_by_one(decode, photo) -> None:
    images = photo(batch=3)
    alone = torch.cat([decode(images[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(decode(images), alone, rtol=0, atol=1e-4)


def test_finetuned_decoder(toy, pack, decode, toy_folder, keep) -> None:
    """Its weights replace those of the VAE's decoder, and only in this decode."""
    path = toy_weights.write_restorer(toy_folder / "tuned.safetensors", tuned_decoder=True)
    restorer = pack.nodes.host_models.load_restorer(path)
    module = toy.vae.first_stage_model
    keep(module)
    found = decode(diff_restorer=restorer, fidelity=0.0)
    assert not torch.allclose(found, decode(fidelity=0.0), atol=1e-2)
    module.load_state_dict(module.state_dict() | restorer.tuned_decoder.model.state_dict())
    assert torch.equal(found, decode(fidelity=0.0))


def test_without_a_decoder_in_the_file(toy, pack, decode, prepare, photo, toy_folder) -> None:
    path = toy_weights.write_restorer(toy_folder / "plain.safetensors", fusion_levels=())
    restorer = pack.nodes.host_models.load_restorer(path)
    found = decode(diff_restorer=restorer)
    assert torch.equal(found, stock_decode(toy.vae, prepare(photo()).latent))


def test_out_of_memory_falls_back_to_tiles_once(toy, decode, calls, caplog, photo) -> None:
    from .faults import out_of_memory_at

    decoder = toy.vae.first_stage_model.decoder
    with out_of_memory_at(decoder.conv_in), caplog.at_level(logging.WARNING):
        found = decode(photo(64, 72))
    assert "out of memory, trying again in tiles" in caplog.text
    torch.testing.assert_close(found, decode(photo(64, 72)), rtol=0, atol=4 / 255)


@pytest.mark.parametrize("tiling", ["exact", "fast"])
def test_out_of_memory_in_tiles_takes_smaller_ones(toy, decode, caplog, photo, tiling: str) -> None:
    from .faults import out_of_memory_at

    decoder = toy.vae.first_stage_model.decoder
    expected = decode(photo(64, 300), tile_size=128, tiling=tiling)
    with out_of_memory_at(decoder.conv_out), caplog.at_level(logging.WARNING):
        found = decode(photo(64, 300), tile_size=256, tiling=tiling)
    assert caplog.text.count("out of memory, trying tiles of 128 px") == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_out_of_memory_in_tiles_goes_to_the_host(toy, decode) -> None:
    import comfy.model_management

    from .faults import out_of_memory_at

    with (
        out_of_memory_at(toy.vae.first_stage_model.decoder.conv_in, math.inf),
        pytest.raises(comfy.model_management.OOM_EXCEPTION),
    ):
        decode()


def test_too_large_for_memory_uses_tiles_at_once(decode, photo, monkeypatch, caplog) -> None:
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2**22)
    with caplog.at_level(logging.INFO):
        decode(photo(64, 64))
    assert "decoded in exact tiles of 512 px" in caplog.text


def test_maps_that_are_too_large_for_memory_go_to_the_temporary_folder(
    decode, prepare, photo, monkeypatch, calls
) -> None:
    import comfy.model_management
    import folder_paths

    known = prepare(photo(64, 64))
    inputs = {"samples": known.latent, "degradation": known.degradation, "tile_size": 64}
    expected = decode(photo(64, 64), **inputs)
    folders = calls(folder_paths, "get_temp_directory")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2**20)
    error = (decode(photo(64, 64), **inputs) - expected).abs() * 255
    assert error.mean() < 0.5  # of fp32, files keep 16 bits
    assert error.max() < 5
    assert folders


@pytest.mark.parametrize("tiling", ["exact", "fast"])
def test_interrupt(decode, photo, tiling: str) -> None:
    """Cancelled after the first of several tiles: the second one is not decoded."""
    import comfy.model_management
    import comfy.utils

    tiles = []

    def cancel(*_: Any, **__: Any) -> None:
        tiles.append(1)
        comfy.model_management.interrupt_current_processing()

    image = photo(64, 200)
    comfy.utils.set_progress_bar_global_hook(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decode(image, tile_size=64, overlap=16, tiling=tiling)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert len(tiles) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"fidelity": 1.5}, "fidelity: 1.5, expected 0 to 1"),
        ({"tile_size": 64, "overlap": 40, "tiling": "fast"}, "overlap: 40 px with tiles of 64 px"),
        ({"tile_size": 32}, "tile_size: 32 px"),
        ({"tile_size": 100}, "tile_size: 100 px"),
        ({"tiling": "other"}, "tiling: 'other', expected exact or fast"),
        (
            {"samples": {"samples": torch.zeros(1, 4, 9, 8)}},
            "a latent of 64 x 72 px, .* 64 x 64 px",
        ),
        (
            {"samples": {"samples": torch.zeros(1, 4, 1, 8, 8)}},
            "samples: expected latents of",
        ),
    ],
)
def test_wrong_values(decode, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(**inputs)


def taesd() -> Any:
    import comfy.sd
    import comfy.taesd.taesd

    model = comfy.taesd.taesd.TAESD(latent_channels=4)
    return comfy.sd.VAE(sd=model.state_dict())


def vae_of(sizes: toy_weights.VaeSizes) -> Any:
    import comfy.sd

    return comfy.sd.VAE(sd=toy_weights.random_state(toy_weights.vae_shapes(sizes)))


VAES_OF_OTHER_LATENTS = [
    (taesd, "vae: found a TAESD, but nano.* was trained with an AutoencoderKL"),
    (
        lambda: vae_of(toy_weights.VaeSizes(128, (1, 2, 4, 4), 2, 16)),
        "vae: its latents have 16 channels at 1/8 size",
    ),
]
"""How each is made, and what is said of it. No size tells the first one."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *VAES_OF_OTHER_LATENTS,
        (
            lambda: vae_of(toy_weights.SD15_VAE),
            "vae: found a .* with 128 channels at 1/1 size, but nano.* with 32",
        ),
    ],
)
def test_other_vaes(decode, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(vae=make())


def test_inputs_are_not_changed(decode, prepare, photo) -> None:
    image = photo(61, 75, channels=4)
    restoration = prepare(image)
    kept = [
        t.clone() for t in (image, restoration.latent["samples"], restoration.degradation.pooled)
    ]
    decode(image, samples=restoration.latent, degradation=restoration.degradation)
    now = (image, restoration.latent["samples"], restoration.degradation.pooled)
    assert all(map(torch.equal, kept, now))
