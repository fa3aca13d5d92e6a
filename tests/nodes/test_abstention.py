"""Abstention where the nodes read photos: one switch for all of them, and none of old files."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from diff_restorer.abstention import Abstention, draw
from diff_restorer.checkpoint import write_checkpoint
from tests import toy_weights

TYPES = (*toy_weights.TYPES, "clean")
NOTHING_IS_SURE = dict.fromkeys(toy_weights.TYPES, (0.999, 1.0))
ALL_IS_SURE = dict.fromkeys(toy_weights.TYPES, (0.0, 1e-6))


@pytest.fixture(scope="module")
def load(pack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model, vision model and DIFF_RESTORER of a toy Nano that knows clean photos."""
    tensors = toy_weights.restorer_tensors(types=TYPES) | toy_weights.base_tensors()

    def make(
        thresholds: dict | None = None,
        abstain: bool = True,
        exclusive: bool = True,
        **changes: Any,
    ) -> SimpleNamespace:
        entries: dict[str, Any] = {"classification": "ce" if exclusive else "bce"}
        if thresholds is not None:
            entries["abstention"] = Abstention(
                types=TYPES, exclusive=exclusive, thresholds=thresholds, **changes
            )
        path = tmp_path_factory.mktemp("abstention") / "toy.safetensors"
        write_checkpoint(path, tensors, toy_weights.info(types=TYPES, **entries))
        model, vision, _, restorer = pack.nodes.host_nano.load_nano(path, abstain)
        return SimpleNamespace(model=model, clip_vision=vision, diff_restorer=restorer)

    return make


@pytest.fixture
def look(run) -> Any:
    """What Prompt Processor, Classifier and Tiled Diffusion find."""

    def execute(file: SimpleNamespace, image: torch.Tensor) -> SimpleNamespace:
        sockets = {
            "clip_vision": file.clip_vision, "diff_restorer": file.diff_restorer, "image": image
        }  # fmt: skip
        tiles = {"model": file.model, "tile_size": 64, "overlap": 16, "locality": 1.0}
        tiled = run("DiffRestorerTiledDiffusion", **tiles, **sockets)
        return SimpleNamespace(
            read=run("DiffRestorerPromptProcessor", **sockets)[2],
            classified=run("DiffRestorerDegradationClassifier", **sockets),
            tiled=tiled[2],
            tiles=tiled[0].model_options,
        )

    return execute


@pytest.fixture
def image(photo) -> torch.Tensor:
    """Two photos of three tiles."""
    return torch.cat([photo(64, 64, batch=2), 1 - photo(64, 96, batch=2, seed=3)], dim=2)


def same(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    """Whether every P_D that other nodes go by is the same, bit for bit."""
    pairs = [
        (one.read.tokens, other.read.tokens),
        (one.read.pooled, other.read.pooled),
        (one.classified[3].tokens, other.classified[3].tokens),
        (one.tiled.local.tiles, other.tiled.local.tiles),
    ]
    return all(torch.equal(*pair) for pair in pairs)


def test_off_is_as_without_the_entry(load, look, image) -> None:
    """The P_D of the network itself, in every node."""
    plain, off = look(load(), image), look(load(NOTHING_IS_SURE, abstain=False), image)
    assert same(plain, off)
    assert off.classified[:3] == plain.classified[:3]
    assert off.classified[4] == plain.classified[4]
    file = load()
    hidden = file.clip_vision.encode_image(image, crop=False)["last_hidden_state"]
    expected = file.diff_restorer.prompt_processor.model(hidden[:, 1:])
    assert torch.equal(off.read.tokens, expected.degradation)


def test_on_is_the_default_and_turns_what_is_not_sure_to_clean(load, look, image) -> None:
    plain, found = look(load(), image), look(load(NOTHING_IS_SURE), image)
    clean = plain.read.prototypes[TYPES.index("clean")]
    torch.testing.assert_close(found.read.pooled, clean.expand_as(found.read.pooled))
    torch.testing.assert_close(found.tiled.pooled, clean.expand_as(found.tiled.pooled))
    tiles = found.tiled.local.tiles.movedim(1, -1)
    torch.testing.assert_close(tiles, clean.expand_as(tiles))
    assert torch.equal(found.read.probabilities, plain.read.probabilities)
    assert found.classified[:3] == plain.classified[:3], "what is shown is what was read"
    assert found.classified[4] is False


def test_sure_photos_are_read_as_ever(load, look, image) -> None:
    plain, found = look(load(), image), look(load(ALL_IS_SURE), image)
    torch.testing.assert_close(found.read.tokens, plain.read.tokens)
    torch.testing.assert_close(found.tiled.local.tiles, plain.tiled.local.tiles)
    assert found.classified[4] is True


def test_half_sure_is_half_way(load, look, image) -> None:
    file = load(dict.fromkeys(toy_weights.TYPES, (0.0, 1.0)))
    plain, found = look(load(), image).read, look(file, image).read
    trust = file.diff_restorer.abstention.trust(plain.probabilities)
    assert ((trust > 0.05) & (trust < 0.95)).all()
    clean = plain.prototypes[TYPES.index("clean")]
    tokens, pooled = draw(plain.tokens, plain.pooled, clean, trust)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)


