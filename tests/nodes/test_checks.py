"""What is no input is named before anything is computed: for all but Booleans and Switch Image.

Switch Image hands on what it is given.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.nodes.test_schema import NODES

NAN, INF = float("nan"), float("inf")
NUMBERS, TEXTS = {"FLOAT", "INT"}, {"STRING", "COMBO"}
INPUTS = [
    (node_id, name, kind if isinstance(kind, str) else kind[0])
    for node_id, (_, inputs, _) in NODES.items()
    if node_id != "DiffRestorerSwitch"
    for name, kind in inputs.items()
]
"""Node, input and kind."""


def of_kind(kinds: set[str]) -> list[tuple[str, str]]:
    """Nodes and those of their inputs that are of one of these kinds."""
    return [(node_id, name) for node_id, name, kind in INPUTS if kind in kinds]


def entry_of(node_id: str, name: str) -> Any:
    """An input as the node declares it."""
    host_nodes: Any = importlib.import_module("nodes")
    entries = host_nodes.NODE_CLASS_MAPPINGS[node_id].SCHEMA.inputs
    return next(entry for entry in entries if entry.id == name)


@pytest.mark.parametrize(("node_id", "name"), of_kind(NUMBERS))
def test_numbers_are_finite_and_within_their_limits(
    pack: ModuleType, run, node_id: str, name: str
) -> None:
    """Which the host lets pass: its comparisons with NaN are all false."""
    entry = entry_of(node_id, name)
    for value in (NAN, INF, -INF, entry.max + 1, entry.min - 1, "1", None):
        with pytest.raises(ValueError, match=rf"^{name}: .*, expected .* to "):
            run(node_id, **{name: value})


@pytest.mark.parametrize(
    ("node_id", "name"), of_kind({kind for *_, kind in INPUTS} - NUMBERS - {"BOOLEAN"})
)
def test_sockets_take_what_they_are_named_for(
    pack: ModuleType, run, node_id: str, name: str
) -> None:
    """Another pack may have a socket of the same name, and the API links what it likes."""
    for value in (3, [], {}, *([] if entry_of(node_id, name).optional else [None])):
        with pytest.raises(ValueError, match=rf"^{name}: found "):
            run(node_id, **{name: value})


@pytest.mark.parametrize(("node_id", "name"), of_kind(TEXTS))
def test_names_are_no_novels(pack: ModuleType, run, node_id: str, name: str) -> None:
    """They would be quoted in messages and logs."""
    with pytest.raises(ValueError, match=rf"^{name}: found 5,000 characters, expected"):
        run(node_id, **{name: "x" * 5000})


def with_a_hole(value: float) -> torch.Tensor:
    image = torch.zeros(1, 8, 8, 3)
    image[0, 3, 4, 1] = value
    return image


IMAGES: dict[str, tuple[Any, str]] = {
    "bytes": (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "found torch.uint8, expected images"),
    "no batch": (torch.zeros(0, 8, 8, 3), "expected images .* found shape"),
    "a mask": (torch.zeros(1, 8, 8), "expected images .* found shape"),
    "five channels": (torch.zeros(1, 8, 8, 5), r"expected images .* found shape \(1, 8, 8, 5\)"),
    "NaN": (torch.full((1, 8, 8, 3), NAN), "holds NaN or infinite values"),
    "infinite": (torch.full((1, 8, 8, 3), INF), "holds NaN or infinite values"),
    "one NaN": (with_a_hole(NAN), "holds NaN or infinite values"),
    "one infinite value": (with_a_hole(INF), "holds NaN or infinite values"),
}
LATENTS: dict[str, tuple[Any, str]] = {
    "no samples": ({"noise_mask": 1}, "found a dict without samples"),
    "samples of None": ({"samples": None}, "found a dict without samples"),
    "no batch": ({"samples": torch.zeros(0, 4, 8, 8)}, "expected latents of pictures"),
    "a video": ({"samples": torch.zeros(1, 4, 1, 8, 8)}, r"shape \(1, 4, 1, 8, 8\)"),
    "whole numbers": ({"samples": torch.zeros(1, 4, 8, 8).int()}, "torch.int32"),
    "NaN": ({"samples": torch.full((1, 4, 8, 8), NAN)}, "holds NaN or infinite.*lower its cfg"),
}
PROMPTS: dict[str, tuple[Any, str]] = {
    "empty": ([], "found a list without entries"),
    "no tokens": ([[torch.zeros(1, 0, 32), {}]], r"found \(1, 0, 32\)"),
    "None": ([[None, {}]], "found nothing"),
    "no pairs": ([3], "found nothing"),
    "empty pairs": ([[]], "found nothing"),
    "no dictionary": ([[torch.zeros(1, 4, 32), None]], "found nothing"),
    "complex numbers": (
        [[torch.zeros(1, 4, 32, dtype=torch.complex64), {}]],
        "found .* of torch.complex64",
    ),
    "NaN": ([[torch.full((1, 4, 32), NAN), {}]], "holds NaN or infinite values"),
}


CASES = {"IMAGE": IMAGES, "LATENT": LATENTS, "CONDITIONING": PROMPTS}
"""Kind of an input -> what is none, by what is wrong with it."""


@pytest.mark.parametrize(
    ("node_id", "name", "kind", "case"),
    [
        (*place, kind, case)
        for kind, cases in CASES.items()
        for place in of_kind({kind})
        for case in cases
    ],
)
def test_tensors(pack: ModuleType, run, node_id: str, name: str, kind: str, case: str) -> None:
    value, message = CASES[kind][case]
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
        run(node_id, **{name: value})


@pytest.fixture
def decode(toy, decode_with, prepare, photo):
    def execute(image: torch.Tensor, latent: torch.Tensor, **inputs: Any) -> torch.Tensor:
        inputs |= {"samples": {"samples": latent}, "degradation": prepare(photo()).degradation}
        return decode_with(toy.restorer, image, **inputs)

    return execute


@pytest.mark.parametrize("tile_size", [0, 64])
@pytest.mark.parametrize("tiling", ["exact", "fast"])
def test_no_black_picture_is_a_success(decode, photo, tile_size: int, tiling: str) -> None:
    latent = torch.full((1, 4, 8, 8), 3e38)
    latent[..., ::2] *= -1
    with pytest.raises(ValueError, match=r"^vae: holds NaN .* samples that reach 3e\+38"):
        decode(photo(), latent, tile_size=tile_size, overlap=0, tiling=tiling)


def test_latents_of_another_model(decode, photo) -> None:
    with pytest.raises(ValueError, match="samples: latents of 16 channels, needed are 4"):
        decode(photo(), torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_in_other_formats(decode, photo, prepare, dtype: torch.dtype) -> None:
    image, latent = photo().to(dtype), torch.zeros(1, 4, 8, 8)
    assert torch.equal(decode(image, latent), decode(image.float(), latent))
    assert torch.equal(prepare(image).latent["samples"], prepare(image.float()).latent["samples"])


def test_what_is_brighter_than_white_is_white(decode, photo, prepare) -> None:
    """As in linear EXR files, or wherever a resize overshoots."""
    bright, latent = photo() * 3 - 0.5, torch.zeros(1, 4, 8, 8)
    bright[0, 0, 0, 0] = 1e30
    assert torch.equal(decode(bright, latent), decode(bright.clamp(0, 1), latent))
    read, expected = prepare(bright), prepare(bright.clamp(0, 1))
    assert torch.equal(read.latent["samples"], expected.latent["samples"])
    assert torch.equal(read.degradation.tokens, expected.degradation.tokens)


def test_a_vision_model_that_makes_no_numbers(toy, look, photo, keep) -> None:
    layer = toy.clip_vision.model.vision_model.encoder.layers[0].mlp.fc1
    keep(layer)
    layer.bias.fill_(NAN)
    with pytest.raises(ValueError, match="clip_vision: holds NaN or infinite values"):
        look("DiffRestorerDegradationClassifier", photo(seed=77))
