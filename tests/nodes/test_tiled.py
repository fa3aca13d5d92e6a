"""Tiled Diffusion inside the host's sampling."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nodes.test_control import stock_control


@pytest.fixture
def tiled(toy, look) -> Any:
    """The patched MODEL for photos, the map and the degradation."""

    def execute(image: torch.Tensor, **inputs: Any) -> SimpleNamespace:
        entries = {"tile_size": 64, "overlap": 16, "locality": 1.0} | inputs
        model, pictures, degradation = look(
            "DiffRestorerTiledDiffusion", image, model=toy.model, **entries
        )
        return SimpleNamespace(model=model, map=pictures, degradation=degradation)

    return execute


@pytest.mark.parametrize("locality", [0.0, 1.0])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_one_tile_is_the_untiled_graph(
    toy, tiled, prepare, photo, sample_on, locality: float, cfg: float
) -> None:
    image = photo(61, 64)
    restoration = prepare(image)
    expected = sample_on(toy.model, restoration, cfg=cfg)
    patched = tiled(image, locality=locality).model
    assert torch.equal(sample_on(patched, restoration, cfg=cfg), expected)


def test_tiles_are_restorations_of_their_part(toy, tiled, prepare, photo, run, sample_on) -> None:
    """Without overlap a tile is the graph of the part alone, at the same noise and hint."""
    import comfy.sample

    image = torch.cat([photo(64, 64), 1 - photo(64, 64, seed=3)], dim=2)
    restoration = prepare(image)
    found = sample_on(tiled(image, overlap=0).model, restoration, cfg=3.0)
    noise = comfy.sample.prepare_noise(restoration.latent["samples"], 1)
    for left in (0, 8):
        cells, columns = slice(left, left + 8), slice(8 * left, 8 * left + 64)
        part, latent = image[:, :, columns].contiguous(), restoration.latent["samples"][..., cells]
        own = prepare(part)
        control = toy.restorer.control.attach(
            part, latent, own.degradation.tokens, toy.vae, 1.0, (0.0, 1.0)
        )
        positive, negative = (
            [[tokens, extra | {"control": control}] for tokens, extra in prompt]
            for prompt in (own.positive, own.negative)
        )
        alone = comfy.sample.sample(
            toy.model, noise[..., cells], 2, 3.0, "euler", "normal", positive, negative,
            latent.contiguous(),
        )  # fmt: skip
        torch.testing.assert_close(found[..., cells], alone, rtol=1e-3, atol=1e-3)


def test_locality_goes_from_the_photo_to_the_tile(tiled, prepare, photo, sample_on) -> None:
    image = torch.cat([photo(64, 64), 1 - photo(64, 64, seed=3)], dim=2)
    restoration = prepare(image)
    zero, half, one = (
        sample_on(tiled(image, locality=value).model, restoration) for value in (0.0, 0.5, 1.0)
    )
    assert (half - zero).abs().mean() < (one - zero).abs().mean()


def test_the_degradation_of_each_place_is_that_of_its_tile(toy, tiled, prepare, photo) -> None:
    """Up to the middle of an outer tile it is what the Prompt Processor reads from it."""
    image = torch.cat([photo(64, 96), 1 - photo(64, 96, seed=3)], dim=2)
    whole = prepare(image).degradation
    found = tiled(image, overlap=16).degradation
    assert torch.equal(found.pooled, whole.pooled)
    blend = found.local.blend(found.local.tiles)
    assert blend.shape == (1, whole.pooled.shape[1], 8, 24)
    for left in (0, 128):
        own = prepare(image[:, :, left : left + 64].contiguous()).degradation.pooled[0]
        torch.testing.assert_close(blend[0, :, 4, left // 8 + (6 if left else 1)], own)
    half = tiled(image, overlap=16, locality=0.5).degradation.local
    expected = (found.local.tiles + whole.pooled[..., None, None]) / 2
    torch.testing.assert_close(half.tiles, expected)
    assert tiled(image, locality=0.0).degradation.local is None
    assert tiled(image[:, :, :64]).degradation.local is None


def test_the_decode_goes_by_the_degradation_of_each_place(toy, tiled, decode_with, photo) -> None:
    image = torch.cat([photo(64, 96), 1 - photo(64, 96, seed=3)], dim=2)
    local = tiled(image, overlap=16).degradation
    by_place = decode_with(toy.restorer, image, degradation=local)
    as_a_whole = decode_with(toy.restorer, image)
    assert (by_place - as_a_whole).abs().mean() > 1e-3
    exact = decode_with(toy.restorer, image, degradation=local, tile_size=64)
    assert (exact - by_place).abs().mean() < 0.5 / 255
    fast = decode_with(
        toy.restorer, image, degradation=local, tile_size=64, tiling="fast", overlap=16
    )
    assert (fast - by_place).abs().mean() < (fast - as_a_whole).abs().mean()
    with pytest.raises(ValueError, match="read it from a photo of 192 x 64 px"):
        decode_with(toy.restorer, photo(64, 64), degradation=local)


def test_tiles_change_as_edit_degradation_says(tiled, prepare, photo, sample_on, run) -> None:
    image = torch.cat([photo(64, 96), 1 - photo(64, 96, seed=3)], dim=2)
    plain = tiled(image).degradation
    degradation = prepare(image).degradation
    unedited = tiled(image, degradation=degradation).degradation
    assert torch.equal(unedited.local.tiles, plain.local.tiles)
    step = torch.linspace(-1, 1, degradation.pooled.shape[1])
    found = tiled(image, degradation=degradation.edited(1.0, step))
    changed = plain.local.tiles + step[:, None, None]
    torch.testing.assert_close(found.degradation.local.tiles, changed)
    restoration = prepare(image)
    samples = [sample_on(each, restoration) for each in (found.model, tiled(image).model)]
    assert not torch.allclose(*samples)


def test_an_override_holds_in_every_tile(tiled, prepare, photo, run) -> None:
    """As it does without tiles, and after them."""
    image = torch.cat([photo(64, 96), 1 - photo(64, 96, seed=3)], dim=2)

    def edited(degradation: Any, mode: str = "mix", weight: float = 1.0) -> Any:
        return run("DiffRestorerEditDegradation", degradation=degradation, type="noise",
                   mode=mode, weight=weight)[0]  # fmt: skip

    found = prepare(image).degradation
    local = tiled(image, degradation=edited(found)).degradation.local
    prototype = found.prototypes[found.types.index("noise")]
    torch.testing.assert_close(local.tiles, prototype[:, None, None].expand_as(local.tiles))
    twice = edited(edited(found, weight=0.3), "scale", 1.5)
    before = tiled(image, degradation=twice).degradation.local
    after = edited(edited(tiled(image).degradation, weight=0.3), "scale", 1.5).local
    torch.testing.assert_close(before.tiles, after.tiles)


def test_the_host_makes_room_for_a_tile(tiled, prepare, photo, sample_on, calls) -> None:
    import comfy.sampler_helpers

    estimates = calls(comfy.sampler_helpers, "estimate_memory")
    image = photo(64, 256)
    sample_on(tiled(image).model, prepare(image), steps=1)
    assert [list(noise_shape) for (_, noise_shape, _), _ in estimates] == [[1, 4, 8, 8]]


def test_boxes_of_gligen_are_refused(toy, tiled, prepare, photo, sample_on) -> None:
    image = photo(64, 128)
    restoration = prepare(image)
    for _, extra in restoration.positive:
        extra["gligen"] = ("position", toy.model, [])
    with pytest.raises(ValueError, match="GLIGEN places its boxes in the whole picture"):
        sample_on(tiled(image).model, restoration, steps=1)


def test_locality_zero_does_not_look_at_tiles(toy, tiled, prepare, photo, sample_on, pack) -> None:
    """Its prompts and P_D are the photo's own, whatever the tiles show."""
    image = photo(64, 128)
    restoration = prepare(image)
    patched = tiled(image, locality=0.0).model
    grid = pack.nodes.host_tiled.Grid((8, 16), 8, 2)
    blind = pack.nodes.host_tiled.TiledDiffusion(grid, None, 0.0).patched(toy.model)
    assert torch.equal(sample_on(patched, restoration), sample_on(blind, restoration))


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "dpmpp_2m", "heun", "lcm"])
def test_samplers_batches_and_cfg(tiled, prepare, photo, sample_on, sampler: str) -> None:
    image = photo(75, 130, batch=2)
    restoration = prepare(image)
    patched = tiled(image).model
    both = sample_on(patched, restoration, cfg=2.0, sampler=sampler)
    assert both.shape == (2, 4, 10, 17)
    assert torch.isfinite(both).all()


