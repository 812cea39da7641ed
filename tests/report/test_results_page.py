"""The tables of the pages of results are those of the stored runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from preskip.stats.designs import Design, resolvable
from preskip.stats.equal_harm import mean_difference
from preskip.stats.families import holm
from preskip.stats.rates import rate_spreads
from scripts import load_script

ROOT = Path(__file__).parents[2]
PAGES = {
    "standard-wikitext2": "standard-runs.md",
    "standard-books": "standard-runs.md",
    "confirmatory-smollm2-wikitext2": "confirmatory.md",
    "confirmatory-smollm2-books24": "confirmatory-books.md",
    "confirmatory-gemma-3-270m-wikitext2": "confirmatory-gemma.md",
    "confirmatory-gemma-3-270m-books24": "confirmatory-gemma-books.md",
}


def test_every_stored_comparison_has_a_page():
    found = {
        path.parent.name for kind in ("standard", "confirmatory") for path in ROOT.glob(f"results/{kind}-*/run.json")
    }
    assert found == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_stored_results(name):
    page = (ROOT / "docs" / PAGES[name]).read_text(encoding="utf-8")
    results, manifest = (json.loads((ROOT / f"results/{name}/{kind}.json").read_text()) for kind in ("results", "run"))
    found = list(load_script("results_tables").tables(results, manifest["config"]))
    assert len(found) == (8 if name.startswith("confirmatory") else 6)
    for heading, table in found:
        assert len(table.splitlines()) > 2
        assert table in page, f"{heading} of {name}: run benchmarks/results_tables.py again"


def stored(name):
    return json.loads((ROOT / f"results/{name}/results.json").read_text())


def test_every_arm_of_every_run_stands_on_the_page_of_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    runs = [(name.split("-", 1)[1].rsplit("-", 1)[0], stored(name)) for name in PAGES if name.startswith("conf")]
    gain, harm = (table for _, table in load_script("results_overview").tables(runs))
    for table in (gain, harm):
        assert table in page, "run benchmarks/results_overview.py again"
    # By hand, of one cell each.
    found = {
        results["sets"][entry["set"]]["domain"]: entry
        for results in [runs[0][1]]
        for entry in results["comparisons"]
        if (entry["arm"], entry["reference"]) == ("content", "none")
    }
    rival = next(e for e in runs[0][1]["comparisons"] if e["arm"] == "lora" and e["reference"] == "none")
    share = 100 * found["in"]["difference"] / rival["difference"]
    assert f"| `content` | {-found['in']['difference']:.3f} ({share:.0f} %) |" in gain
    assert f"| `content` | {found['out']['difference']:+.3f} [{found['out']['low']:+.3f}, " in harm


def test_the_declared_questions_are_those_of_the_stored_runs():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows, harms, p_values = {}, [], []
    for model, text, name in (
        ("SmolLM2-135M", "WikiText", "smollm2-wikitext2"),
        ("SmolLM2-135M", "books", "smollm2-books24"),
        ("Gemma-3-270M", "WikiText", "gemma-3-270m-wikitext2"),
        ("Gemma-3-270M", "books", "gemma-3-270m-books24"),
    ):
        results = stored(f"confirmatory-{name}")
        pairs, power = (
            {
                results["sets"][entry["set"]]["domain"]: entry
                for entry in results[key]
                if (entry["arm"], entry["reference"], entry["metric"]) == ("content", "lora", "bits_per_byte")
            }
            for key in ("comparisons", "power")
        )
        rows[f"| {model}, {text} |"] = pairs["in"]
        p_values.append(pairs["in"]["p_holm"])
        harms.append(power["out"]["resolvable"])
    for (start, entry), together in zip(rows.items(), holm(p_values), strict=True):
        cells = next(line for line in page.splitlines() if line.startswith(start)).replace("−", "-").split("|")
        difference, low, high = map(float, re.findall(r"[-+][\d.]+", cells[3]))
        looked = entry["looked"]
        assert (difference, low, high) == pytest.approx((entry["difference"], looked["low"], looked["high"]), abs=6e-4)
        for cell, value in ((cells[4], entry["p_holm"]), (cells[6], together)):
            assert value < 1e-4 if cell.strip() == "< 0.0001" else float(cell) == pytest.approx(value, rel=0.02)
    words = " ".join(page.split())
    assert "could detect {2:.3f} (80 % power; SmolLM2's {0:.3f})".format(*harms) in words
    assert "with SmolLM2, where {1:.3f} could have been detected".format(*harms) in words
    assert "with Gemma, whose first look could detect {3:.2f}".format(*harms) in words


def test_the_page_of_the_peers_is_what_its_script_prints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = load_script("scratch_report")
    shutil.copytree(ROOT / "results" / "peers", tmp_path / "peers")
    monkeypatch.setattr(sys, "argv", ["scratch_report.py", str(tmp_path / "peers" / "llama-1m")])
    assert script.main() == 0
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    arms, questions = capsys.readouterr().out.split("\n\n")[1:3]
    assert len(arms.splitlines()) == 2 + 17
    assert len(questions.splitlines()) == 2 + 13
    assert arms.strip() in page
    assert questions.strip() in page
    marks, words = drawn((tmp_path / "peers" / "llama-1m" / "loss.svg").read_text(encoding="utf-8"))
    stored_marks, stored_words = drawn((ROOT / "docs" / "peers-llama-1m.svg").read_text(encoding="utf-8"))
    assert words == stored_words
    assert marks == pytest.approx(stored_marks, abs=0.5)


def test_what_the_page_of_the_peers_says_in_words(monkeypatch):
    page = " ".join((ROOT / "docs" / "peers.md").read_text(encoding="utf-8").split()).replace("−", "-")
    results = stored("peers/llama-1m/study")
    declared = {(entry["reference"], entry["set"]): entry for entry in results["comparisons"] if entry["declared"]}
    assert len(declared) == 6
    for (reference, name), entry in declared.items():
        if name == "sotu":
            shown = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**entry)
            assert f"against `{reference}`" in page
            assert shown in page
    losses = {
        arm: {seed: points[-1]["eval_loss"] for seed, points in curves.items()}
        for arm, curves in results["curves"].items()
    }
    for arm in ("gated-attention", "base-wide", "base-flops", "canon", "preskip"):
        less = mean_difference(losses["base"], losses[arm])
        assert f"{less['value']:.3f}" in page
        assert f"[{less['low']:.3f}, {less['high']:.3f}]" in page
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    asked = [set(pair) for pair in load_script("scratch_report").QUESTIONS]
    found = [
        entry["deviations"]["seed"]
        for entry in results["comparisons"]
        if {entry["arm"], entry["reference"]} in asked and entry["set"] == "sotu"
    ]
    assert len(found) == 13
    assert f"varies by {min(found):.3f} to {max(found):.3f}" in page


def test_what_other_amounts_of_text_would_resolve_is_that_of_the_stored_runs():
    page = (ROOT / "docs" / "probe.md").read_text(encoding="utf-8")
    for title, name in zip(
        ("SmolLM2, WikiText", "SmolLM2, books", "Gemma, WikiText", "Gemma, books"),
        ("smollm2-wikitext2", "smollm2-books24", "gemma-3-270m-wikitext2", "gemma-3-270m-books24"),
        strict=True,
    ):
        results = stored(f"confirmatory-{name}")
        found = {}
        for entry in results["power"]:
            if (entry["arm"], entry["reference"], entry["metric"]) == ("content", "lora", "bits_per_byte"):
                design = Design(**{**entry["design"], "seeds": 5})
                units = (design.units // 2, design.units, 4 * design.units)
                found[results["sets"][entry["set"]]["domain"]] = [resolvable(design.of_units(n)) for n in units]
        cells = " | ".join(f"{figure:.4f}" for figure in (*found["in"], *found["out"]))
        assert f"| {title} | {cells} |" in page
        assert max(found["in"]) < 0.005


def test_what_the_rates_have_of_the_spread_is_that_of_the_stored_searches():
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    runs = [name for name in PAGES if name.startswith("confirmatory")]
    found, of_rates = {}, {"in": [], "out": []}
    for name in runs:
        search = stored(name)["search"]
        for arm in search:
            for domain, spread in rate_spreads(search[arm], search["lora"]).items() if arm != "lora" else ():
                of_rates[domain].append((name, arm, spread["common"] ** 2 < spread["own"] ** 2 / 2))
        every = [rate_spreads(search[arm], search["lora"]) for arm in search if arm != "lora"]
        spreads = [spread["in"] for spread in every if spread]
        found[name] = {key: max(spread[key] for spread in spreads) for key in ("own", "common")}
    first = found["confirmatory-smollm2-wikitext2"]
    assert f"varies over seeds by up to {max(row['own'] for row in found.values()):.3f}" in page
    assert first["own"] == max(row["own"] for row in found.values())
    assert f"at one rate per arm by at most {first['common']:.4f} there" in page
    assert f"by at most {max(row['common'] for row in found.values()):.4f} in all four runs" in page
    counts = {domain: f"{sum(row[2] for row in rows)} of {len(rows)}" for domain, rows in of_rates.items()}
    assert f"More than half of the variance is the rates' for {counts['in']} arms and runs" in page
    assert f"of that of harm for {counts['out']}, all with SmolLM2" in page
    assert ("confirmatory-smollm2-wikitext2", "content", False) in of_rates["in"]
    assert all("smollm2" in name for name, _, are_rates in of_rates["out"] if are_rates)


def test_how_near_the_limit_on_harm_the_rates_came_is_what_the_search_says():
    page = " ".join((ROOT / "docs" / "confirmatory.md").read_text(encoding="utf-8").split())
    search = stored("confirmatory-smollm2-wikitext2")["search"]
    harms = {
        arm: {
            row["for_seed"]: row["dev"]["out"]["books24"]["value"]
            for row in search[arm]["trace"]
            if row["rung"] == 1 and row["kept"]
        }
        for arm in ("content", "lora")
    }
    content, lora = ([f"{harms[arm][seed]:+.3f}".replace("-", "−") for seed in range(1, 6)] for arm in harms)
    assert f"{', '.join(content[:4])} and {content[4]} against {', '.join(lora[:4])} and {lora[4]}" in page
    assert [harms["content"][seed] > harms["lora"][seed] for seed in range(1, 6)] == [False, True, True, True, True]
    assert "In four of five seeds the grid lets `content` come nearer to the limit on harm" in page


def test_the_picture_is_that_of_the_stored_results():
    pytest.importorskip("vl_convert")
    runs = [json.loads((ROOT / f"results/standard-{name}/results.json").read_text()) for name in ("wikitext2", "books")]
    figure = load_script("results_figure")
    marks, words = drawn(figure.draw(runs, ["smollm2", "smollm2"]))
    stored_marks, stored_words = drawn((ROOT / "docs" / "standard-runs.svg").read_text(encoding="utf-8"))
    assert words == stored_words
    assert {"preskip", "lora", "trained on books", "Out-of-domain: points of accuracy gained → better"} <= set(words)
    assert marks == pytest.approx(stored_marks, abs=0.5)
    # Seven arms in four panels, and in the legend; better is up and right.
    assert len(marks) == 2 * (4 * 7 + 7)
    # The confirmatory ones; several models are named.
    names = [name for name in PAGES if name.startswith("confirmatory")]
    found = drawn(figure.draw([stored(name) for name in names], ["smollm2"] * 2 + ["gemma-3-270m"] * 2))[1]
    assert found == drawn((ROOT / "docs" / "results.svg").read_text(encoding="utf-8"))[1]
    assert "gemma-3-270m, trained on wikitext2" in " ".join(found)
    found = figure.differences(runs[1], "preskip", "books", "lambada_openai")
    assert found["books"] == pytest.approx((0.0489, 0.0323, 0.0655), abs=1e-4)
    assert found["lambada_openai"] == pytest.approx((-0.96, -6.8, 4.9), abs=0.1)


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("confirmatory")])
def test_the_picture_at_equal_harm_is_that_of_the_stored_search(name):
    pytest.importorskip("vl_convert")
    results = json.loads((ROOT / f"results/{name}/results.json").read_text())
    figure = load_script("equal_harm_figure")
    stored = (ROOT / "docs" / PAGES[name].replace(".md", "-equal-harm.svg")).read_text(encoding="utf-8")
    assert drawn(figure.draw(results, 0.01))[1] == drawn(stored)[1]
    gains = {row["arm"]: row["gain"] for row in figure.records(results, [0.01])}
    tables = dict(load_script("results_tables").tables(results, {"lr_rule": "frontier", "lr_harm": 0.01}))
    rows = re.findall(r"`([\w-]+)` \| ([^|]*) \|", tables["At equal harm"])
    # No line of an arm of which a seed's rates do not tell.
    by_seed = {arm: changes.replace("−", "-").split(", ") for arm, changes in rows if "–" not in changes}
    assert gains == {arm: pytest.approx(-sum(map(float, own)) / len(own), abs=6e-4) for arm, own in by_seed.items()}
    assert figure.records(results, [-1.0]) == []
    # On WikiText every arm is best at the highest rate that was tried; on books more harm would bring no more.
    assert bool(figure.records(results, [1.0])) == (name == "confirmatory-smollm2-books24")


def drawn(svg):
    """Places of all marks, x and y in turn, and all words of a picture."""
    symbols = re.findall(r'<g class="mark-symbol [^>]*>(.*?)</g>', svg, re.DOTALL)
    places = re.findall(r'<path[^>]* transform="translate\(([-0-9.]+),([-0-9.]+)\)"', "".join(symbols))
    return [float(value) for place in places for value in place], re.findall(r">([^<>]+)</(?:text|tspan)>", svg)
