"""A browser, and a ComfyUI with the pack and a few photos to try it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from tests.browser.chromium import ARGUMENTS, NoChromiumError, find_or_install
from tests.browser.editor import VIEW, Editor
from tools.examples import write_examples
from tools.host import Host

LONG_SIDE = 320
"""Of the photos, pixels."""


# Not for the session: Playwright's event loop runs in this thread, where the client needs its own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        chromium = find_or_install()
    except NoChromiumError as error:
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(comfyui_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """As `make serve` runs it."""
    base = tmp_path_factory.mktemp("browser")
    write_examples(base / "input", LONG_SIDE)
    with Host(base) as host:
        yield host


@pytest.fixture
def open_editor(browser: Browser, server: Host) -> Iterator[Callable[..., Editor]]:
    """Opens editors, and closes them after the test."""
    editors: list[Editor] = []

    def open_one(view: ViewportSize = VIEW, **settings: Any) -> Editor:
        editors.append(Editor(browser, server, view, **settings))
        return editors[-1]

    yield open_one
    for editor in editors:
        editor.close()


@pytest.fixture
def editor(open_editor: Callable[..., Editor]) -> Editor:
    """An editor in English."""
    return open_editor()
