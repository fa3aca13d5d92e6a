"""Degradation Control inside the host's sampling, against the host's own ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests import toy_weights
from tests.nodes.test_decode import VAES_OF_OTHER_LATENTS


def evaluate(
    control: Any, model: Any, context: torch.Tensor, batch: int = 1, size: int = 8
) -> dict:
    """One evaluation outside the sampler, at half of the noise."""
    percent_to_sigma = model.model.model_sampling.percent_to_sigma
    control.pre_run(model.model, percent_to_sigma)
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(batch, 4, size, size, generator=generator)
    sigma = torch.full((batch,), percent_to_sigma(0.5))
    return control.get_control(noisy, sigma, {"c_crossattn": context}, 1, {})


def stock_control(toy: SimpleNamespace, seed: int = 20) -> Any:
    """A ControlNet of the host for the toy UNet, with a picture as its hint."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management

    config = dict(toy.model.model.model_config.unet_config)
    for entry in ("out_channels", "dtype"):
        config.pop(entry, None)
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
    shapes = ((key, tuple(tensor.shape)) for key, tensor in net.state_dict().items())
    net.load_state_dict(toy_weights.random_state(shapes, seed=seed))
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(net.eval(), load_device=device)


def test_is_the_stock_controlnet_where_the_hint_is_zero(toy, prepare, photo, keep) -> None:
    """Same weights, same context, no hint: bit for bit the host's ControlNet."""
    restoration = prepare(photo())
    ours, stock = restoration.control, stock_control(toy)
    weights = {k: v for k, v in ours.network.state_dict().items() if "hint" not in k}
    stock.control_model.load_state_dict(weights, strict=False)
    hint_conv = ours.network.input_hint_block[0]
    keep(hint_conv)
    last = stock.control_model.input_hint_block[-1]
    for parameter in (*hint_conv.parameters(), *last.parameters()):
        parameter.zero_()
    tokens = restoration.degradation.tokens
    picture = photo().movedim(-1, 1)
    expected = evaluate(stock.set_cond_hint(picture), toy.model, tokens)
    found = evaluate(ours, toy.model, torch.zeros_like(tokens))
    for part in ("output", "middle"):
        assert len(found[part]) == len(expected[part]) > 0
        assert all(map(torch.equal, found[part], expected[part]))
        assert all(tensor.abs().max() > 0.01 for tensor in found[part])


def test_hint_is_the_scaled_latent(toy, prepare, photo, calls) -> None:
    restoration = prepare(photo())
    forwards = calls(restoration.control.network.input_hint_block, "forward")
    evaluate(restoration.control, toy.model, restoration.degradation.tokens)
    (hint, *_), _ = forwards[0]
    torch.testing.assert_close(hint, restoration.latent["samples"] * 0.18215)


@pytest.mark.parametrize("ours_last", [True, False])
def test_every_link_of_a_chain_has_its_own_context(
    toy, prepare, photo, calls, ours_last: bool
) -> None:
    """Ours attends to P_D, the ControlNet before or after it to the prompt; both are added."""
    restoration = prepare(photo())
    prompt = restoration.prompts[0][0][0]
    ours, stock = restoration.control, stock_control(toy).set_cond_hint(photo().movedim(-1, 1), 0.7)
    alone = [evaluate(control, toy.model, prompt) for control in (ours, stock)]
    of_ours, of_stock = (calls(control.control_model, "forward") for control in (ours, stock))
    first, last = (stock, ours) if ours_last else (ours, stock)
    together = evaluate(last.copy().set_previous_controlnet(first), toy.model, prompt)
    assert torch.equal(of_stock[-1].kwargs["context"], prompt)
    assert torch.equal(of_ours[-1].kwargs["degradation"], restoration.degradation.tokens)
    for part in ("output", "middle"):
        for both, a, b in zip(together[part], alone[0][part], alone[1][part], strict=True):
            torch.testing.assert_close(both, a + b)


