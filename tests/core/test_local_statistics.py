"""Statistics of each place of a photo."""

from __future__ import annotations

import torch

from diff_restorer import local_statistics, photo_statistics
from diff_restorer.local import LocalPooled
from diff_restorer.photo_statistics import NOISE_LEVELS


def test_each_tile_has_its_own_noise_and_the_tone_of_all() -> None:
    photo = torch.full((1, 3, 64, 128), 0.5)
    photo[..., :64] += 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    columns = torch.zeros(2, 16)
    columns[0, :8] = columns[1, 8:] = 1
    places = LocalPooled(torch.zeros(1, 4, 1, 2), torch.ones(1, 8), columns)
    found = local_statistics(photo, places)
    assert found.shape == (1, 1, 2, 51)
    noisy, clean = found[0, 0, :, -NOISE_LEVELS:]
    torch.testing.assert_close(noisy, torch.full((3,), 0.1), rtol=0.1, atol=0)
    assert not clean.any()
    tone = photo_statistics(photo)[0, :-NOISE_LEVELS]
    assert torch.equal(found[0, 0, 0, :-NOISE_LEVELS], tone)
    assert torch.equal(found[0, 0, 1, :-NOISE_LEVELS], tone)
