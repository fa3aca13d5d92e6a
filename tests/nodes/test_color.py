"""Match Colors as a node: sizes, batches, transparency, bad values."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def match(run) -> Any:
    def execute(image: torch.Tensor, reference: torch.Tensor, **inputs: Any) -> torch.Tensor:
        entries = {"method": "adain", "strength": 1.0} | inputs
        return run("DiffRestorerColorFix", image=image, reference=reference, **entries)[0]

    return execute


def test_takes_the_colours_of_a_reference_of_another_size(match, photo) -> None:
    found = match(photo(60, 80), photo(30, 41, seed=5))
    assert found.shape == (1, 60, 80, 3)
    wanted = photo(30, 41, seed=5).mean(dim=(0, 1, 2))
    torch.testing.assert_close(found.mean(dim=(0, 1, 2)), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize(("images", "references"), [(3, 1), (1, 3), (3, 3)])
def test_batches(match, photo, images: int, references: int) -> None:
    image, reference = photo(batch=images), photo(batch=references, seed=5)
    found = match(image, reference)
    assert len(found) == 3
    last = match(image[-1:], reference[-1:])
    torch.testing.assert_close(found[-1:], last, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="image 2, reference 3"):
        match(photo(batch=2), photo(batch=3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels(match, photo, channels: int) -> None:
    image = photo(channels=channels)
    found = match(image, photo(seed=5))
    assert found.shape[-1] == (4 if channels in (2, 4) else 3)
    if channels in (2, 4):
        assert torch.equal(found[..., 3], image[..., -1])


def test_strength_zero_is_not_there(match, photo) -> None:
    assert torch.equal(match(photo(), photo(seed=5), strength=0.0), photo())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"method": "hsv"}, "method: 'hsv'"), ({"strength": 1.5}, "strength: 1.5, expected 0 to 1")],
)
def test_wrong_values(match, photo, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(photo(), photo(), **inputs)
