"""A run's report with what was explained of two arms, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixture_explain import write_explain
from fixture_run import rich_run
from preskip.report import build_report
from watched import Watched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = rich_run(tmp_path_factory.mktemp("rich") / "run", seeds=(1, 2), steps=20)
    for arm in ("skip", "preskip"):
        source = {"kind": "run", "name": "run", "arm": arm, "seed": 1}
        write_explain(run / f"explain/{arm}-seed-1", layers=12, documents=3, tokens=120, source=source)
    build_report(run)
    return run


def test_the_report_loads_alone_with_the_map_in_it(chromium: Any, run: Path) -> None:
    watched = Watched(chromium, run / "report.html").drawn()
    page = watched.page
    assert page.locator(".plot svg").count() == len(json.loads(page.locator("#specs").text_content()))
    stored = json.loads((run / "explain/preskip-seed-1/explain.json").read_text())
    page.locator("#map-layer").fill("5")
    page.locator("#map-text [data-token='50']").hover()
    assert page.locator("[data-value=bypass]").inner_text() == str(stored["documents"][0]["bypass"][5][50])
    with page.expect_download() as download:
        page.locator("#download").click()
    data = json.loads(Path(download.value.path()).read_text())
    assert data["explain"] == stored
    assert data["results"] == json.loads((run / "results.json").read_text())
    figure = page.locator("figure:has(.plot)").first
    figure.locator("details.save").evaluate("details => { details.open = true; }")
    saved = {}
    for kind in ("svg", "png", "csv", "json"):
        with page.expect_download() as download:
            figure.locator(f"[data-save={kind}]").click()
        assert download.value.suggested_filename.endswith(f".{kind}")
        saved[kind] = Path(download.value.path()).read_bytes()
    assert (saved["svg"][:4], saved["png"][:4]) == (b"<svg", b"\x89PNG")
    assert len(saved["csv"].splitlines()) == len(json.loads(saved["json"])) + 1 > 2
    watched.quiet()
    watched.context.close()


def test_every_table_sorts(chromium: Any, run: Path) -> None:
    watched = Watched(chromium, run / "report.html").drawn()
    page = watched.page
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    tables = page.locator("table.sortable")
    assert tables.count() == page.locator("table").count() > 10
    for index in range(tables.count()):
        table = tables.nth(index)
        first = table.locator("thead tr:last-child th").first
        first.locator("button").click()
        assert first.get_attribute("aria-sort") == "ascending"
        names = table.locator("tbody tr > :first-child").evaluate_all(
            "cells => cells.map((cell) => cell.dataset.sort || cell.textContent.trim())"
        )
        numeric = "number" in (first.get_attribute("class") or "")
        key = (lambda name: float(name)) if numeric else str.casefold
        assert names == sorted(names, key=key), index
    rate = page.locator("#arms thead button").nth(2)
    for order in ("ascending", "descending"):  # an arm that was not trained has no rate
        rate.click()
        assert rate.locator("..").get_attribute("aria-sort") == order
        assert page.locator("#arms tbody th").last.get_attribute("data-sort") == "none"
    watched.quiet()
    watched.context.close()


def test_the_report_is_accessible_and_fits_a_phone(chromium: Any, run: Path, axe: str) -> None:
    watched = Watched(chromium, run / "report.html", viewport={"width": 390, "height": 844}).drawn()
    page = watched.page
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
    bad = [
        (v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"] if v["impact"] in ("serious", "critical")
    ]
    assert bad == []
    watched.context.close()
