"""Which degradations meet in life."""

from collections.abc import Sequence

import torch

MIXES: dict[tuple[str, ...], float] = {
    ("low_light", "noise"): 3.0,
    ("low_light", "blur"): 1.5,
    ("low_light", "blur", "noise"): 1.0,
    ("low_light", "noise", "jpeg"): 1.0,
    ("blur", "noise"): 1.5,
    ("blur", "jpeg"): 1.5,
    ("blur", "noise", "jpeg"): 1.5,
    ("noise", "jpeg"): 1.5,
    ("haze", "noise"): 1.0,
    ("haze", "low_light"): 0.5,
    ("haze", "blur"): 0.5,
    ("haze", "rain"): 1.5,
    ("haze", "snow"): 0.7,
    ("rain", "raindrop"): 1.0,
    ("rain", "low_light"): 0.7,
    ("snow", "low_light"): 0.5,
    ("raindrop", "low_light"): 0.5,
    ("low_res", "jpeg"): 2.0,
    ("low_res", "noise", "jpeg"): 0.7,
    ("low_res", "blur", "jpeg"): 0.5,
}
"""Kinds that occur together in photos, and how often, relative to each other."""

_ANY = 0.25
_JPEG_LAST = 0.25


def draw_mix(kinds: Sequence[str], generator: torch.Generator) -> tuple[str, ...]:
    """Draws the degradations of one photo that has several.

    Three quarters are of `MIXES`, the others two or three kinds that met by chance, so that no
    combination is unknown; a quarter of those without JPEG end with it.

    Args:
        kinds: to draw from; `clean` and `second_order`, a chain of its own, are left out.
        generator: of the CPU.

    Returns:
        Two or three different members of `kinds`, four where JPEG came last; fewer if there are no
        more. Their order means nothing: `degrade_chain` has its own.
    """
    known = [kind for kind in kinds if kind not in ("clean", "second_order")]
    fitting = {mix: weight for mix, weight in MIXES.items() if set(mix) <= set(known)}
    if fitting and torch.rand((), generator=generator) >= _ANY:
        weights = torch.tensor(list(fitting.values()))
        mix = list(fitting)[int(torch.multinomial(weights, 1, generator=generator))]
    else:
        count = 2 + int(torch.randint(2, (), generator=generator))
        order = torch.randperm(len(known), generator=generator)[:count]
        mix = tuple(known[int(place)] for place in order)
    ends = torch.rand((), generator=generator) < _JPEG_LAST
    return (*mix, "jpeg") if ends and "jpeg" in known and "jpeg" not in mix else mix
