"""A headless Chromium and axe-core, where they are installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium (or Chrome) through Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's source: the file that PRESKIP_AXE names, or node_modules/axe-core beside or above the tests."""
    places = [Path(os.environ["PRESKIP_AXE"])] if os.environ.get("PRESKIP_AXE") else []
    places += [folder / "node_modules/axe-core/axe.min.js" for folder in Path(__file__).resolve().parents]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8")
    pytest.skip("axe-core is not installed: npm install --no-save axe-core, or name axe.min.js in PRESKIP_AXE")