@pytest.mark.parametrize("cfg", [1.0, 7.5])
@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "ddim"])
def test_sampling_in_a_chain(toy, prepare, photo, sample, cfg: float, sampler: str) -> None:
    """Applied before and after a stock ControlNet by the host's node: the same picture. Not so
    between two of them."""
    import nodes

    apply = nodes.ControlNetApplyAdvanced().apply_controlnet  # type: ignore
    image = photo()
    plain = prepare(image)
    before = apply(*plain.prompts, stock_control(toy), image, 0.5, 0.0, 1.0)
    ours_last = prepare(image, positive=before[0], negative=before[1])
    stock_last = apply(plain.positive, plain.negative, stock_control(toy), image, 0.5, 0.0, 1.0)
    a = sample(ours_last.positive, ours_last.negative, plain.latent, cfg=cfg, sampler=sampler)
    b = sample(*stock_last, plain.latent, cfg=cfg, sampler=sampler)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    only = sample(plain.positive, plain.negative, plain.latent, cfg=cfg, sampler=sampler)
    assert not torch.allclose(a, only, rtol=1e-2, atol=1e-2)
    between = apply(
        ours_last.positive, ours_last.negative, stock_control(toy, 21), image, 0.5, 0.0, 1.0
    )
    c = sample(*between, plain.latent, cfg=cfg, sampler=sampler)
    assert not torch.allclose(c, a, rtol=1e-2, atol=1e-2)


def test_shared_between_positive_and_negative(prepare, photo) -> None:
    restoration = prepare(photo())
    assert restoration.positive[0][1]["control"] is restoration.negative[0][1]["control"]
    assert restoration.positive[0][1]["control_apply_to_uncond"] is False


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_costs_of_a_restoration(toy, prepare, photo, sample, calls, cfg: float) -> None:
    """One VAE encode in all, and per step one evaluation of the control, with CFG and without."""
    encodes = calls(toy.vae.first_stage_model.encoder.conv_in, "forward")
    restoration = prepare(photo())
    assert len(encodes) == 1
    forwards = calls(restoration.control.network, "forward")
    sample(restoration.positive, restoration.negative, restoration.latent, steps=4, cfg=cfg)
    assert len(forwards) == 4
    assert len(encodes) == 1


def test_strength_zero_is_not_there(toy, prepare, photo, sample) -> None:
    restoration = prepare(photo(), strength=0.0)
    assert restoration.positive is restoration.prompts[0]
    assert restoration.negative is restoration.prompts[1]
    assert restoration.latent["samples"].shape == (1, 4, 8, 8)


def test_strength_scales_what_is_added(toy, prepare, photo) -> None:
    whole, half = prepare(photo()), prepare(photo(), strength=0.5)
    context = whole.degradation.tokens
    a = evaluate(whole.control, toy.model, context)["middle"][0]
    b = evaluate(half.control, toy.model, context)["middle"][0]
    torch.testing.assert_close(b, a / 2)


def test_acts_within_its_percents_only(toy, prepare, photo) -> None:
    context = prepare(photo()).degradation.tokens
    early = prepare(photo(), start_percent=0.0, end_percent=0.3)
    late = prepare(photo(), start_percent=0.7, end_percent=1.0)
    around = prepare(photo(), start_percent=0.4, end_percent=0.6)
    assert evaluate(early.control, toy.model, context) is None
    assert evaluate(late.control, toy.model, context) is None
    assert evaluate(around.control, toy.model, context) is not None


def test_percents_in_the_wrong_order(prepare, photo) -> None:
    with pytest.raises(ValueError, match=r"start_percent: 0.8 is after end_percent 0.2"):
        prepare(photo(), start_percent=0.8, end_percent=0.2)


def test_copy_keeps_class_and_degradation(toy, prepare, photo) -> None:
    restoration = prepare(photo())
    control, context = restoration.control, restoration.degradation.tokens
    copy = control.copy()
    assert type(copy) is type(control) is type(toy.restorer.control)
    assert copy.control_model_wrapped is control.control_model_wrapped
    a, b = (evaluate(c, toy.model, context)["middle"][0] for c in (control, copy))
    assert torch.equal(a, b)


