"""The tone of photos: what takes haze away for good."""

from __future__ import annotations

import torch

from diff_restorer.tone import stretched


def test_black_and_white_come_back_and_hue_stays() -> None:
    photo = torch.rand(1, 3, 120, 160, generator=torch.Generator().manual_seed(0))
    photo[:, 2] *= 0.5
    hazy = 0.3 + 0.5 * photo
    clear = stretched(hazy, torch.ones(1))
    torch.testing.assert_close(clear, photo, rtol=0, atol=0.02)


def test_each_photo_by_its_own_share() -> None:
    photos = 0.4 + 0.3 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    none, half, whole = stretched(photos, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(none, photos[0])
    assert photos[1].std() < half.std() < whole.std()


def test_a_wall_is_not_hazy() -> None:
    wall = 0.5 + 0.01 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert stretched(wall, torch.ones(1)).std() < 0.02