def test_one_hazy_tile_of_many_is_not_restored_from_haze(load, look, photo) -> None:
    """Thresholds that the tile which looks haziest passes, and neither the others nor the photo."""
    wide = torch.cat([photo(64, 64, seed=seed) for seed in range(4)], dim=2)
    seen = load(ALL_IS_SURE)
    read = seen.diff_restorer.read
    parts = [wide[:, :, left : left + 64].contiguous() for left in range(0, 256, 48)]
    evidence = sorted(
        float(seen.diff_restorer.abstention.evidence(
            read(seen.clip_vision, part)[1].probabilities)[0, TYPES.index("haze")])
        for part in (*parts, wide)
    )  # fmt: skip
    thresholds = NOTHING_IS_SURE | {"haze": (evidence[-2], evidence[-1] - 1e-6)}
    clean = read(seen.clip_vision, wide)[1].prototypes[-1]

    def turned(tone: tuple[str, ...]) -> torch.Tensor:
        tiles = look(load(thresholds, tone=tone), wide).tiled.local.tiles
        return (tiles.movedim(1, -1) - clean).abs().amax(dim=-1) > 1e-5

    assert turned(tone=()).sum() == 1
    assert not turned(tone=("haze",)).any()


@pytest.fixture
def several(load, look, image) -> SimpleNamespace:
    """What is found by a file whose kinds do not exclude each other."""
    return look(load(exclusive=False), image)


def test_several_kinds_at_once(several, pack: ModuleType) -> None:
    found = several.read
    for kinds, row in zip(found.kinds, found.as_dicts(), strict=True):
        there = tuple(name for name, p in row.items() if p >= 0.5 and name != "clean")
        assert kinds == (there or ("clean",))
    assert any(len(kinds) > 1 for kinds in found.kinds), "else this file shows nothing"
    label, confidence, text, _, degraded = several.classified
    assert confidence == pytest.approx(float(found.probabilities.mean(dim=0).max()))
    assert label == TYPES[int(found.probabilities.mean(dim=0).argmax())]
    assert [list(row) for row in json.loads(text)] == [list(row) for row in found.as_dicts()]
    assert degraded is True
    none = replace(found, probabilities=torch.zeros(2, len(TYPES)))
    assert none.kinds == [("clean",)] * 2
    assert none.degraded == [False] * 2


def test_thresholds_say_what_is_there(several) -> None:
    """Half way between them, in place of 0.5."""
    thresholds = NOTHING_IS_SURE | {"noise": (0.1, 0.3)}
    abstention = Abstention(types=TYPES, exclusive=False, thresholds=thresholds)
    rows = torch.full((2, len(TYPES)), 0.9)
    rows[:, 0] = torch.tensor([0.21, 0.19])
    found = replace(several.read, probabilities=rows, abstention=abstention)
    assert found.kinds == [("noise",), ("clean",)]
    assert found.degraded == [True, True], "about half of 0.1 to 0.3"
    rows[:, 0] = 0.1
    assert replace(found, probabilities=rows).degraded == [False, False]


@pytest.mark.parametrize("mode", ["mix", "add"])
def test_told_kinds_leave_the_others_alone(several, run, mode: str) -> None:
    rows = torch.full((2, len(TYPES)), 0.4)
    given = replace(several.read, probabilities=rows)

    def edit(type: str, weight: float) -> dict[str, float]:
        edited = run(
            "DiffRestorerEditDegradation", degradation=given, type=type, mode=mode, weight=weight
        )[0]
        return edited.as_dicts()[1]

    noisy = edit("noise", 0.5)
    assert noisy["noise"] == pytest.approx(0.7)
    assert noisy["haze"] == pytest.approx(0.4)
    assert noisy["clean"] == pytest.approx(0.2)
    clean = edit("clean", 1.0)
    assert clean["clean"] == 1
    assert sum(clean.values()) == pytest.approx(1)
    if mode == "add":
        assert edit("noise", -0.5) == pytest.approx(
            dict(zip(TYPES, [0.2] + 8 * [0.4], strict=True))
        )
        assert edit("noise", 2.0)["noise"] == 1
