"""The page: what it states, its safety, size and errors; what it does in a browser is tested under browser/."""

from __future__ import annotations

import builtins
import html
import json
import os
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixture_run import minimal_run, rich_run
from page_reader import Page, luminance, read
from preskip.errors import PreskipError
from preskip.report import build_report
from preskip.report.comparison_tables import detail_tables
from preskip.report.plots.training import POINT_BUDGET
from preskip.report.render import TEMPLATES, _vega_bundle

RESULTS = Path(__file__).parents[2] / "results"


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = rich_run(tmp_path_factory.mktemp("rich") / "run")
    path = build_report(run)
    assert path == run / "report.html"
    return run, read(path)


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = minimal_run(tmp_path_factory.mktemp("minimal") / "run")
    return run, read(build_report(run))


def test_the_page_states_the_results(rich: tuple[Path, Page]) -> None:
    _, page = rich
    for text in (
        "On the frontier of WikiText-2 test against books (exploratory): content, parallel.",
        "34,836,480 equal budget",
        "9,953,280 smaller",
        "35,136 floor, unmatched",
        "On its own text (WikiText-2 test) preskip is ",
        "0.781 [0.750, 0.812]",
        "29.2 % [26.1, 32.3]",
        "45 comparisons were declared before training",
        "Margins of equivalence: bits per byte ±0.0050; accuracy ±1.0 points; target loss ±0.020 nats.",
        "preskip and parallel are equivalent in bits per byte on WikiText-2 test",
        "3 seeds: the intervals cover both items and training randomness.",
        "1,500 items",
        "62 documents, 61,240 tokens, 280,512 bytes",
        "context 256, stride 256",
        "chose 0.003, grid extended",
        "+69.7 M",
        "Norm of the skip later more +0.91 [+0.76, +1.00] [−0.35, +0.36]",
        "what the same optimiser makes of gradients of pure noise",
        "Each arm's learning rate was tuned on development documents",
        "preskip probe --seeds 1,2,3 --out 'runs/my run'",
        "preskip probe --resume ",
        "134,515,008",
        "4 min 32 s",
        "LAMBADA accuracy rises, also at equal budget",
    ):
        assert text in page.visible, text


def test_a_minimal_run_says_what_it_lacks(minimal: tuple[Path, Page]) -> None:
    _, page = minimal
    for text in (
        "One seed: the intervals cover items only, not training randomness.",
        "Not measured in this run: LAMBADA accuracy rises, also at equal budget (needs the set lambada_openai); ",
        "; The content skip adds to the pre-projection (needs arm preproj); ",
        "80 items in 25 clusters",
        "no null band",
        "No family was declared before training",
        "Learning rates were fixed, not tuned.",
        "It is not LAMBADA",
        "this page measures only the former",
    ):
        assert text in page.visible, text
    for text in ("On the frontier", "Learning-rate search", "By loss", "rank correlation of"):
        assert text not in page.visible, text


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")

    def edit(results: dict[str, Any]) -> None:
        results["notes"] = ["skip, seed 2: its training diverged"]
        next(iter(results["sets"].values()))["notes"] = ["2 items had no context"]

    change(run / "results.json", edit)
    page = read(build_report(run))
    assert "Note: skip, seed 2: its training diverged." in page.visible
    assert ": 2 items had no context." in page.visible


def test_every_figure_has_words_and_every_link_a_target(rich: tuple[Path, Page]) -> None:
    _, page = rich
    assert page.unlabelled == []
    assert set(json.loads(page.scripts["specs"])) <= set(page.ids)
    assert page.dangling == set()
    assert len(page.ids) == len(set(page.ids))


def test_the_download_holds_the_stored_numbers(rich: tuple[Path, Page]) -> None:
    run, page = rich
    stored = json.loads(page.scripts["data"])
    assert stored == {name: json.loads((run / f"{name}.json").read_text()) for name in ("run", "results")}


def test_the_page_is_small_and_loads_nothing(rich: tuple[Path, Page]) -> None:
    run, page = rich
    text = (run / "report.html").read_text(encoding="utf-8")
    assert page.loads == [("link", "data:,")]
    assert not re.search(r"url\(|@import", page.scripts["style"])
    assert "default-src 'none'" in text
    assert list(run.glob(".report*")) == []
    # A long run with many seeds stays small: curves are thinned.
    long = rich_run(run.parent / "long", seeds=tuple(range(5)), steps=600)
    path = build_report(long)
    assert path.stat().st_size < 4_000_000
    assert len(json.loads(read(path).scripts["specs"])["training"]["data"]["values"]) <= POINT_BUDGET


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = minimal_run(tmp_path / "run", corpus=evil)

    def rename(results: dict[str, Any]) -> None:
        results["arms"]["<b>lora</b>"] = results["arms"].pop("lora")
        results["comparisons"][0]["arm"] = "</script><!--"
        results["sets"]["heldout"]["title"] = "<i>held</i>"

    change(run / "results.json", rename)
    page = read(build_report(run))
    assert page.tags.count("script") == 4
    assert not {"img", "b", "i"} & set(page.tags)
    assert f"smollm2 on {evil}" in html.unescape(page.visible)
    assert json.loads(page.scripts["data"])["run"]["corpus"]["name"] == evil
    drawn = json.loads(page.scripts["specs"])["forest-heldout-bits_per_byte"]["data"]["values"]
    assert "</script><!-- − none" in [row["pair"] for row in drawn]


