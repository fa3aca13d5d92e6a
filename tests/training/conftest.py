"""Three small photos; each test file starts accelerate anew, as its state is the process's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.photos import write


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> Iterator[None]:
    """Lets test files choose their own precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("photos"), ("astronaut", "chelsea", "coffee"), (96, 80))
