"""A report page as a test reads it: its text, what it would load, and contrasts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Visible text, pictures in words, scripts by id, ids, links, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.pictures: dict[str, str] = {}
        self.unlabelled: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(given.get("href") or "")
        if given.get("role") == "img":
            self.pictures[str(given.get("id"))] = given.get("aria-label") or ""
            if not given.get("aria-label"):
                self.unlabelled.append(str(given.get("id")))
        self._inside = (given.get("id") or f"script-{len(self.scripts)}") if tag == "script" else None
        if tag == "style":
            self._inside = "style"
        for name, value in given.items():
            if name in ("src", "srcset", "data", "action", "poster") or (name == "href" and tag != "a"):
                self.loads.append((tag, value or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.text.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def dangling(self) -> set[str]:
        """Links within the page that lead nowhere."""
        return {link for link in self.links if link.startswith("#") and link[1:] not in self.ids}


def read(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
