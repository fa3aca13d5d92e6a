"""Gradients reach every trainable tensor and no frozen one, each from the terms that should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diff_restorer import FusionBlocks
from diff_restorer.detail import SLOW, DetailPath
from tests.training import toy_sd15
from tests.training.test_programs import TOY
from training import train_control, train_decoder
from training.common import DataConfig, ModelConfig, open_models
from training.diffusion import TIMESTEPS, scheduler
from training.loop import LoopConfig
from training.models import Models, clip_tokens, to_pixels
from training.train_decoder import GanConfig, doubted

LOOP = LoopConfig(out=Path("never"), precision="no")
DATA = DataConfig(Path("never"), crop=32)
LAST_BIAS = "11.bias"
"""Of the discriminator: real and fake patches cancel in it while all scores are in the margin."""


@pytest.fixture(params=["nano", "sd15"])
def models(request: pytest.FixtureRequest, toy_folder: Path) -> Models:
    """Both layouts at toy width, and both decoders: Nano's has a detail path, SD 1.5's fusion
    blocks. Nothing is zero, or zero convs would stop all gradients; nor is the tone's share at an
    end of its range, which stops its own."""
    sd15 = request.param == "sd15"
    config = toy_sd15.model_config(toy_folder) if sd15 else ModelConfig(sizes=TOY)
    found, _ = open_models(config)
    found.start_control()
    generator = torch.Generator().manual_seed(0)
    for module in (found.control, found.prompt, found.decoder):
        for parameter in module.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05, generator=generator)
    if isinstance(found.decoder.extension, DetailPath):
        found.decoder.extension.toned.bias.data.fill_(0.5 / SLOW)
    return found


def batch_for(models: Models) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = models.sizes.vision_image
    shapes = {
        "gt": (2, 3, 32, 32), "lq": (2, 3, 32, 32), "clip_view": (2, 3, side, side),
        "native_view": (2, 3, side, side), "statistics": (2, 51),
    }  # fmt: skip
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    kinds = torch.zeros(2, len(models.types))
    kinds[0, 1] = kinds[1, 3] = kinds[1, 0] = 1
    severities = kinds * torch.tensor([[0.2], [0.8]])
    labels = {"label": torch.tensor([1, 3]), "kinds": kinds, "severities": severities}
    return batch | labels | {"part": torch.arange(2)}


def stage_1(models: Models, **changes: Any) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """What trains, and its terms on one batch."""
    settings: dict[str, Any] = {"semantic_dropout": 0.0} | changes
    config = train_control.Config(LOOP, DATA, **settings)
    trainable = train_control.prepare(models, config)
    loss, batch = train_control.make_loss(models, config), batch_for(models)
    return trainable, lambda: loss(batch, torch.Generator().manual_seed(2))


def stage_2(models: Models, **changes: Any) -> train_decoder.DecoderLoss:
    config = train_decoder.Config(LOOP, DATA, **changes)
    train_decoder.prepare(models, config)
    return train_decoder.DecoderLoss(models, config)


def terms_of(loss: train_decoder.DecoderLoss, models: Models, step: int = 0) -> dict[str, Tensor]:
    """Of stage 2, at a step, on one batch."""
    loss.begin_step(step)
    return loss(batch_for(models), torch.Generator().manual_seed(2))


def reached(module: nn.Module) -> set[str]:
    """Names of the parameters that some gradient reaches."""
    return {
        name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max()
    }


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def frozen_without_gradient(models: Models) -> bool:
    frozen = [p for p in models.parameters() if not p.requires_grad]
    return bool(frozen) and all(p.grad is None for p in frozen)


def test_stage_1_reaches_all_that_trains_and_nothing_else(models: Models) -> None:
    trainable, terms = stage_1(models)
    terms()["loss"].backward()
    assert reached(trainable) == names(trainable)
    assert frozen_without_gradient(models)
    assert not any(p.requires_grad for m in (models.unet, models.vae) for p in m.parameters())


def test_p_s_can_learn_without_the_encoder_of_the_unet(models: Models) -> None:
    """The loss and the control module's gradients stay; those of P_S come from half the way."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for way in ("unet", "decoder"):
        trainable, terms = stage_1(models, semantic_gradient=way)
        mse = terms()["mse"]
        mse.backward()
        assert {n for n in names(trainable) if ".semantic." in n} <= reached(trainable)
        p_s, control = (
            torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
            for part in (models.prompt.semantic, models.control)
        )
        kept.append((mse, p_s, control))
        trainable.zero_grad()
    (loss, p_s, control), (same, other, as_before) = kept
    torch.testing.assert_close(same, loss, rtol=0, atol=0)
    torch.testing.assert_close(as_before, control)
    assert not torch.allclose(other, p_s)


