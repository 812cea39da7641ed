"""WikiText as pages: its files are lines, and so are its rows on the Hub; a line ` = Title = ` begins a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def page_title(line: str) -> str | None:
    """The title in a line that begins a page, None for any other line (also for headings of sections)."""
    joined = line.replace("= = =", "===").replace("= =", "==").strip()
    return joined[2:-2].strip() if joined.startswith("= ") and joined.endswith(" =") else None


def wikitext_pages(text: str) -> list[str]:
    """Cut raw WikiText into pages as EleutherAI/wikitext_document_level does; what precedes the first title is one."""
    return [page.removesuffix("\n") for *_, page in join_pages(enumerate(text.split("\n")))]


def is_wikitext(lines: Iterable[object], *, continued: bool = False) -> bool:
    """Whether texts, such as the first rows of a table, are lines of WikiText: all single, the first not blank a title.

    They may have their line ends; what is no string counts as blank. `continued` lines may begin inside a page.
    """
    filled = [line.strip() for line in lines if isinstance(line, str) and line.strip()]
    begins = continued or (bool(filled) and page_title(filled[0]) is not None)
    return begins and not any("\n" in line for line in filled)


def join_pages(
    rows: Iterable[tuple[T, object]], opened: tuple[T, str, str] | None = None
) -> Iterator[tuple[T, str, str]]:
    """Put rows that are lines of WikiText together to pages.

    Args:
        rows: number and line of each row; on the Hub a line keeps its end, and a blank one is empty.
        opened: a page as yielded for the rows before these, which goes on until the next title.

    Yields:
        Number of the page's first row, its title ("" for what precedes the first title), and its text.
    """
    start: Any = None
    title, lines = "", list[str]()
    if opened is not None:
        start, title, lines = opened[0], opened[1], [opened[2]]
    for number, row in rows:
        line = row if isinstance(row, str) else ""
        found = page_title(line)
        if found is not None:
            if "".join(lines).strip():
                yield start, title, "".join(lines)
            title, lines = found, []
        if not lines:
            start = number
        lines.append(line if line.endswith("\n") else line + "\n")
    if "".join(lines).strip():
        yield start, title, "".join(lines)