def test_other_tools_may_crop_the_hint(toy, prepare, photo, calls) -> None:
    """As UltimateSDUpscale does: a copy with another hint is encoded anew, the first one is not."""
    image = photo(64, 64)
    restoration = prepare(image)
    encodes = calls(toy.vae.first_stage_model.encoder.conv_in, "forward")
    tile = restoration.control.copy()
    tile.cond_hint_original = tile.cond_hint_original[:, :, :32, 32:]
    context = restoration.degradation.tokens
    found = evaluate(tile, toy.model, context, size=4)["middle"][0]
    assert len(encodes) == 1
    direct = prepare(image[:, :32, 32:])
    direct.control.set_extra_arg("degradation", restoration.degradation.tokens)
    torch.testing.assert_close(
        found, evaluate(direct.control, toy.model, context, size=4)["middle"][0]
    )
    evaluate(restoration.control, toy.model, context)
    assert len(encodes) == 2  # the tile and the direct run; never the whole photo again


def test_stale_hint_after_an_interrupt(toy, prepare, photo, sample) -> None:
    """The host does not clean up after an interrupt; the next run is right nevertheless."""
    from .faults import interrupted_at

    restoration = prepare(photo())
    args = (restoration.positive, restoration.negative, restoration.latent)
    expected = sample(*args)

    with interrupted_at(restoration.control.network):
        sample(*args)
    assert restoration.control.cond_hint is not None, "nothing stale: this test tests nothing"
    restoration.control.cond_hint.zero_()
    assert torch.equal(sample(*args), expected)


def test_a_batch_equals_its_photos_one_by_one(prepare, photo, sample) -> None:
    images = photo(batch=2)
    batch = prepare(images)
    together = sample(batch.positive, batch.negative, batch.latent, cfg=7.5)
    for index in range(2):
        single = prepare(images[index : index + 1])
        # Noise depends on the place in the batch: draw it for both places and keep one.
        latent = {"samples": single.latent["samples"].repeat(2, 1, 1, 1)}
        alone = sample(single.positive, single.negative, latent, cfg=7.5)
        torch.testing.assert_close(together[index], alone[index], rtol=1e-3, atol=1e-3)


def test_one_photo_for_many_latents(prepare, photo, sample) -> None:
    restoration = prepare(photo())
    latent = {"samples": restoration.latent["samples"].repeat(3, 1, 1, 1)}
    assert sample(restoration.positive, restoration.negative, latent, cfg=3.0).shape[0] == 3


def test_batches_that_do_not_go_together(toy, prepare, photo, sample) -> None:
    three = prepare(photo(batch=3))
    with pytest.raises(ValueError, match=r"image 2, degradation 3.*must be equal, or 1"):
        prepare(photo(batch=2), degradation=three.degradation)
    latent = {"samples": three.latent["samples"][:2]}
    with pytest.raises(ValueError, match=r"latent_image: a batch of 2, .* given 3 photos"):
        sample(three.positive, three.negative, latent)