def test_tiles_of_a_batch_see_their_own_photo(tiled, prepare, photo, sample_on) -> None:
    import comfy.sample

    image = photo(64, 128, batch=2)
    both = sample_on(tiled(image).model, prepare(image))
    noise = comfy.sample.prepare_noise(prepare(image).latent["samples"], 1)
    for index in range(2):
        own = image[index : index + 1]
        restoration = prepare(own)
        alone = comfy.sample.sample(
            tiled(own).model, noise[index : index + 1], 2, 1.0, "euler", "normal",
            restoration.positive, restoration.negative, restoration.latent["samples"],
        )  # fmt: skip
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_as_many_tiles_at_once_as_fit(
    toy, tiled, prepare, photo, sample_on, calls, monkeypatch
) -> None:
    image = photo(64, 240)
    restoration = prepare(image)
    forwards = calls(restoration.control.network, "forward")
    together = sample_on(tiled(image).model, restoration, steps=1)
    assert [len(inputs["x"]) for _, inputs in forwards] == [5]
    monkeypatch.setattr(toy.model.model, "memory_required", lambda *_, **__: 2**60)
    one_by_one = sample_on(tiled(image).model, restoration, steps=1)
    assert [len(inputs["x"]) for _, inputs in forwards[1:]] == [1] * 5
    torch.testing.assert_close(one_by_one, together, rtol=1e-3, atol=1e-3)