def test_arms_are_compared_at_equal_harm_where_one_was_declared(tmp_path: Path) -> None:
    """Worked out by hand: half-way between the rates that lose 0.0 and 0.02."""
    run = rich_run(tmp_path / "run")
    assert "At equal harm" not in read(build_report(run)).visible
    reached = {"preskip": {1: -0.20, 2: -0.24}, "lora": {1: -0.21, 2: -0.26}}

    def point(change: float, harm: float, seed: int) -> dict[str, Any]:
        limits = {"value": harm, "low": harm - 0.01, "high": harm + 0.01}
        rate = {"rung": 1, "steps": 24, "learning_rate": 1e-3 + harm, "seed": seed, "for_seed": seed}
        inside = {"value": change, "low": change - 0.01, "high": change + 0.01}
        return {**rate, "dev": {"in": inside, "out": {"books": limits}}, "kept": False, "diverged": False}

    def searched(results: Any) -> None:
        for arm, by_seed in reached.items():
            trace = [
                point(change + shift, harm, seed)
                for seed, change in by_seed.items()
                for shift, harm in ((0.05, 0.0), (-0.05, 0.02))
            ]
            results["search"][arm] |= {"trace": trace, "by_seed": {"1": 1e-3, "2": 1e-3}, "chosen": 1e-3}

    change(run / "results.json", searched)
    change(run / "run.json", lambda record: record["config"].update(lr_rule="frontier", lr_harm=0.01))
    text = read(build_report(run)).visible
    assert "a loss of up to 0.01 bits per byte on the worst out-of-domain development text" in text
    # Differences of +0.01 and +0.02: 0.015 and 12.7 standard errors of 0.005 on either side; t = 3 of one degree.
    assert "preskip −0.200, −0.240 +0.015 [−0.049, +0.079] 0.2" in text
    assert "lora −0.210, −0.260 – – –" in text
    assert "hints at what the choice adds" not in text  # two seeds tell nothing of it


def test_what_the_rates_have_is_told_below_the_search(tmp_path: Path) -> None:
    """The figures of docs/confirmatory.md, which tests/stats/test_rates.py holds against NumPy."""
    for file in ("run.json", "results.json"):
        shutil.copy(RESULTS / "confirmatory-smollm2-wikitext2" / file, tmp_path / file)
    text = read(build_report(tmp_path)).visible
    assert "hints at what the choice adds" in text
    assert "content − lora 0.0011 0.0017 0.0064 0.0023 5" in text


def test_what_stands_behind_a_difference_is_told_of_every_one() -> None:
    results = json.loads((RESULTS / "confirmatory-smollm2-books24" / "results.json").read_text())
    declared, others = detail_tables(results)
    assert len(declared.rows) == len(results["family"]["declared"]) == 8
    assert len(declared.rows) + len(others.rows) == len(results["comparisons"]) == 72
    shown = {(row[0].text, row[1].text) for row in (*declared.rows, *others.rows)}
    assert len(shown) == 72  # each once
    seeds = others.rows[0][2].text.split()
    assert len(seeds) == len(results["search"]["lora"]["by_seed"]) > 2
    undeclared = {**results, "comparisons": [{**entry, "declared": False} for entry in results["comparisons"]]}
    every, none = detail_tables(undeclared)
    assert (len(every.rows), none.rows) == (72, [])


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    change(run / "run.json", lambda record: record.update(status="interrupted", finished=None))
    assert "This run is interrupted, not finished." in read(build_report(run)).visible


