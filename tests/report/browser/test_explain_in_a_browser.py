"""The page of `preskip explain` in a real browser: it loads alone, answers, and shows the stored numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixture_explain import STRANGE, write_explain
from preskip.report.explain.page import build_explain_page
from watched import Watched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """30 layers and 5,000 tokens."""
    folder = tmp_path_factory.mktemp("explain")
    path = write_explain(folder)
    return build_explain_page(folder), json.loads(path.read_text())


@pytest.fixture(scope="module")
def shared(chromium: Any, built: tuple[Path, dict[str, Any]]) -> Iterator[Watched]:
    watched = Watched(chromium, built[0]).drawn()
    yield watched
    watched.context.close()


@pytest.fixture
def page(shared: Watched) -> Any:
    """The page as it opens: all controls back where they were."""
    page = shared.page
    page.locator("#map-search").fill("")
    for name, value in (("view", "text"), ("measure", "bypass"), ("scale", "all")):
        page.locator(f"label:has(input[name=map-{name}][value={value}])").click()
    page.locator("#map-document").select_option("0")
    page.locator("#map-layer").fill("29")
    return page


def token(page: Any, index: int) -> Any:
    return page.locator(f"#map-text [data-token='{index}']")


def value(page: Any, measure: str = "bypass") -> float:
    return float(page.locator(f"[data-value={measure}]").inner_text())


def colours(page: Any) -> list[str]:
    return page.locator("#map-text span").evaluate_all("spans => spans.map((span) => span.style.backgroundColor)")


def test_loads_alone_and_in_silence(shared: Watched, built: tuple[Path, dict[str, Any]]) -> None:
    shared.quiet()
    specs = json.loads(shared.page.locator("#specs").text_content())
    assert shared.page.locator(".plot svg").count() == len(specs) == 15
    assert shared.page.locator("#map-text span").count() == 500


# Milliseconds of a fixed loop: 90 where a page opens in 400.
LOOP = """() => { const begin = performance.now(); let sum = 0;
  for (let i = 0; i < 2e7; i++) sum = (sum * 31 + i) % 1000003;
  return performance.now() - begin + (sum < 0); }"""


def test_opens_within_sixteen_times_a_fixed_loop(chromium: Any, built: tuple[Path, dict[str, Any]]) -> None:
    """A second and a half on the machine of the first measurements; another may be several times as slow."""
    times = []
    for _ in range(6):  # other work on the machine only ever adds to it
        watched = Watched(chromium, built[0])
        watched.page.wait_for_selector("#map-panel[data-ready]")
        time = watched.page.evaluate("performance.getEntriesByName('map-ready')[0].startTime")
        times.append(time / watched.page.evaluate(LOOP))
        watched.context.close()
        if times[-1] <= 16:
            break
    assert min(times) <= 16


def test_the_slider_changes_the_map(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    stored = built[1]["documents"][0]["bypass"]
    before = colours(page)
    token(page, 40).hover()
    assert value(page) == stored[29][40]
    page.locator("#map-layer").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#map-layer-name").inner_text() == "28"
    assert page.locator("#map-layer").get_attribute("aria-valuetext") == "Layer 28"
    assert value(page) == stored[28][40]
    page.locator("#map-layer").fill("3")
    assert value(page) == stored[3][40]
    after = colours(page)
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert changed > 400
    # The deeper shade belongs to the larger number.
    level = {colour: int(re.findall(r"\d+", colour)[2]) for colour in after}
    ordered = sorted(range(500), key=lambda i: stored[3][i])
    assert [level[after[i]] for i in ordered] == sorted((level[c] for c in after), reverse=True)


@pytest.mark.parametrize("index", [1, 25, 137, 499])
def test_hover_shows_the_stored_numbers(page: Any, built: tuple[Path, dict[str, Any]], index: int) -> None:
    document = built[1]["documents"][0]
    token(page, index).hover()
    assert value(page) == document["bypass"][29][index]
    assert value(page, "enrichment") == document["enrichment"][29][index]
    assert page.locator("#map-place").inner_text() == f"token {index + 1} of 500, layer 29"
    below = sum(other < document["bypass"][29][index] for other in document["bypass"][29])
    share = page.locator("[data-value=rank]").inner_text()
    assert abs(int(share.split(" ")[0]) - 100 * below / 500) <= 0.5
    tallest = page.locator("#map-profile rect").evaluate_all(
        "bars => bars.map((bar) => Number(bar.getAttribute('height')))"
    )
    column = [row[index] for row in document["bypass"]]
    assert tallest.index(max(tallest)) == column.index(max(column))


def test_the_keyboard_reaches_every_token_and_layer(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    document = built[1]["documents"][0]
    page.locator("#map-text").focus()
    page.keyboard.press("Home")
    for _ in range(21):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    assert value(page) == document["bypass"][25][20]
    now = page.locator("#map-now")
    assert now.get_attribute("data-token") == "20"
    assert now.get_attribute("aria-label").endswith(f", {document['bypass'][25][20]}")
    page.keyboard.press("End")
    assert value(page) == document["bypass"][25][499]
    box, stage = page.locator("#map-now").bounding_box(), page.locator("#map-text").bounding_box()
    assert stage["y"] <= box["y"] <= stage["y"] + stage["height"]


def test_tab_goes_through_the_controls_to_the_text(page: Any) -> None:
    page.locator("#map-document-back").focus()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if reached[-1] == "map-text":
            break
    wanted = {
        "map-document",
        "map-sentence",
        "map-search",
        "map-view",
        "map-layer",
        "map-measure",
        "map-scale",
        "map-text",
    }
    assert wanted <= set(reached)


def test_the_heat_map_shows_all_layers(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    stored = built[1]["documents"][0]["bypass"]
    page.locator("label:has(input[value=layers])").click()
    canvas = page.locator("#map-heat canvas")
    assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == [500, 30]
    box = canvas.bounding_box()
    for index, layer in ((60, 3), (250, 17), (499, 29)):
        place = {"x": (index + 0.5) * box["width"] / 500, "y": (29 - layer + 0.5) * box["height"] / 30}
        canvas.hover(position=place)
        assert (page.locator("#map-place").inner_text(), value(page)) == (
            f"token {index + 1} of 500, layer {layer}",
            stored[layer][index],
        )
    assert page.locator("#map-layer-name").inner_text() == "29"
    # Brightness falls as the number grows, over all cells.
    pixels = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, 500, 30).data)")
    cells = sorted((stored[29 - row][i], pixels[4 * (500 * row + i) + 1]) for row in range(30) for i in range(500))
    assert [green for _, green in cells] == sorted((green for _, green in cells), reverse=True)
    page.locator("#map-heat").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert value(page) == stored[28][498]
    assert page.locator("#live").inner_text().endswith(f"layer 28: {stored[28][498]}")


def test_own_shades_and_the_other_measure(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    page.locator("#map-layer").fill("2")
    together, shared_cap = colours(page), page.locator("#map-cap").inner_text()
    page.locator("label:has(input[name=map-scale][value=layer])").click()
    assert colours(page) != together
    values = sorted(v for document in built[1]["documents"] for v in document["bypass"][2])
    assert page.locator("#map-cap").inner_text() == f"≥ {values[int(0.98 * (len(values) - 1))]:.3g}" != shared_cap
    own = colours(page)
    page.locator("label:has(input[name=map-measure][value=enrichment])").click()
    assert colours(page) != own
    assert page.locator("#map-measure-name").inner_text() == "‖x̃ − x̂‖ / ‖x̂‖"


def test_texts_and_sentences_switch(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    documents = built[1]["documents"]
    page.locator("#map-document-on").click()
    token(page, 7).hover()
    assert value(page) == documents[1]["bypass"][29][7]
    page.locator("#map-document-back").click()
    page.locator("#map-document-back").click()  # round the end
    assert page.locator("#map-document option:checked").inner_text() == documents[9]["title"]
    starts = json.loads(page.locator("#map").text_content())["documents"][9]["sentences"]
    page.locator("#map-sentence").select_option("2")
    spans = page.locator("#map-text span")
    assert spans.count() == starts[3] - starts[2]
    assert spans.first.get_attribute("data-token") == str(starts[2])
    page.locator("#map-sentence-on").click()
    assert spans.first.get_attribute("data-token") == str(starts[3])
    page.locator("label:has(input[value=layers])").click()
    words = page.locator(".heat-words span")
    assert words.count() == starts[4] - starts[3]
    assert words.first.inner_text() == documents[9]["tokens"][starts[3]].replace(" ", "␣")


def test_search_finds_across_tokens_and_texts(page: Any, built: tuple[Path, dict[str, Any]]) -> None:
    texts = ["".join(document["tokens"]) for document in built[1]["documents"]]
    count = sum(len(re.findall(r"contribution", text, re.IGNORECASE)) for text in texts)
    page.locator("#map-search").fill("Contribution")
    found = page.locator("#map-search-found")
    assert found.inner_text() == f"1 of {count}"
    marked = "".join(page.locator("#map-text .current").all_inner_texts()).lower()
    assert "contribution" in marked
    page.keyboard.press("Enter")
    assert found.inner_text() == f"2 of {count}"
    page.locator("#map-search-back").click()
    page.locator("#map-search-back").click()
    assert found.inner_text() == f"{count} of {count}"
    last = max(i for i, text in enumerate(texts) if "contribution" in text.lower())
    assert page.locator("#map-document").input_value() == str(last)
    page.locator("#map-search").fill("zyzzyva")
    assert found.inner_text() == "not found"
    assert page.locator("#map-text .hit").count() == 0


def test_the_corpus_shows_as_text(page: Any, shared: Watched) -> None:
    shown = page.locator("#map-text span").all_text_contents()
    assert shown[0] == STRANGE[0] == "</script><script>alert(1)</script>"
    for mark in (" 🦊", " שלום", " مرحبا", "<b>", "&amp;", "\\", ' "'):
        assert mark in shown
    assert shown[3] == "⏎\n\n"
    assert "∅" in shown
    shared.quiet()


@pytest.mark.parametrize("column", [1, 3, 6])
def test_a_table_sorts(page: Any, built: tuple[Path, dict[str, Any]], column: int) -> None:
    page.locator("#explain-depth details:not(.save)").evaluate("details => { details.open = true; }")
    table = page.locator("#explain-depth table")
    heading = table.locator("thead th").nth(column)
    read = {
        1: lambda e: e["skip_to_attention"]["value"],
        3: lambda e: e["ablation"]["skip"]["value"],
        6: lambda e: e["skip_norm"],
    }
    wanted = [str(e["layer"]) for e in sorted(built[1]["layers"], key=read[column])]
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody th").all_inner_texts() == wanted
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert table.locator("tbody th").all_inner_texts() == wanted[::-1]


def test_every_number_can_be_saved(page: Any, built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    explain = built[1]

    page.locator("details.save").evaluate_all("all => all.forEach((details) => { details.open = true; })")

    def saved(selector: str) -> Path:
        with page.expect_download() as download:
            page.locator(selector).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path

    assert json.loads(saved("#download").read_text()) == explain
    rows = json.loads(saved("[data-figure='explain-skip_to_attention'][data-save=json]").read_text())
    assert [row["value"] for row in rows] == [layer["skip_to_attention"]["value"] for layer in explain["layers"]]
    table = list(
        csv.DictReader(io.StringIO(saved("[data-figure='explain-skip_to_attention'][data-save=csv]").read_text()))
    )
    assert [float(row["high"]) for row in table] == [layer["skip_to_attention"]["high"] for layer in explain["layers"]]
    assert saved("[data-figure='explain-spectrum'][data-save=svg]").read_text().startswith("<svg")
    assert saved("[data-figure='explain-spectrum'][data-save=png]").read_bytes()[:4] == b"\x89PNG"
    document = explain["documents"][0]
    cells = list(csv.DictReader(io.StringIO(saved("[data-map=csv]").read_bytes().decode(), newline="")))
    assert [row["token"] for row in cells] == document["tokens"]
    assert [float(row["layer_12"]) for row in cells] == document["bypass"][12]
    assert f"by token and layer, 0 to {page.locator('#map-cap').inner_text()} — " in saved("[data-map=svg]").read_text()
    page.locator("label:has(input[name=map-scale][value=layer])").click()
    picture = saved("[data-map=svg]").read_text()
    assert picture.startswith("<svg")
    assert "by token and layer, 0 to ≥ each layer’s 98 % — " in picture
    assert saved("[data-map=png]").read_bytes()[:4] == b"\x89PNG"


def test_dark_follows_the_system_and_the_button(chromium: Any, built: tuple[Path, dict[str, Any]]) -> None:
    watched = Watched(chromium, built[0], color_scheme="dark").drawn()
    page = watched.page

    def look() -> tuple[str, str, str]:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        plot = page.locator("#explain-enrichment svg").evaluate(
            "svg => svg.style.backgroundColor || svg.getAttribute('style')"
        )
        return ground, plot, colours(page)[30]

    dark = look()
    assert dark[0] == "rgb(20, 23, 26)"
    page.locator("#theme").click()
    watched.drawn()
    light = look()
    assert light[0] == "rgb(247, 247, 245)"
    assert all(a != b for a, b in zip(dark, light, strict=True))
    assert page.locator("#theme").get_attribute("aria-label") == "Switch to the dark theme"
    watched.quiet()
    watched.context.close()


def test_a_phone_needs_no_sideways_scrolling(chromium: Any, built: tuple[Path, dict[str, Any]]) -> None:
    watched = Watched(
        chromium, built[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    ).drawn()
    page = watched.page
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    for view in ("text", "layers"):
        page.locator(f"label:has(input[value={view}])").click()
        for part in ("-1", "1"):
            page.locator("#map-sentence").select_option(part)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("label:has(input[value=text])").click()
    page.locator("#map-sentence").select_option("-1")
    token(page, 33).tap()
    assert value(page) == built[1]["documents"][0]["bypass"][29][33]
    watched.quiet()
    watched.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(chromium: Any, built: tuple[Path, dict[str, Any]], axe: str, scheme: str) -> None:
    watched = Watched(chromium, built[0], color_scheme=scheme).drawn()
    page = watched.page
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    page.evaluate(axe)
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if scheme == "dark":  # only the colours are different
        options["runOnly"] = ["color-contrast"]
    for view in ("text", "layers"):
        page.locator(f"label:has(input[value={view}])").click()
        found = page.evaluate("options => axe.run(document, options)", options)
        bad = [
            (v["id"], v["nodes"][0]["html"][:200])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert bad == [], view
    watched.context.close()
