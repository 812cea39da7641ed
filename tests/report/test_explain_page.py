"""The page of `preskip explain`: its numbers against the stored ones, its words, its safety, size and errors."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixture_explain import STRANGE, interval, wide, write_explain
from fixture_run import minimal_run
from page_reader import Page, luminance, read
from preskip.errors import PreskipError
from preskip.report import build_report
from preskip.report.explain.figures import explain_figures
from preskip.report.explain.map import decimal, pack, sentence_starts
from preskip.report.explain.measures import value_text
from preskip.report.explain.page import build_explain_page, find_explains, visible
from preskip.report.explain.words import findings, layers_text, limits
from preskip.report.render import TEMPLATES


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    """30 layers and 5,000 tokens."""
    folder = tmp_path_factory.mktemp("explain")
    path = write_explain(folder)
    return build_explain_page(folder), json.loads(path.read_text()), read(folder / "explain.html")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_explain(tmp_path / "small", layers=4, documents=2, tokens=60)


def change(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


def unpacked(text: str) -> list[float | None]:
    """The numbers of the map, read with the struct module and Python's own decimal parser."""
    planes = zlib.decompress(base64.b64decode(text))
    count = len(planes) // 3
    exponents = struct.unpack(f"{count}b", planes[2 * count :])
    return [
        None if exponents[i] == -128 else float(f"{planes[i] | planes[count + i] << 8}e{exponents[i]}")
        for i in range(count)
    ]


def test_the_map_holds_every_stored_number_exactly(usual: tuple[Path, dict[str, Any], Page]) -> None:
    _, explain, page = usual
    held = json.loads(page.scripts["map"])
    assert held["layers"] == list(range(30))
    assert [entry["tokens"] for entry in held["documents"]] == [entry["tokens"] for entry in explain["documents"]]
    for measure in ("bypass", "enrichment"):
        stored = [value for entry in explain["documents"] for row in entry[measure] for value in row]
        assert len(stored) == 150_000
        assert unpacked(held["measures"][measure]) == stored


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 0.1234, 9.999, 1234.0, 99990.0, 5e-324, 1.234e-30, 1.234e30, 0.09999, 1e-5]
)
def test_numbers_survive_packing(value: float) -> None:
    assert unpacked(pack([None, value, 0.5])) == [None, value if value > 1e-100 else 0.0, 0.5]


def test_rounding_to_four_digits() -> None:
    assert decimal(0.123456) == (1235, -4)
    assert decimal(0.99996) == (1000, -3)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="on the bypass map"):
            decimal(wrong)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (["One", " two", ".", " Three", ".", " Four"], [0, 3, 5]),
        (["e", ".", "g", ".", " this", "!”", " Yes"], [0, 4, 6]),
        (["A", "\n", "\n", "B"], [0, 3]),
        (["3", ".", "14"], [0]),
        ([" word"] * 250, [0, 120, 240]),
        ([], []),
    ],
)
def test_sentences(tokens: list[str], starts: list[int]) -> None:
    assert sentence_starts(tokens) == starts