def test_first_steps_start_from_the_degraded_photo(models: Models) -> None:
    """About half the draws are at the last timestep, and only their latent follows LQ."""
    config = train_control.Config(LOOP, DATA, first_step=0.5, draws=20)
    train_control.prepare(models, config)
    loss, batch = train_control.make_loss(models, config), batch_for(models)
    with mock.patch.object(models, "denoise", wraps=models.denoise) as denoise:
        for lq in (batch["lq"], batch["lq"].flip(-1)):
            loss(batch | {"lq": lq}, torch.Generator().manual_seed(2))
    calls = [call.args[:3] for call in denoise.call_args_list]
    (noisy, timestep, hint), (other, again, other_hint) = calls
    assert torch.equal(timestep, again)
    first = timestep == TIMESTEPS - 1
    assert 10 < int(first.sum()) < 30
    left = float(scheduler().alphas_cumprod[-1].sqrt())
    torch.testing.assert_close((other - noisy)[first], left * (other_hint - hint)[first])
    assert torch.equal(noisy[~first], other[~first])
    assert not torch.equal(hint[~first], other_hint[~first])


def test_noise_mse_trains_everything_but_the_classifier(models: Models) -> None:
    _, terms = stage_1(models)
    terms()["mse"].backward()
    assert reached(models.control) == names(models.control)
    classifier = {"classifier.weight", "classifier.bias"}
    assert reached(models.prompt) == names(models.prompt) - classifier


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_classification_trains_the_degradation_branch_alone(models: Models, kind: str) -> None:
    trainable, terms = stage_1(models, classification=kind)
    terms()[kind].backward()
    expected = {n for n in names(models.prompt) if n.startswith(("degradation.", "classifier."))}
    assert reached(models.prompt) == expected
    assert reached(trainable) == {f"1.{name}" for name in expected}


def test_p_d_and_the_classifier_can_stay_as_they_are(models: Models) -> None:
    trainable, terms = stage_1(models, train_degradation=False)
    terms()["loss"].backward()
    kept = {f"1.{n}" for n in names(models.prompt) if n.startswith(("degradation.", "classifier."))}
    assert reached(trainable) == names(trainable) - kept


def test_control_without_p_d_leaves_the_degradation_branch_to_classification(
    models: Models,
) -> None:
    _, terms = stage_1(models, degradation_in_control="none")
    terms()["mse"].backward()
    assert not any(name.startswith("degradation.") for name in reached(models.prompt))


def test_p_d_in_the_time_embedding_starts_as_nothing_and_trains(models: Models) -> None:
    trainable, terms = stage_1(models, degradation_in_control="time")
    mlp = models.control.class_embedding
    assert not mlp.linear_2.weight.any()
    terms()["loss"].backward()
    assert {f"0.class_embedding.linear_2.{kind}" for kind in ("weight", "bias")} <= reached(
        trainable
    )
    nn.init.normal_(mlp.linear_2.weight)
    terms()["mse"].backward()
    assert any(name.startswith("degradation.") for name in reached(models.prompt))


def test_gradients_cross_the_frozen_encoder_because_of_p_s_alone(models: Models) -> None:
    """Why the frozen UNet's encoder is checkpointed, too."""
    seen: list[bool] = []
    models.unet.mid_block.resnets[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].requires_grad)
    )
    stage_1(models)[1]()
    stage_1(models, without_semantic=True)[1]()
    assert seen == [True, False]
    assert models.ablations == {"without_semantic"}


