"""The found cases again, and a few new ones by a fixed seed; `make fuzz` tries many more."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from tests.e2e.holding import Holding
from tests.fuzz.cases import FaultError, Kind, found_cases, outcome, smaller
from tests.fuzz.files import Files
from tests.fuzz.photos import Photos
from tests.fuzz.servers import Prompts, Servers
from tests.fuzz.soak import Record
from tests.fuzz.toys import Toys
from tests.fuzz.values import Values

pytestmark = pytest.mark.comfy

CASES = {"files": 12, "photos": 40, "values": 60, "prompts": 5, "servers": 10}
"""How many of each kind: a few seconds."""


@pytest.fixture(scope="session")
def toys(pack: ModuleType, toy_folder: Path) -> Toys:
    return Toys(pack, toy_folder)


@pytest.fixture
def kind(request: pytest.FixtureRequest, toy_folder: Path) -> Kind:
    """By its name; what it needs is made only then."""
    name, get, folder = request.param, request.getfixturevalue, toy_folder
    if name in ("prompts", "servers"):
        server = get("runner")
        return Prompts(server) if name == "prompts" else Servers(server, Holding(folder))
    if name == "photos":
        return Photos(get("pack"), folder)
    return Files(get("toys"), folder) if name == "files" else Values(get("toys"))


@pytest.mark.parametrize(("kind", "name"), [(name, name) for name in CASES], indirect=["kind"])
def test_a_good_result_or_a_named_error(kind: Kind, name: str) -> None:
    for _, case in found_cases(name):
        outcome(kind, case)
    random = Random(0)
    for _ in range(CASES[name]):
        outcome(kind, kind.make(random))
    kind.run_next()


@pytest.mark.parametrize(
    ("memory", "slope"),
    [([], 0.0), ([1.0], 0.0), ([float("nan")] * 9, 0.0), ([1, 1, 1, 2, float("nan")], 500.0)],
)
def test_a_soak_needs_no_memory_that_is_told(memory: list[float], slope: float) -> None:
    assert Record(memory=memory).slope == pytest.approx(slope)


class Divider:
    """A product that divides by what it is given, and forgets that this may be nothing."""

    def make(self, random: Random) -> dict:
        return {"steps": [["by", random.randrange(2)] for _ in range(3)]}

    def run(self, case: dict) -> None:
        for _, number in case["steps"]:
            if number < 0:
                raise ValueError("by: below 0")
            assert 1 / number

    def named(self, error: Exception) -> bool:
        return isinstance(error, ValueError)

    def run_next(self) -> None:
        pass


def test_faults_are_told_and_made_small() -> None:
    kind = Divider()
    assert outcome(kind, {"steps": [["by", 1]]}) == "good"
    assert outcome(kind, {"steps": [["by", -1]]}) == "ValueError"
    case = {"steps": [["by", 1], ["by", 0], ["by", 2]]}
    with pytest.raises(FaultError, match="ZeroDivisionError: division by zero") as caught:
        outcome(kind, case)
    assert smaller(kind, case, caught.value) == {"steps": [["by", 0]]}