def test_the_page_is_small_and_loads_nothing(usual: tuple[Path, dict[str, Any], Page]) -> None:
    path, _, page = usual
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert page.loads == [("link", "data:,")]
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\(|@import", page.scripts["style"])
    assert "default-src 'none'" in text
    assert page.dangling == set()
    assert len(page.ids) == len(set(page.ids))
    assert set(json.loads(page.scripts["specs"])) <= set(page.ids)
    assert page.unlabelled == []
    assert list(path.parent.glob(".explain*")) == []


def test_the_figures_hold_the_stored_numbers(usual: tuple[Path, dict[str, Any], Page]) -> None:
    _, explain, page = usual
    drawn = {key: spec["data"]["values"] for key, spec in json.loads(page.scripts["specs"]).items()}
    layers = explain["layers"]
    for key, found in {
        "explain-skip_to_attention": [layer["skip_to_attention"] for layer in layers],
        "explain-enrichment": [layer["enrichment"] for layer in layers],
        "explain-ablation-both": [layer["ablation"]["both"] for layer in layers],
        "explain-entropy-change": [layer["entropy_change"] for layer in layers],
        "explain-sink-change": [layer["sink_change"] for layer in layers],
        "explain-alignment": [layer["alignment"][key] for key in ("attention", "mlp") for layer in layers],
    }.items():
        assert [{name: row[name] for name in ("value", "low", "high")} for row in drawn[key]] == found, key
    norms = drawn["explain-skip_norm"]
    assert [row["value"] for row in norms if row["part"] == "arm"] == [layer["skip_norm"] for layer in layers]
    assert [(row["low"], row["high"]) for row in norms if row["part"] == "null"] == [(0.26, 0.31)] * 30
    dots = [row for row in drawn["explain-classes-skip_to_attention"] if row["class"]]
    assert [(r["class"], r["value"], r["tokens"]) for r in dots] == [
        (c["class"], c["skip_to_attention"]["value"], c["tokens"]) for c in explain["classes"]
    ]
    cells = [row["value"] for row in drawn["explain-classes-by-layer"] if row["class"]]
    assert cells == [value for entry in explain["classes"] for value in entry["by_layer"]]
    values = np.array([row["value"] for row in drawn["explain-spectrum"]])
    np.testing.assert_allclose(values, np.ravel([layer["spectrum"] for layer in layers]), rtol=6e-4)


def test_findings_in_words(usual: tuple[Path, dict[str, Any], Page]) -> None:
    _, explain, page = usual
    layers = explain["layers"]
    sizes = [layer["skip_to_attention"] for layer in layers]
    top, bottom = (int(pick([size["value"] for size in sizes])) for pick in (np.argmax, np.argmin))
    for text in (
        f"at layer {top}: the skip's output is {value_text(sizes[top])} times as large as attention's. "
        f"Least at layer {bottom}: {value_text(sizes[bottom])}.",
        "differs most by kind: digits 0.660 [0.640, 0.682] against space 0.200 [0.180, 0.222]; by frequency: ",
        "Here intervals of 99.74 %, wide enough for all 19 classes at once, do not touch.",
        f"exceeds what noise gradients give in {sum(layer['skip_norm'] > 0.31 for layer in layers)} of 30 layers",
        f"Its interval lies above 0 in {sum(layer['ablation']['skip']['low'] > 0 for layer in layers)} of 30 layers",
        "Brackets are 95 % intervals over 30 documents, 15,240 tokens.",
        "smollm2: preskip, seed 1",
        "preskip explain 'runs/my run'",
    ):
        assert text in page.visible, text


def test_pieces_of_few_books_are_few_however_many_they_are(small: Path) -> None:
    explain = json.loads(small.read_text())
    explain["texts"] = [
        {"id": f"{n}", "title": f"{n}", "set": "held-out", "tokens": 10, "shown": False, "group": f"{n % 4}"}
        for n in range(40)
    ]
    assert limits(explain)[0].startswith(
        "Intervals are 95 %, by bootstrap over 40 documents in 4 clusters, 400 tokens: with so few they are known only"
    )
    for entry in explain["texts"]:
        del entry["group"]  # an earlier preskip's
    assert limits(explain)[0].startswith("Intervals are 95 %, by bootstrap over 40 documents, 400 tokens. They say")


def test_what_overlaps_does_not_stand_apart(small: Path) -> None:
    explain = json.loads(small.read_text())
    for layer in explain["layers"]:
        layer["skip_to_attention"] = interval(0.3 + 0.01 * layer["layer"], 0.1)
        layer["skip_to_attention_wide"] = wide(0.3 + 0.01 * layer["layer"], 0.1, 4)
        layer["null"] = None
        layer["ablation"]["skip"] = interval(-0.01, 0.001)
    for entry in explain["classes"]:
        entry["skip_to_attention"] = interval(0.4, 0.1)
        entry["skip_to_attention_wide"] = wide(0.4, 0.1, 19)
    found = dict(findings(explain))
    at_once = "intervals of 98.75 %, wide enough for all 4 layers at once, overlap."
    assert f" Least at layer 0: 0.30 [0.20, 0.41]. The two do not stand apart: {at_once}" in found["Where"]
    at_once = "intervals of 99.74 %, wide enough for all 19 classes at once, overlap."
    assert found["For which tokens"] == f"No class of tokens stands apart from the others of its kind: {at_once}"
    assert "above 0 in 0 of 4 layers, below it in 4 (0–3)." in found["Worth of the skip"]
    assert "Learnt or noise" not in found
    assert any("No null was trained" in limit for limit in limits(explain))


def test_many_comparisons_take_wider_intervals(small: Path) -> None:
    """Plain intervals that do not touch are not enough; a class too rare to be compared hides no other difference."""
    explain = json.loads(small.read_text())
    for entry in explain["classes"]:
        entry["skip_to_attention"] = interval(0.4 + 0.1 * (entry["class"] == "digits"), 0.04)
        entry["skip_to_attention_wide"] = wide(0.4 + 0.1 * (entry["class"] == "digits"), 0.04, 19)
    assert dict(findings(explain))["For which tokens"].startswith("No class of tokens stands apart")
    letters, _, marks, _ = (entry for entry in explain["classes"] if entry["dimension"] == "kind")
    letters |= {"skip_to_attention": interval(0.9, 0.8), "skip_to_attention_wide": None}
    marks |= {"skip_to_attention": interval(0.3, 0.02), "skip_to_attention_wide": wide(0.3, 0.02, 19)}
    assert dict(findings(explain))["For which tokens"].startswith(
        "The ratio of skip to attention differs most by kind: digits 0.500 [0.460, 0.544] against punctuation 0.300 "
    )
    for entry in (*explain["classes"], *explain["layers"]):
        del entry["skip_to_attention_wide"]  # a file of an earlier version
    found = dict(findings(explain))
    for heading in ("Where", "For which tokens"):
        assert found[heading].endswith("no intervals are known that hold for all at once.")
    assert any("level 1 − 0.05/m" in limit for limit in limits(explain))


def test_an_arm_shows_only_the_parts_it_has(tmp_path: Path) -> None:
    for name, parts, absent, present in (
        ("skip", {"enrichment": False}, "Worth of the enrichment", "explain-spectrum"),
        ("preproj", {"skip": False}, "What the skip writes", "explain-enrichment"),
    ):
        folder = write_explain(tmp_path / name, layers=3, documents=1, tokens=40, **parts).parent
        page = read(build_explain_page(folder))
        assert absent not in page.visible
        assert present in page.ids
        measure = "bypass" if name == "skip" else "enrichment"
        assert list(json.loads(page.scripts["map"])["measures"]) == [measure]


def test_a_single_layer_without_the_skip_is_not_measured(small: Path) -> None:
    explain = json.loads(small.read_text())
    explain["documents"][1]["bypass"][2] = None
    page = read(build_explain_page(change(small, documents=explain["documents"])))
    values = unpacked(json.loads(page.scripts["map"])["measures"]["bypass"])
    assert [place for place, value in enumerate(values) if value is None] == list(range(240 + 120, 240 + 180))


def test_without_shown_texts_there_is_no_map(small: Path) -> None:
    page = read(build_explain_page(change(small, documents=[])))
    assert "map" not in page.scripts
    assert "explain-map" not in page.ids
    assert "explain-classes" in page.ids


def test_the_band_is_spoken_of_only_where_there_is_one(small: Path) -> None:
    assert "leaves the grey band" in build_explain_page(small.parent).read_text()
    layers = [{**layer, "null": None} for layer in json.loads(small.read_text())["layers"]]
    page = build_explain_page(change(small, layers=layers)).read_text()
    assert "no null was trained here" in page
    assert "leaves the grey band" not in page


def test_the_corpus_stays_text(small: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    explain = json.loads(small.read_text())
    explain["documents"][0]["title"] = explain["texts"][0]["title"] = evil
    explain["layers"][0]["promoted"] = [[evil, 1.0], ["\n \t", 0.5], ["", 0.25]]
    explain["classes"][0]["class"] = "<b>rare</b>"
    explain["model"]["name"] = evil
    page = read(build_explain_page(change(small, **explain)))
    assert page.tags.count("script") == 5
    assert not {"img", "i"} & set(page.tags)
    held = json.loads(page.scripts["map"])
    assert held["documents"][0]["title"] == evil
    assert held["documents"][0]["tokens"][: len(STRANGE)] == STRANGE
    assert evil in page.visible
    assert visible("\n \t") in page.visible
    assert "<b>rare</b>" in page.visible


def test_tokens_are_visible() -> None:
    assert [visible(token) for token in (" the", "\n\n", "", "é")] == ["␣the", "⏎⏎", "∅", "é"]
    assert layers_text([3, 1, 2, 7, 9, 10]) == "1–3, 7, 9–10"


def test_every_figure_says_itself_in_words(small: Path) -> None:
    figures = explain_figures(json.loads(small.read_text()))
    assert len({figure["key"] for figure in figures}) == len(figures) == 15
    assert all(figure["alt"] and figure["spec"]["data"]["values"] for figure in figures)


def test_errors_are_one_line(small: Path) -> None:
    folder, text = small.parent, small.read_text()

    def refused(content: str, message: str) -> None:
        small.write_text(content)
        with pytest.raises(PreskipError, match=message) as caught:
            build_explain_page(folder)
        assert "\n" not in str(caught.value)

    refused(text[:100], "explain.json is not valid JSON .* write it with `preskip explain`")
    refused(text.replace('"schema_version": 1', '"schema_version": 9'), "has schema_version 9, .* reads 1")
    refused('{"schema_version": 1}', "lacks what the page needs .KeyError.* run `preskip explain` again")
    refused(json.dumps(json.loads(text) | {"layers": json.loads(text)["layers"][:2]}), "does not fit its layers")
    small.unlink()
    with pytest.raises(PreskipError, match=r"explain.json is missing: write it with `preskip explain`"):
        build_explain_page(folder)


def test_a_runs_report_shows_the_first_arm_and_links_the_others(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    for arm, seed in (("lora", 2), ("preskip", 7), ("preskip", 42)):
        source = {"kind": "run", "name": "run", "arm": arm, "seed": seed}
        write_explain(run / f"explain/{arm}-seed-{seed}", layers=3, documents=1, tokens=40, source=source)
    page = read(build_report(run))
    assert "Inside preskip, seed 7" in page.visible
    assert [link for link in page.links if link.startswith("explain/")] == [
        "explain/preskip-seed-42/explain.html",
        "explain/lora-seed-2/explain.html",
    ]
    assert len(page.ids) == len(set(page.ids))
    assert {"depth", "explain-map", "explain-found", "explain-limits"} <= set(page.ids)
    assert set(json.loads(page.scripts["specs"])) <= set(page.ids)
    assert page.tags.count("script") == 5
    damaged = run / "explain/lora-seed-2/explain.json"
    damaged.write_text("{")
    with pytest.raises(PreskipError, match=r"lora-seed-2/explain.json is not valid JSON"):
        build_report(run)


def test_a_runs_report_without_shown_texts_has_no_link_to_a_map(tmp_path: Path) -> None:
    """A link without a target ended the page's script before it had drawn a plot."""
    run = minimal_run(tmp_path / "run")
    source = {"kind": "run", "name": "run", "arm": "preskip", "seed": 42}
    path = write_explain(run / "explain/preskip-seed-42", layers=4, documents=2, tokens=60, source=source)
    assert read(build_report(run)).dangling == set()
    # What a command that was killed has left, or works in, is no explanation of the run.
    shutil.copytree(path.parent, run / "explain/.preskip-seed-42.abc")
    assert list(find_explains(run, {"arms": {"preskip": {}}})) == [path]
    change(path, documents=[])
    page = read(build_report(run))
    assert page.dangling == set()
    assert "#explain-found" in page.links
    assert "#explain-map" not in page.links


def test_words_stay_readable_on_every_shade() -> None:
    report, style = ((TEMPLATES / name).read_text() for name in ("report.css", "map.css"))
    inks = re.findall(r"--ink: (#[0-9a-f]{6})", report)
    surfaces = re.findall(r"--surface: (#[0-9a-f]{6})", report)
    ramps = re.findall(r":root[^{]*\{([^}]*--ramp-0[^}]*)\}", style)
    assert len(inks) == len(ramps) == 3

    def contrast(one: float, other: float) -> float:
        return (max(one, other) + 0.05) / (min(one, other) + 0.05)

    for ink, surface, block in zip(inks, surfaces, ramps, strict=True):
        for kind in ("ramp", "heat"):
            stops = [luminance(colour) for colour in re.findall(rf"--{kind}-\d: (#[0-9a-f]{{6}})", block)]
            assert len(stops) == 4
            # One hue from pale to deep: the order shows in the lightness alone, whatever colours the reader sees.
            assert stops in (sorted(stops), sorted(stops, reverse=True))
            assert contrast(stops[0], stops[3]) > 2.5
            if kind == "ramp":
                assert all(contrast(luminance(ink), stop) >= 4.5 for stop in stops), block
        lines = [luminance(colour) for colour in re.findall(r"--depth-\d: (#[0-9a-f]{6})", block)]
        assert all(contrast(line, luminance(surface)) >= 2 for line in lines)