def test_other_controlnets_see_their_part(toy, tiled, prepare, photo, sample_on) -> None:
    """A hint that is white on the right changes the right tiles alone."""
    image = photo(64, 128)
    restoration = prepare(image)
    black, white = torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128)
    white[..., 64:] = 1
    found = []
    for hint in (black, white):
        control = stock_control(toy).set_cond_hint(hint, 1.0, (0.0, 1.0))
        chained = restoration.control.copy().set_previous_controlnet(control)
        positive = [[t, extra | {"control": chained}] for t, extra in restoration.positive]
        inputs = SimpleNamespace(**vars(restoration) | {"positive": positive})
        found.append(sample_on(tiled(image, overlap=0).model, inputs, steps=1))
    difference = (found[1] - found[0]).abs()
    assert difference[..., :8].max() == 0
    assert difference[..., 8:].mean() > 0


def test_tiles_on_a_further_gpu_have_the_control_of_that_gpu(
    toy, tiled, prepare, photo, sample_on, pack, calls
) -> None:
    """Newer hosts look for it in `multigpu_clones` of the control that they are given."""
    image, there = photo(64, 128), torch.device("cuda", 1)
    restoration = prepare(image)
    control = restoration.control
    other = control.copy()
    other.control_model = copy.deepcopy(control.control_model)
    control.multigpu_clones = {there: other}
    begun = calls(pack.nodes.host_control.DegradationControlNet, "pre_run")
    sample_on(tiled(image).model, restoration, steps=1)
    tiles = [args[0] for args, _ in begun if args[0].cond_hint_original.shape[-1] == 64]
    here, *further = tiles
    assert here.multigpu_clones[there] in further
    assert here.control_model is control.control_model
    assert here.multigpu_clones[there].control_model is other.control_model


def test_areas_and_masks(toy, tiled, prepare, photo, sample_on) -> None:
    """A second prompt on the right half, as an area and as a mask, leaves the left tile alone."""
    image = photo(64, 128)
    restoration = prepare(image)
    patched = tiled(image, overlap=0, locality=0.0).model
    plain = sample_on(patched, restoration, steps=1)
    mask = torch.zeros(1, 64, 128)
    mask[..., 64:] = 1
    for where in ({"area": (8, 8, 0, 8)}, {"mask": mask, "set_area_to_bounds": False}):
        second = [[3 * t, extra | where] for t, extra in restoration.positive]
        both = {"positive": restoration.positive + second}
        inputs = SimpleNamespace(**vars(restoration) | both)
        difference = (sample_on(patched, inputs, steps=1) - plain).abs()
        assert difference[..., :8].max() < 1e-3
        assert difference[..., 8:].mean() > 1e-3


def test_an_area_across_tiles_sees_its_part_of_the_photo(
    toy, tiled, prepare, photo, sample_on, calls
) -> None:
    """Not the whole tile, shrunk into the area."""
    image = photo(64, 128)
    restoration = prepare(image)
    second = [[t, extra | {"area": (8, 8, 0, 4)}] for t, extra in restoration.positive]
    inputs = SimpleNamespace(**vars(restoration) | {"positive": second})
    seen = calls(restoration.control.network, "forward")
    sample_on(tiled(image, overlap=0).model, inputs, steps=1)
    hints = [kwargs["hint"] for _, kwargs in seen]
    latent = restoration.latent["samples"] * toy.restorer.info.latent_scale
    areas = [hint for hint in hints if hint.shape[-1] == 4]
    assert len(areas) == 2
    for hint, left in zip(areas, (4, 8), strict=True):
        torch.testing.assert_close(hint.cpu().float()[:1], latent[..., left : left + 4])


@pytest.mark.parametrize("change", ["zeroed", "followed by a text", "averaged"])
def test_tokens_that_are_no_longer_semantic_stay(tiled, prepare, photo, change: str) -> None:
    """Such as those of ConditioningZeroOut, Concat and Average, which keep what is beside them."""
    image = photo(64, 128)
    tokens, extra = prepare(image).positive[0]
    changed = {
        "zeroed": torch.zeros_like(tokens),
        "followed by a text": torch.cat([tokens, torch.ones(1, 7, tokens.shape[2])], dim=1),
        "averaged": (tokens + 1) / 2,
    }[change]
    import comfy.conds
    import comfy.patcher_extension

    model = tiled(image, overlap=0).model
    kinds = comfy.patcher_extension.WrappersMP
    (wrapper,) = model.get_wrappers(kinds.CALC_COND_BATCH, "diff_restorer_tiles")
    patch = wrapper.__self__
    for given, same in ((tokens, False), (changed, True)):
        found = patch._model_cond(
            "c_crossattn", comfy.conds.CONDCrossAttn(given), extra, [1], patch.grid.windows[1:], 1
        ).cond
        assert torch.equal(found, given) == same