def test_a_run_of_several_machines_names_them(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    assert "Parts computed on" not in read(build_report(run)).visible

    def moved(record: dict[str, Any]) -> None:
        other = {**record["environment"], "processor": "Other CPU", "torch": "2.12.1"}
        record["earlier_environments"] = [other, {**other, "memory_bytes": 1}, record["environment"]]

    change(run / "run.json", moved)
    assert read(build_report(run)).visible.count("Other CPU, 2.12.1") == 1


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")

    def strip(results: dict[str, Any]) -> None:
        results["comparisons"], results["arms"] = [], {"none": results["arms"]["none"]}
        for key in ("depth", "family"):
            del results[key]
        del results["sets"]["last_word"], results["arms"]["none"]["metrics"]["last_word"]

    change(run / "results.json", strip)
    page = read(build_report(run))
    assert "Nothing was compared with the untouched model" in page.visible
    assert "The branch by layer" not in page.visible
    assert page.dangling == set()
    assert json.loads(page.scripts["specs"]) == {}


def test_a_nan_loss_is_a_gap(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    log = run / "arms/lora/seed-42/train.jsonl"
    log.write_text(log.read_text() + '{"step": 17, "loss": NaN}\n')
    specs = json.loads(read(build_report(run)).scripts["specs"])
    last = [row for row in specs["training"]["data"]["values"] if row["arm"] == "lora"][-1]
    assert (last["step"], last["loss"]) == (17, None)


def test_errors_are_one_line_and_leave_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = minimal_run(tmp_path / "run")
    build_report(run)
    before = (run / "report.html").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(PreskipError, match=message) as caught:
            build_report(run)
        assert "\n" not in str(caught.value)
        assert (run / "report.html").read_bytes() == before

    results = (run / "results.json").read_text()
    for text, message in (
        (results[:200], "results.json is not valid JSON"),
        ("[1]", "holds a list, not an object"),
        (results.replace("34836480", "NaN"), "NaN is not a number"),
        (results.replace('"schema_version": 2', '"schema_version": 1'), "has schema_version 1, .* reads 2"),
        (results.replace('"tokens": 8436', '"tokens": "many"'), "lacks what the report needs .ValueError"),
        (results.replace("34836480", "1e999"), "lacks what the report needs"),
        ('{"schema_version": 2}', "lacks what the report needs .*'arms'"),
    ):
        (run / "results.json").write_text(text)
        refused(message)
    (run / "results.json").unlink()
    refused("results.json is missing: finish the run with `preskip probe --resume")
    (run / "results.json").write_text(results)
    log = run / "arms/preskip/seed-42/train.jsonl"
    log.write_text(log.read_text() + '{"step": 17, "lo')
    refused("train.jsonl line 17 is not a JSON object: run the arm again, or move the file away")
    log.unlink()  # a missing log is no error: the curve is left out
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused("no space left on the disk while writing .*report.html")
    assert list(run.glob(".report*")) == []
    with pytest.raises(PreskipError, match=r"holds no run\.json: give a run directory"):
        build_report(run / "arms")
    with pytest.raises(PreskipError, match="is not a directory"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    run = minimal_run(tmp_path / "run")
    _vega_bundle.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PreskipError, match=rf"needs {package}, .*pip install 'preskip\[report\]'"):
        build_report(run)
    assert not (run / "report.html").exists()


def test_contrast_is_wcag_aa_in_both_themes() -> None:
    style = (TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*--page[^}]*)\}", style)
    assert len(blocks) == 3
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        surfaces = [colours[name] for name in ("page", "surface", "tint")]

        def contrast(name: str, surface: str, colours: dict[str, str] = colours) -> float:
            a, b = sorted((luminance(colours[name]), luminance(surface)), reverse=True)
            return (a + 0.05) / (b + 0.05)

        for surface in surfaces:
            for name in ("ink", "muted", "accent", "better", "worse", "undecided", "equivalent"):
                assert contrast(name, surface) >= 4.5, (name, surface)
        for name in ("control", *(f"arm-{n}" for n in range(1, 9))):
            assert contrast(name, colours["surface"]) >= 3, name


# What protanopia and deuteranopia leave of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.mark.parametrize("vision", VISIONS)
def test_arms_differ_for_colour_blind_readers(vision: str) -> None:
    def lab(colour: str) -> np.ndarray:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(VISIONS[vision]) @ linear, 0, 1)
        x, y, z = np.cbrt(TO_XYZ @ seen / (0.9505, 1.0, 1.089))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    style = (TEMPLATES / "report.css").read_text()
    for block in re.findall(r":root[^{]*\{([^}]*--page[^}]*)\}", style):
        colours = [lab(colour) for colour in re.findall(r"--arm-\d: (#[0-9a-f]{6})", block)]
        assert len(colours) == 8
        assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 25


def test_the_papers_columns_stand_beside_its_table(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    columns = {"paper:lambada": 0.3017, "paper:wikitext": 61.25}
    theirs = {"preskip": {"paper:lambada": 0.18, "paper:wikitext": 47.9}}
    results["paper"] = {"columns": {"none": columns, "preskip": columns}, "model": "pythia-160m", "published": theirs}
    (run / "results.json").write_text(json.dumps(results))
    page = build_report(run).read_text()
    section = page[page.index('id="paper-scoring"') :].split("</section>")[0]
    assert section.count("0.302") == section.count("61.250") == 2
    assert section.count("47.900") == section.count("0.180") == 1
    assert "pythia-160m" in section
