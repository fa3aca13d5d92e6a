"""The native view keeps pixels as they are."""

import pytest
import torch

from diff_restorer.views import native_view


@pytest.mark.parametrize(
    ("size", "expected"), [((9, 7), (4, 4)), ((3, 9), (3, 4)), ((2, 1), (2, 1)), ((4, 4), (4, 4))]
)
def test_native_view_is_the_centre(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = torch.arange(2 * size[0] * size[1] * 3).reshape(2, *size, 3)
    view = native_view(image, 4)
    assert view.shape == (2, *expected, 3)
    top, left = ((full - part) // 2 for full, part in zip(size, expected, strict=True))
    assert torch.equal(view, image[:, top : top + expected[0], left : left + expected[1]])
