"""A headless Chromium for tests of pages: Playwright's own, or the system's; where there is none, tests skip aloud."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> Iterator[Any]:
    """The browser, closed at the end."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED, playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            one = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"NOT TESTED, there is no Chromium: {str(error).splitlines()[0]}")
        yield one
        one.close()