def test_photos_that_are_more_than_the_degradation(toy, prepare, photo, sample) -> None:
    """The host would take the first photo again for the third latent."""
    two = prepare(photo(batch=2), degradation=prepare(photo()).degradation)
    latent = {"samples": two.latent["samples"][:1].repeat(3, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"latent_image: a batch of 3, .* given 2 photos"):
        sample(two.positive, two.negative, latent)


def test_a_latent_of_another_size_gets_a_smooth_hint(toy, prepare, photo, calls) -> None:
    """Bicubic and within 0 to 1, where the host's ControlNets take the nearest pixel."""
    import comfy.utils

    restoration = prepare(photo())
    encoded = calls(toy.vae, "encode")
    evaluate(restoration.control, toy.model, restoration.degradation.tokens, size=16)
    (pixels,) = encoded[0][0]
    enlarged = comfy.utils.common_upscale(photo().movedim(-1, 1), 128, 128, "bicubic", "disabled")
    torch.testing.assert_close(pixels, enlarged.clamp(0, 1).movedim(1, -1))


def test_one_degradation_for_many_photos(toy, prepare, photo, sample) -> None:
    one = prepare(photo())
    many = prepare(photo(batch=2), degradation=one.degradation)
    assert sample(many.positive, many.negative, many.latent).shape[0] == 2


def test_areas_masks_and_their_costs(toy, prepare, photo, sample, calls) -> None:
    """Two areas of two sizes and a mask: each size is encoded once, not once per step."""
    import nodes

    restoration = prepare(photo())
    tokens, extra = restoration.positive[0]
    left = [tokens, extra | {"area": (8, 4, 0, 0), "strength": 1.0}]
    top = [tokens, extra | {"area": (4, 8, 0, 0), "strength": 1.0}]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    masked = nodes.ConditioningSetMask().append(  # type: ignore
        restoration.positive, mask, "default", 1.0
    )[0]
    encodes = calls(toy.vae, "encode")
    out = sample([left, top, *masked], restoration.negative, restoration.latent, steps=3, cfg=2.0)
    assert torch.isfinite(out).all()
    assert len(encodes) == 2


@pytest.mark.parametrize("size", [(61, 75), (8, 200), (1, 1), (7, 9)])
def test_sizes_that_are_no_multiples_of_8(prepare, photo, sample, size: tuple[int, int]) -> None:
    restoration = prepare(photo(*size))
    expected = tuple(-(-side // 8) for side in size)
    assert restoration.latent["samples"].shape[-2:] == expected
    out = sample(restoration.positive, restoration.negative, restoration.latent, cfg=2.0)
    assert torch.isfinite(out).all()


def test_inputs_are_not_changed(toy, prepare, photo) -> None:
    image = photo(61, 75)
    before, plain = image.clone(), prepare(photo(61, 75))
    entry = plain.prompts[0][0]
    keys, tokens = set(entry[1]), entry[0].clone()
    prepare(image, positive=plain.prompts[0], negative=plain.prompts[1])
    assert torch.equal(image, before)
    assert set(entry[1]) == keys
    assert torch.equal(entry[0], tokens)


def sdxl() -> Any:
    """SDXL at toy width: its context and its size embedding are what matters here."""
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models

    state = toy_weights.random_state(toy_weights.unet_shapes(toy_weights.UNetSizes(context=2048)))
    for key, width in (("0", 2816), ("2", 128)):
        state[f"label_emb.0.{key}.weight"] = torch.zeros(128, width)
        state[f"label_emb.0.{key}.bias"] = torch.zeros(128)
    heads = {"num_heads": 8, "num_head_channels": -1}
    config = comfy.supported_models.SDXL(comfy.model_detection.detect_unet_config(state, ""))
    config.unet_config |= heads
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "")
    model.load_model_weights(state, "")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_a_model_of_another_family(prepare, photo, sample_on, cfg: float) -> None:
    message = r"model: its cross-attention is 2048 wide, .* file needs 32.*SDXL \(2048\)"
    with pytest.raises(ValueError, match=message):
        sample_on(sdxl(), prepare(photo()), cfg=cfg)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": 64}, "its model_channels is 64, this Diff-Restorer file needs 32"),
        ({"mult": (1, 1)}, r"its channel_mult is \[1, 1\], .* needs \[1, 2\]"),
    ],
)
def test_a_model_of_another_size(
    prepare, photo, sample_on, pack: ModuleType, tmp_path, sizes: dict, message: str
) -> None:
    """Which the host would sample without what does not fit, and a line in its log."""
    unet = toy_weights.UNetSizes(**sizes)
    path = tmp_path / "other.safetensors"
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors(unet=unet)
    pack.diff_restorer.checkpoint.write_checkpoint(path, tensors, toy_weights.info())
    model, *_ = pack.nodes.host_nano.load_nano(path)
    with pytest.raises(ValueError, match=f"model: {message}"):
        sample_on(model, prepare(photo()), steps=1)


def test_a_degradation_of_another_file(prepare, photo) -> None:
    degradation = prepare(photo()).degradation
    foreign = replace(degradation, tokens=torch.zeros(1, 16, 768), pooled=torch.zeros(1, 768))
    with pytest.raises(
        ValueError, match=r"degradation: it is 768 wide, nano\.safetensors needs 32"
    ):
        prepare(photo(), degradation=foreign)


@pytest.mark.parametrize(("make", "message"), VAES_OF_OTHER_LATENTS)
def test_other_vaes(prepare, photo, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(photo(), vae=make())
