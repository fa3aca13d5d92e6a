"""What degradation and complete files bring, so that it need not be connected."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import toy_weights

PROCESSOR, CONTROL = "DiffRestorerPromptProcessor", "DiffRestorerDegradationControl"
DECODE, TILED = "DiffRestorerAwareVAEDecode", "DiffRestorerTiledDiffusion"
CLASSIFIER, EDIT = "DiffRestorerDegradationClassifier", "DiffRestorerEditDegradation"


@pytest.fixture
def apart(pack: ModuleType, toy_folder) -> Any:
    """The parts of the toy that are no file of their own."""
    return pack.nodes.host_models.load_restorer(
        toy_weights.write_restorer(toy_folder / "apart.safetensors", dtype=torch.float32)
    )


@pytest.fixture
def read(toy, run) -> Any:
    """Prompt Processor with as few wires as there can be."""

    def execute(image: torch.Tensor, restorer: Any = toy.restorer, **inputs: Any) -> Any:
        return run(PROCESSOR, diff_restorer=restorer, image=image, **inputs)

    return execute


def test_few_wires_and_all_wires_give_the_same(toy, run, read, prepare, sample, photo) -> None:
    image = photo(70, 90, channels=4, seed=301)
    full = prepare(image)
    positive, negative, degradation = read(image)
    few = run(CONTROL, positive=positive, negative=negative, degradation=degradation)
    assert torch.equal(positive[0][0], full.prompts[0][0][0])
    assert torch.equal(few[2]["samples"], full.latent["samples"])
    latents = [
        sample(*some) for some in (few, (full.positive, full.negative, full.latent))
    ]  # fmt: skip
    assert torch.equal(*latents)
    decoded = run(DECODE, samples={"samples": latents[0]}, degradation=degradation)[0]
    wired = run(
        DECODE, samples={"samples": latents[1]}, vae=toy.vae, diff_restorer=toy.restorer,
        degradation=full.degradation, image=image,
    )[0]  # fmt: skip
    assert torch.equal(decoded, wired)
    assert torch.equal(decoded[..., 3], image[..., 3]), "with the photo's transparency"


def test_tiles_need_a_degradation_only(toy, run, read, photo) -> None:
    image = photo(64, 160, seed=302)
    degradation = read(image)[2]
    sizes = {"model": toy.model, "tile_size": 64, "overlap": 32}
    few = run(TILED, degradation=degradation, **sizes)
    wired = run(
        TILED, diff_restorer=toy.restorer, clip_vision=toy.clip_vision, image=image, **sizes
    )
    assert torch.equal(few[1], wired[1])
    assert torch.equal(few[2].local.tiles, wired[2].local.tiles)


def test_the_classifier_shows_what_was_read(toy, run, read, photo, calls) -> None:
    degradation = read(photo(seed=303))[2]
    edited = run(EDIT, degradation=degradation, type="blur", mode="mix", weight=1.0)[0]
    passes = calls(toy.clip_vision.model, "forward")
    assert run(CLASSIFIER, degradation=degradation)[3] is degradation
    assert run(CLASSIFIER, degradation=edited)[0] == "blur"
    assert passes == []
    other = photo(seed=304)
    assert run(CLASSIFIER, degradation=degradation, image=other)[3].image is other
    assert len(passes) == 1


def test_edits_and_tiles_go_on_bringing(toy, run, read, photo) -> None:
    image = photo(64, 160, channels=4, seed=305)
    degradation = read(image)[2]
    for mode in ("mix", "add", "scale"):
        edited = run(EDIT, degradation=degradation, type="blur", mode=mode, weight=0.5)[0]
        assert edited.restorer is toy.restorer
        assert edited.image is image
    tiled = run(TILED, model=toy.model, degradation=edited, tile_size=64, overlap=32)[2]
    assert tiled.restorer is toy.restorer
    assert tiled.image is image
    assert degradation.repeated(3).image is image


def test_what_is_connected_goes_before(toy, apart, run, read, photo, calls) -> None:
    image, other = photo(seed=306), photo(seed=307)
    positive, negative, degradation = read(image)
    prompts = {"positive": positive, "negative": negative, "degradation": degradation}
    own, connected = (
        run(CONTROL, **prompts, **more)[2]["samples"] for more in ({}, {"image": other})
    )
    expected = run(CONTROL, **(prompts | {"degradation": read(other)[2]}))[2]["samples"]
    assert not torch.equal(own, connected)
    assert torch.equal(connected, expected)
    used = calls(apart.control, "attach")
    run(CONTROL, **prompts, diff_restorer=apart, vae=toy.vae)
    assert len(used) == 1
    large = photo(64, 160, seed=308)
    tiled = run(
        TILED, model=toy.model, degradation=degradation, image=large, tile_size=64, overlap=32
    )[2]
    assert tiled.image is large, "for the decode of what was tiled"


def test_what_is_missing_is_named(toy, apart, run, read, photo) -> None:
    image = photo(seed=309)
    with pytest.raises(ValueError, match=r"clip_vision: nothing is connected, and apart\.saf"):
        read(image, apart)
    positive, negative, degradation = read(image, apart, clip_vision=toy.clip_vision)
    prompts = {"positive": positive, "negative": negative, "degradation": degradation}
    with pytest.raises(ValueError, match=r"vae: nothing is connected, and apart\.safetensors"):
        run(CONTROL, **prompts)
    latent = run(CONTROL, **prompts, vae=toy.vae)[2]
    with pytest.raises(ValueError, match=r"vae: nothing is connected, and apart\.safetensors"):
        run(DECODE, samples=latent, degradation=degradation)
    for node, others in ((TILED, {"model": toy.model}), (CLASSIFIER, {})):
        with pytest.raises(ValueError, match=r"diff_restorer: nothing is connected\. Connect Load"):
            run(node, image=image, **others)
        with pytest.raises(ValueError, match=r"image: nothing is connected\. Connect the degraded"):
            run(node, diff_restorer=toy.restorer, **others)


def test_nothing_is_held_once_the_degradation_is_gone(
    pack: ModuleType, toy_folder, run, read, photo
) -> None:
    path = toy_weights.write_nano(toy_folder / "released.safetensors")
    model, vision, vae, restorer = pack.nodes.host_nano.load_nano(path)
    image = photo(seed=310)
    parts = [weakref.ref(each) for each in (model, vision, vae, restorer, image)]
    prompts = read(image, restorer)
    degradation = prompts[2]
    own = sum(each.nbytes for each in (degradation.tokens, image))
    assert degradation.get_ram_usage() >= restorer.get_ram_usage() + own
    positive, negative, latent = run(
        CONTROL, positive=prompts[0], negative=prompts[1], degradation=degradation
    )
    decoded = run(DECODE, samples=latent, degradation=degradation)
    del model, vision, vae, restorer, image, prompts, positive, negative, latent, decoded
    gc.collect()
    assert all(part() is not None for part in parts[1:]), "the degradation brings them"
    del degradation
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