def test_the_control_module_starts_as_nothing_bit_for_bit(models: Models) -> None:
    models.start_control()
    models.leave_out("control_time")
    generator = torch.Generator().manual_seed(0)
    noisy, hint = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    width = models.sizes.context_width
    p_s, p_d = (torch.randn(2, 16, width, generator=generator) for _ in range(2))
    timestep = torch.tensor([10, 900])
    with torch.no_grad():
        alone = models.unet(noisy, timestep, encoder_hidden_states=p_s).sample
        assert torch.equal(models.denoise(noisy, timestep, hint, p_s, p_d), alone)


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def test_vae_and_vision_tower_keep_nothing_for_the_backward_pass(models: Models) -> None:
    stage_1(models)
    batch = batch_for(models)
    assert saved_bytes(lambda: models.encode(to_pixels(batch["gt"]))) == 0
    assert saved_bytes(lambda: clip_tokens(models.vision, batch["clip_view"])) == 0
    stage_2(models)
    assert saved_bytes(lambda: models.tokens(batch)) == 0


def test_checkpointing_keeps_less_and_gives_the_same_gradients(models: Models) -> None:
    def gradients(trainable: nn.Module) -> Iterator[Tensor]:
        for parameter in trainable.parameters():
            assert parameter.grad is not None
            yield parameter.grad.clone()

    trainable, terms = stage_1(models)
    plain = saved_bytes(terms)
    terms()["loss"].backward()
    expected = list(gradients(trainable))
    trainable.zero_grad()
    trainable, terms = stage_1(models, model=ModelConfig(gradient_checkpointing=True))
    assert models.unet.down_blocks[0].gradient_checkpointing
    assert models.control.down_blocks[0].gradient_checkpointing
    assert saved_bytes(terms) < 0.6 * plain
    terms()["loss"].backward()
    for found, wanted in zip(gradients(trainable), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_sd15_is_frozen_in_half_precision_and_what_trains_is_not(toy_folder: Path) -> None:
    models, _ = open_models(toy_sd15.model_config(toy_folder))
    config = train_control.Config(replace(LOOP, precision="bf16"), DATA)
    trainable = train_control.prepare(models, config)
    assert {p.dtype for p in trainable.parameters()} == {torch.float32}
    for frozen in (models.unet, models.vae, models.vision):
        assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    loss, batch = train_control.make_loss(models, config), batch_for(models)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss(batch, torch.Generator().manual_seed(2))
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32
    zero_convs = [n for n in reached(models.control) if n.startswith("controlnet_down_blocks")]
    assert zero_convs
    assert torch.isfinite(models.read(batch).semantic).all()  # and without autocast


def test_stage_2_reaches_all_that_trains_and_nothing_else(models: Models) -> None:
    loss = stage_2(models, lpips_weight=1.0, gan=GanConfig(0.025, start=0, width=8))
    terms = terms_of(loss, models)
    terms["loss"].backward()
    assert reached(loss.trainable) == names(loss.trainable) - {f"discriminator.{LAST_BIAS}"}
    assert frozen_without_gradient(models)
    assert 0 < float(terms["gan_weight"]) <= 0.025


@pytest.mark.parametrize("term", ["l1", "perceptual", "gan"])
def test_each_term_of_stage_2_alone_reaches_the_last_conv(models: Models, term: str) -> None:
    loss = stage_2(models, lpips_weight=1.0, gan=GanConfig(0.025, start=0, width=8))
    terms_of(loss, models)[term].backward()
    last = "extension.out.weight"
    if models.decoder.decoder is not None:
        names = [name for name, _ in models.decoder.decoder.named_parameters()]
        last = f"decoder.{names[-2]}"  # the last is its bias
    assert last in reached(models.decoder)
    assert loss.discriminator is not None
    assert not reached(loss.discriminator)


def test_minus_the_psnr_alone_reaches_all_of_the_decoder(models: Models) -> None:
    loss = stage_2(models, pixel_loss="psnr")
    terms = terms_of(loss, models)
    terms["loss"].backward()
    assert reached(models.decoder) == names(models.decoder)
    assert not torch.equal(terms["loss"], terms["l1"])


def test_the_discriminator_s_term_leaves_the_decoder_alone(models: Models) -> None:
    loss = stage_2(models, gan=GanConfig(0.025, start=0, width=8))
    terms_of(loss, models)["discriminator"].backward()
    assert all(p.grad is None for p in models.decoder.parameters())
    assert loss.discriminator is not None
    assert reached(loss.discriminator) == names(loss.discriminator) - {LAST_BIAS}


def test_parts_join_stage_2_at_their_step(models: Models) -> None:
    tuned = models.decoder.decoder is not None
    loss = stage_2(models, fusion_first=3 * tuned, gan=GanConfig(0.025, start=5, width=8))
    assert loss.discriminator is not None
    for step, decoder, gan in ((0, False, False), (3, True, False), (5, True, True)):
        loss.trainable.zero_grad()
        terms_of(loss, models, step)["loss"].backward()
        assert reached(models.decoder.extension) == names(models.decoder.extension)
        if tuned:
            assert bool(reached(models.decoder.decoder)) == decoder
        assert bool(reached(loss.discriminator)) == gan


def test_the_encoder_can_be_compiled(models: Models) -> None:
    """By torch's tracer at least: code generation takes minutes."""
    pixels = to_pixels(batch_for(models)["gt"])
    compiled = torch.compile(models.encode, backend="eager")
    torch.testing.assert_close(compiled(pixels), models.encode(pixels))


def test_pooled_p_d_alone_is_that_of_the_whole_reading(models: Models) -> None:
    batch = batch_for(models)
    assert torch.equal(models.read_pooled(batch), models.read(batch).pooled)


def test_stage_2_decodes_sampled_latents_where_there_are_some(models: Models) -> None:
    loss = stage_2(models, latent_noise=0.0)
    batch = batch_for(models)
    sampled = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with mock.patch.object(loss, "_decode_fast", wraps=loss._decode_fast) as decode:
        for given in (batch, batch | {"latent": sampled}):
            loss(given, torch.Generator().manual_seed(2))
    own, other = (call.args[0] for call in decode.call_args_list)
    torch.testing.assert_close(own, models.encode(to_pixels(batch["gt"])))
    assert torch.equal(other, sampled)


def test_crops_of_one_part_share_its_p_d(models: Models) -> None:
    """As if each crop had brought the view of its part with it."""
    batch = batch_for(models)
    of_parts = {key: batch[key] for key in batch.keys() - {"gt", "lq", "part"}}
    shared = batch | {key: value[:1] for key, value in of_parts.items()}
    shared["part"] = torch.zeros(2, dtype=torch.int64)
    own = batch | {key: value[:1].expand_as(value) for key, value in of_parts.items()}
    loss = stage_2(models)
    found, expected = (loss(b, torch.Generator().manual_seed(2))["loss"] for b in (shared, own))
    torch.testing.assert_close(found, expected)
    terms = train_control.make_loss(models, train_control.Config(LOOP, DATA))
    found, expected = (terms(b, torch.Generator().manual_seed(2))["mse"] for b in (shared, own))
    torch.testing.assert_close(found, expected)


def test_some_p_d_is_another_photo_s_or_none() -> None:
    pooled = torch.arange(1.0, 2001)[:, None]
    assert torch.equal(doubted(pooled, 0.0, torch.Generator().manual_seed(0)), pooled)
    found = doubted(pooled, 0.2, torch.Generator().manual_seed(0))
    zero, other = found == 0, found == pooled.roll(1, 0)
    assert 0.07 < zero.float().mean() < 0.13
    assert 0.07 < other.float().mean() < 0.13
    assert torch.equal(found[~(zero | other)], pooled[~(zero | other)])


def test_the_decoder_without_p_d_ignores_it(models: Models) -> None:
    loss = stage_2(models, without_degradation=True)
    batch = batch_for(models)
    assert not models.read_pooled(batch).any()
    assert not models.read(batch).pooled.any()
    assert models.read(batch).logits.any()
    terms_of(loss, models)["loss"].backward()
    extension, layer = models.decoder.extension, "norm.weight"
    if isinstance(extension, FusionBlocks):
        layer = "film.weight"
    film = {n for n in names(extension) if n.endswith(layer)}
    assert film
    assert not film & reached(extension)