def test_the_map_names_each_tile(tiled, photo) -> None:
    pictures = tiled(photo(64, 200, batch=2)).map
    assert pictures.shape == (2, 64, 200, 3)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_a_latent_of_another_batch(tiled, prepare, photo, sample_on) -> None:
    many = photo(64, 200, batch=2)
    restoration = prepare(many, degradation=prepare(many[:1]).degradation)
    three = restoration.latent["samples"][:1].repeat(3, 1, 1, 1)
    restoration.latent = {"samples": three}
    with pytest.raises(ValueError, match=r"latent_image: a batch of 3, .* given 2 photos"):
        sample_on(tiled(many[:1]).model, restoration)


def test_a_latent_of_another_size(tiled, prepare, photo, sample_on) -> None:
    patched = tiled(photo(64, 200)).model
    with pytest.raises(ValueError, match="latent_image: 64 x 64 px, but Tiled Diffusion was given"):
        sample_on(patched, prepare(photo(64, 64)))


def test_interrupt_leaves_nothing_behind(toy, tiled, prepare, photo, sample_on) -> None:
    from .faults import interrupted_at

    image = photo(64, 200)
    restoration = prepare(image)
    patched = tiled(image).model
    expected = sample_on(patched, restoration)

    with interrupted_at(restoration.control.network):
        sample_on(patched, restoration)
    (wrapper,) = patched.get_wrappers("calc_cond_batch", "diff_restorer_tiles")
    assert not wrapper.__self__._controls
    assert torch.equal(sample_on(patched, restoration), expected)


def test_patched_weights_reach_the_tiles(toy, pack, prepare, photo, sample_on) -> None:
    """As a LoRA patches them."""
    restoration = prepare(photo(64, 128))
    tiled_of = pack.nodes.host_tiled.TiledDiffusion
    several, one = (pack.nodes.host_tiled.Grid((8, 16), tile, 0) for tile in (8, 16))
    key = "diffusion_model.out.2.weight"
    model = toy.model.clone()
    weight = model.model_state_dict()[key]
    assert key in model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.1,))}, 1.0)
    plain = sample_on(tiled_of(several, None, 0.0).patched(toy.model), restoration)
    changed = sample_on(tiled_of(several, None, 0.0).patched(model), restoration)
    assert (changed - plain).abs().mean() > 1e-3
    whole = sample_on(model, restoration)
    assert torch.equal(sample_on(tiled_of(one, None, 0.0).patched(model), restoration), whole)


def test_its_look_at_tiles_does_not_replace_that_at_the_photo(
    toy, tiled, prepare, photo, look, calls
) -> None:
    image = photo(64, 128)
    prepare(image)
    looks = calls(toy.clip_vision, "encode_image")
    tiled(image)
    at_tiles = len(looks)
    look("DiffRestorerDegradationClassifier", image)
    assert len(looks) == at_tiles > 0


def test_the_model_itself_stays(toy, tiled, prepare, photo, sample_on) -> None:
    image = photo(64, 128)
    before = sample_on(toy.model, prepare(image))
    tiled(image)
    assert torch.equal(sample_on(toy.model, prepare(image)), before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tile_size": 32}, "tile_size: 32, expected 64 to 4096"),
        ({"tile_size": 100}, "tile_size: 100 px"),
        ({"overlap": 12}, "overlap: 12 px, expected a multiple of 8"),
        ({"overlap": 40}, "overlap: 40 px with tiles of 64 px"),
        ({"locality": 2.0}, "locality: 2.0, expected 0 to 1"),
    ],
)
def test_wrong_values(tiled, photo, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled(photo(), **inputs)


def test_weights_are_smooth_and_cover_the_picture(pack) -> None:
    grid_of = pack.nodes.host_tiled.Grid
    for size, tile, overlap in (((20, 33), 8, 2), ((1, 9), 8, 4), ((64, 8), 8, 0)):
        grid = grid_of(size, tile, overlap)
        total = torch.zeros(size)
        for window in grid.windows:
            assert max(window.height, window.width) <= tile
            window.of(total, 1).add_(grid.weight(window))
        assert bool((total > 0).all())
    weight = grid_of((64, 64), 16, 8).weight(grid_of((64, 64), 16, 8).windows[0])
    assert (weight[1:] - weight[:-1]).abs().max() < 0.3
