"""Who is trusted: by kind, in mixes, over the tiles of a photo; and what distrust does to P_D."""

from __future__ import annotations

import json

import pytest
import torch

from diff_restorer.abstention import Abstention, draw

TYPES = ("noise", "blur", "haze", "clean")
THRESHOLDS = {"noise": (0.2, 0.4), "blur": (0.5, 0.9), "haze": (0.9, 1.0)}


def abstention(exclusive: bool = True) -> Abstention:
    return Abstention(types=TYPES, exclusive=exclusive, thresholds=THRESHOLDS)


def trust(*probabilities: float, exclusive: bool = True) -> float:
    return float(abstention(exclusive).trust(torch.tensor(probabilities)))


@pytest.mark.parametrize("exclusive", [True, False])
def test_nothing_is_trusted_of_a_clean_photo_and_all_of_a_sure_one(exclusive: bool) -> None:
    assert trust(0.0, 0.0, 0.0, 1.0, exclusive=exclusive) == 0
    assert trust(1.0, 0.0, 0.0, 0.0, exclusive=exclusive) == pytest.approx(1)
    assert trust(0.0, 0.0, 1.0, 0.0, exclusive=exclusive) == pytest.approx(1)


def test_trust_rises_between_the_thresholds_of_its_kind() -> None:
    found = [trust(0.0, p, 0.0, 1 - p) for p in (0.4, 0.5, 0.7, 0.9, 0.95)]
    assert found == pytest.approx([0, 0, 0.5, 1, 1])
    assert trust(0.7, 0.0, 0.0, 0.3) == pytest.approx(1), "noise needs less"
    assert trust(0.0, 0.0, 0.7, 0.3) == 0, "haze needs more"


def test_a_runner_up_of_haze_is_not_acted_on() -> None:
    assert trust(0.0, 0.0, 0.4, 0.6) == 0
    assert trust(0.0, 0.0, 0.6, 0.4) == 0


def test_a_mix_is_restored_though_its_kinds_share_the_probability() -> None:
    assert trust(0.5, 0.5, 0.0, 0.0) == pytest.approx(1)
    assert trust(0.5, 0.0, 0.5, 0.0) == pytest.approx(1)


def test_a_tone_in_doubt_holds_back_what_is_sure_of_the_rest() -> None:
    """Haze has 0.45 against 0.1 of clean, 0.82: too little for it, enough for noise."""
    assert trust(0.45, 0.0, 0.45, 0.1) == pytest.approx(0.5)
    assert trust(0.81, 0.0, 0.09, 0.1) == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_that_half_formats_round_to_one(dtype: torch.dtype) -> None:
    strict = Abstention(
        types=TYPES, exclusive=True, thresholds=THRESHOLDS | {"blur": (0.9995, 0.99999)}
    )
    sure = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=dtype)
    assert float(strict.trust(sure)) == 1
    assert float(strict.trust(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype))) == 0


def test_independent_kinds_are_their_own_evidence() -> None:
    assert trust(0.9, 0.0, 0.0, 0.9, exclusive=False) == pytest.approx(1)
    belief = abstention(exclusive=False).belief(torch.tensor([0.3, 0.5, 0.95, 1.0]))
    torch.testing.assert_close(belief, torch.tensor([0.5, 0.0, 0.5, 0.0]))


def test_a_tone_is_in_doubt_by_its_odds_even_where_kinds_are_by_themselves() -> None:
    """Haze of 0.2 beside sure noise: no doubt where clean has nothing, a sixth where it has 0.4."""
    assert trust(1.0, 0.0, 0.2, 0.0, exclusive=False) == pytest.approx(1)
    assert trust(1.0, 0.0, 0.2, 0.4, exclusive=False) == pytest.approx(1 - 0.2 / 1.2)
    assert trust(0.0, 0.0, 0.2, 0.03, exclusive=False) == 0, "haze itself needs more"


def test_what_is_surely_not_clean_is_restored_whatever_it_is() -> None:
    assert trust(0.1, 0.4, 0.0, 0.01, exclusive=False) == pytest.approx(1)
    assert trust(0.1, 0.4, 0.0, 0.02, exclusive=False) == pytest.approx(0.5)
    assert trust(0.1, 0.4, 0.0, 0.03, exclusive=False) == 0


@pytest.mark.parametrize(("hazy", "expected"), [(1, 0.0), (2, 1.0), (6, 1.0)])
def test_tiles_must_agree_on_a_change_of_tone(hazy: int, expected: float) -> None:
    """Of six tiles: one is nothing, two are enough for both; each tile needs its own, too."""
    tiles = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(6, 1, 1)
    tiles[:hazy, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    limit = abstention().agreement(tiles, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    found = abstention().trust(tiles, limit)[:, 0]
    assert found.tolist() == pytest.approx([expected] * hazy + [0.0] * (6 - hazy))


def test_noise_may_be_in_one_tile_alone() -> None:
    tiles = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(6, 1, 1)
    tiles[0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    limit = abstention().agreement(tiles, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert abstention().trust(tiles, limit)[:, 0].tolist() == [1.0] + [0.0] * 5


def test_a_photo_that_is_hazy_as_a_whole_lets_its_tiles_be() -> None:
    tiles = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(6, 2, 1)
    tiles[0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    photos = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = abstention().trust(tiles, abstention().agreement(tiles, photos))
    assert found[0].tolist() == [1.0, 0.0], "each photo of a batch by itself"
    assert not found[1:].any()


def test_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 8, generator=generator)
    pooled, clean = tokens.mean(dim=1), torch.randn(8, generator=generator)
    drawn, mean = draw(tokens, pooled, clean, torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(drawn[0], tokens[0])
    assert torch.equal(mean[0], pooled[0])
    torch.testing.assert_close(mean[1], (pooled[1] + clean) / 2)
    torch.testing.assert_close(mean[2], clean)
    torch.testing.assert_close(drawn.mean(dim=1), mean)
    torch.testing.assert_close(drawn - mean[:, None], tokens - pooled[:, None])


def test_json() -> None:
    made = abstention()
    assert Abstention.from_json(made.to_json(), TYPES, exclusive=True) == made
    assert Abstention.from_json(made.to_json(), TYPES, exclusive=False) != made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": {"noise": [0.2, 0.4]}}, "expected one each for noise, blur, haze"),
        ({"thresholds": THRESHOLDS | {"blur": [0.9, 0.5]}}, "0.9 and 0.5 for 'blur'"),
        ({"thresholds": THRESHOLDS | {"blur": [0.5]}}, "cannot be read"),
        ({"thresholds": THRESHOLDS | {"blur": ["a", "b"]}}, "cannot be read"),
        ({"thresholds": None}, "cannot be read"),
        ({"tone": ["fog"]}, "tone 'fog'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    entry = json.loads(abstention().to_json()) | change
    with pytest.raises(ValueError, match=f"abstention: .*{message}"):
        Abstention.from_json(json.dumps(entry), TYPES, exclusive=True)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"abstention: .\{broken. cannot be read"):
        Abstention.from_json("{broken", TYPES, exclusive=True)
    with pytest.raises(ValueError, match="without 'clean' to turn to"):
        Abstention.from_json(abstention().to_json(), TYPES[:3], exclusive=True)
