"""The native views keep pixels as they are and show all of a photo that is not too large."""

import pytest
import torch

from diff_restorer.views import MOST_VIEWS, native_views


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((4, 4), [0], [0]),
        ((2, 1), [0], [0]),
        ((3, 9), [0], [0, 2, 5]),
        ((5, 8), [0, 1], [0, 4]),
        ((13, 40), [0, 4, 9], [0, 18, 36]),
    ],
)
def test_native_views_are_windows(
    size: tuple[int, int], rows: list[int], columns: list[int]
) -> None:
    image = torch.arange(2 * size[0] * size[1] * 3).reshape(2, *size, 3)
    views = native_views(image, 4)
    expected = [image[:, y : y + 4, x : x + 4] for y in rows for x in columns]
    assert torch.equal(views, torch.stack(expected, dim=1))


@pytest.mark.parametrize("size", [(1, 1), (4, 12), (11, 7), (12, 12)])
def test_native_views_cover_photos_of_a_few_windows(size: tuple[int, int]) -> None:
    place = torch.arange(size[0] * size[1]).reshape(1, *size, 1)
    views = native_views(place, 4)
    assert set(views.flatten().tolist()) == set(place.flatten().tolist())
    assert views.shape[1] <= MOST_VIEWS**2
