"""A page in a headless browser that notes every request and every word on the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Watched:
    """A page in a window of its own, with what it asked for and what it said."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options}
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.address = path.as_uri()
        self.page.goto(self.address)

    def drawn(self) -> Watched:
        """Wait for the map and all plots."""
        if self.page.locator("#map-panel").count():
            self.page.wait_for_selector("#map-panel[data-ready]", timeout=30_000)
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return self

    def quiet(self) -> None:
        """Assert that nothing but the file itself was asked for and nothing was said."""
        assert self.said == []
        assert [url for url in self.requests if not url.startswith(("data:", "blob:"))] == [self.address]
