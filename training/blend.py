"""Average a file with the one it was trained on from: `python -m training.blend --help`.

Training on for new data costs some of what was learnt from the old; the weights in between keep
most of both, because a short run stays in the same basin (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diff_restorer.checkpoint import read_checkpoint, write_checkpoint

from .config import run_program, settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Average the weights of two files of the same networks, and write a file like the second."""

    before: Path
    """File that the run started from."""
    after: Path
    """File that the run wrote."""
    out: Path
    """File to write. Its class prototypes are averaged, too: `training.export` makes them anew."""
    share: float = 0.5
    """Share of `after`, from 0 to 1."""


def main(config: Config) -> Path:
    """Read, average in fp32 and write.

    Raises:
        ValueError: The share is no share, or the files hold other networks.
    """
    if not 0 <= config.share <= 1:
        raise ValueError(f"--share: must be from 0 to 1, found {config.share}")
    before, after = (read_checkpoint(path, required=()) for path in (config.before, config.after))
    old, new = before.state(""), after.state("")
    if before.info.types != after.info.types:
        raise ValueError(f"--before, --after: types {before.info.types} and {after.info.types}")
    shapes = ({(name, each.shape) for name, each in state.items()} for state in (old, new))
    if odd := set.symmetric_difference(*shapes):
        raise ValueError(
            f"--before, --after: the files hold other networks; {min(odd)[0]} is not alike in "
            f"{before.path} and {after.path}"
        )
    tensors = {name: torch.lerp(old[name].float(), new[name].float(), config.share) for name in new}
    moved = sum(not torch.equal(old[name], new[name]) for name in new)
    notes = {**after.info.config, "blend": settings(config)}
    write_checkpoint(config.out, tensors, replace(after.info, config=notes, scores={}))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s: %d of %d tensors averaged", config.out, moved, len(new))
    return config.out


if __name__ == "__main__":
    run_program(main, Config, __doc__)
