"""The last step of a detail path: contrast and brightness of the whole photo."""

from __future__ import annotations

from dataclasses import replace

import torch

from diff_restorer import DetailConfig, DetailPath
from diff_restorer.grade import Grade, grade_input, with_grade

SMALL = DetailConfig(
    widths=(8, 12, 16), depths=(1, 1, 1, 1, 1), vae_channels=(8, 8, 8), context_width=16, grade=12
)


def test_it_starts_without_a_change() -> None:
    photo = torch.rand(2, 3, 24, 32)
    step = Grade(9, 12)
    assert step(grade_input(photo, photo.flip(0), torch.rand(2, 9))).eq(0).all()


def test_contrast_is_around_the_middle_and_what_has_no_strength_stays() -> None:
    photo = torch.rand(2, 3, 24, 32)
    grade = torch.tensor([0.5, 0.0, -0.5, 0.1, 0.0, 0.0]).expand(2, -1)
    changed = with_grade(photo, grade, torch.tensor([[1.0], [0.0]]))
    assert torch.equal(changed[1], photo[1])
    torch.testing.assert_close(changed[0, 0], (photo[0, 0] - 0.5) * 0.5**-0.72135 + 0.6)
    torch.testing.assert_close(changed[0, 1], photo[0, 1])
    assert changed[0, 2].std() < photo[0, 2].std()


def test_the_path_reads_its_width_from_the_file_and_acts_by_kinds_of_tone() -> None:
    path = DetailPath(SMALL)
    assert DetailConfig.from_state_dict(path.state_dict()).grade == 12
    assert path.grade is not None
    plain = DetailPath(replace(SMALL, grade=0))
    assert DetailConfig.from_state_dict(plain.state_dict()).grade == 0
    photo, restored, pooled = torch.rand(1, 3, 24, 32), torch.rand(1, 3, 24, 32), torch.ones(1, 16)
    assert plain.graded(restored, photo, pooled) is restored
    with torch.no_grad():
        path.grade.last.bias.fill_(0.3)
        assert torch.equal(path.graded(restored, photo, pooled), restored)  # no kind has a say
        path.toned.bias.fill_(4.0)
        half = path.graded(restored, photo, pooled)
        path.toned.bias.fill_(40.0)
        full = path.graded(restored, photo, pooled)
    assert (full - restored).abs().mean() > (half - restored).abs().mean() > 0.01
