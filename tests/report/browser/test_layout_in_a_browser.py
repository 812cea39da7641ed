"""The page of stored results at three widths and on paper: what is seen first, and that nothing is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import redrawn
from preskip.report import build_report
from watched import Watched

pytestmark = pytest.mark.slow

STORED = ("standard-wikitext2", "scratch-books")
UNFOLD = "all => all.forEach((details) => { details.open = true; })"
# Tables that are wider than the place they have, and headings or cells without any width.
CUT = """() => Array.from(document.querySelectorAll(".scroll")).flatMap((place) => {
  const wide = place.scrollWidth > place.clientWidth + 1 ? [place.getAttribute("aria-label")] : [];
  const cells = Array.from(place.querySelectorAll("tbody th, tbody td"));
  const gone = cells.filter((cell) => !cell.getBoundingClientRect().width);
  return wide.concat(gone.map((cell) => cell.outerHTML.slice(0, 120)));
})"""
# Charts that reach beyond the place they have.
CLIPPED = """() => Array.from(document.querySelectorAll(".plot"), (place) => {
  const [box, drawn] = [place, place.querySelector("svg")].map((element) => element.getBoundingClientRect());
  return drawn.width > 60 && drawn.right <= box.right + 1 && drawn.bottom <= box.bottom + 1 ? "" : place.id;
}).filter(Boolean)"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the stored results, in folders of their names."""
    place = tmp_path_factory.mktemp("layout")
    for name in (*STORED, "minimal"):
        redrawn.CASES[name](place / name)
        build_report(place / name)
    return place


@pytest.fixture(scope="module")
def report(reports: Path) -> Path:
    """The page with the most in it."""
    return reports / STORED[0] / "report.html"


@pytest.mark.parametrize("name", [*STORED, "minimal"])
def test_the_first_screen_answers(chromium: Any, reports: Path, name: str) -> None:
    watched = Watched(chromium, reports / name / "report.html").drawn()
    page = watched.page
    assert page.locator(".lead").first.bounding_box()["y"] < 300
    chart = page.locator(".plot").first.bounding_box()
    assert chart["y"] + chart["height"] < 900
    arms = page.locator(".arms li")
    assert arms.count() == page.locator("#arms tbody tr").count()
    assert arms.first.bounding_box()["y"] < 900
    # Contents stay in view, and lead into what is folded.
    page.locator("nav a[href='#setup']").click()
    page.wait_for_selector("#setup details[open]")
    page.locator("nav a[href='#claims']").click()
    page.wait_for_selector("nav a[href='#claims'][aria-current]")
    assert page.locator("nav").bounding_box()["y"] == 0
    if name == STORED[0]:
        assert_nothing_is_cut_off(page, 1280)
    watched.quiet()
    watched.context.close()


def assert_nothing_is_cut_off(page: Any, width: int) -> None:
    page.locator("details:not(.save)").evaluate_all(UNFOLD)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CUT) == []
    assert page.evaluate(CLIPPED) == []


@pytest.mark.parametrize("width", [768, 390])
def test_nothing_is_cut_off(chromium: Any, report: Path, width: int) -> None:
    watched = Watched(chromium, report, viewport={"width": width, "height": 900}).drawn()
    assert_nothing_is_cut_off(watched.page, width)
    watched.quiet()
    watched.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (768, "dark")])
def test_axe_finds_nothing(chromium: Any, report: Path, axe: str, width: int, scheme: str) -> None:
    viewport = {"width": width, "height": 900}
    watched = Watched(chromium, report, viewport=viewport, color_scheme=scheme).drawn()
    page = watched.page
    page.locator("details").evaluate_all(UNFOLD)
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
    assert [(bad["id"], bad["nodes"][0]["html"][:200]) for bad in found["violations"]] == []
    watched.context.close()


def test_the_search_is_drawn_by_its_switch_and_paper_shows_everything(
    chromium: Any, report: Path, tmp_path: Path
) -> None:
    watched = Watched(chromium, report).drawn()
    page = watched.page
    boxes = page.locator("[data-traces]").all()
    assert boxes
    for box in boxes:
        key = box.get_attribute("data-traces")
        before = page.locator(f"[id='{key}'] svg path").count()
        box.check()
        page.wait_for_selector(f"[id='{key}'] svg path >> nth={before}", state="attached")
    page.locator("#theme").click()  # dark
    page.wait_for_selector("html[data-drawn]")
    folded = page.locator("details:not([open]):not(.save)").count()
    assert folded > 5
    page.set_viewport_size({"width": 680, "height": 980})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open]):not(.save)").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert page.evaluate(CUT) == []
    assert page.evaluate(CLIPPED) == []
    ink = page.evaluate("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert max(ink) < 64  # dark letters, whatever the theme: paper is white
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open]):not(.save)").count() == folded
    page.emulate_media(media="screen")
    assert page.pdf(path=tmp_path / "page.pdf", format="A4")[:5] == b"%PDF-"
    watched.quiet()
    watched.context.close()
