"""Looks of clean photos, and which degradations meet."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.degradations import ALL_KINDS, KINDS, MIXES, draw_mix, random_look
from tests import photos
from tests.photos import seeded


@pytest.fixture(scope="module")
def looks() -> tuple[Tensor, Tensor]:
    """The coffee cup, (1, 3, 40, 60), and 400 looks of it."""
    image = photos.photo("coffee")
    image = F.interpolate(image, size=(40, 60), mode="area")
    return image, random_look(image.expand(400, -1, -1, -1), seeded())


def test_looks_differ_in_contrast_brightness_and_colour(looks: tuple[Tensor, Tensor]) -> None:
    image, found = looks
    assert found.min() >= 0
    assert found.max() <= 1
    changed = (found != image).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.65, abs=0.07)
    found = found[changed]
    torch.testing.assert_close((found * 255).round() / 255, found)
    contrast = found.std((1, 2, 3)) / image.std()
    assert contrast.min() < 0.15
    assert (contrast < 0.4).float().mean() > 0.15
    assert (contrast > 0.8).float().mean() > 0.15
    level = found.mean((1, 2, 3))
    assert level.min() < 0.25
    assert level.max() > 0.75
    # Colours of grey photos are all in one direction, that of grey or of sepia.
    red, blue = found[:, 0].flatten(1), found[:, 2].flatten(1)
    one_colour = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(red, blue, strict=True)]
    )
    assert (one_colour > 0.9999).float().mean().item() == pytest.approx(0.15, abs=0.06)


def test_looks_keep_edges_where_they_are(looks: tuple[Tensor, Tensor]) -> None:
    image, found = looks
    original = image.mean(1).flatten()
    for look in found[:50]:
        ranks = torch.stack((original, look.mean(0).flatten())).argsort(1).argsort(1).float()
        assert torch.corrcoef(ranks)[0, 1] > 0.9


def test_looks_can_be_switched_off_and_repeat(looks: tuple[Tensor, Tensor]) -> None:
    image, found = looks
    assert torch.equal(random_look(image, seeded(), share=0), image)
    assert torch.equal(random_look(image.expand(400, -1, -1, -1), seeded()), found)


def test_mixes_name_kinds_that_are_there() -> None:
    for mix, weight in MIXES.items():
        assert set(mix) < set(ALL_KINDS)
        assert len(set(mix)) == len(mix) > 1
        assert weight > 0


def test_mixes_are_like_life_and_yet_of_every_kind() -> None:
    generator = seeded()
    drawn = [draw_mix(KINDS, generator) for _ in range(4000)]
    assert {len(mix) for mix in drawn} == {2, 3, 4}
    assert all(len(set(mix)) == len(mix) for mix in drawn)
    assert all(mix[-1] == "jpeg" for mix in drawn if len(mix) == 4)
    kinds = Counter(kind for mix in drawn for kind in mix)
    assert set(kinds) == set(KINDS) - {"clean"}
    pairs = Counter(frozenset(mix) for mix in drawn)
    assert pairs[frozenset(("low_light", "noise"))] > 4 * pairs[frozenset(("snow", "raindrop"))] > 0
    assert pairs == Counter(
        frozenset(draw_mix(KINDS, again)) for again in [seeded()] for _ in drawn
    )


def test_mixes_make_do_with_few_kinds() -> None:
    assert draw_mix(("clean", "rain"), seeded()) == ("rain",)
    assert set(draw_mix(("snow", "raindrop"), seeded())) == {"snow", "raindrop"}
    assert draw_mix((), seeded()) == ()
