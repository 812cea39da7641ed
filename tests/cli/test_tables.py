import json

import pytest

from fixture_run import minimal_run, rich_run
from preskip.cli.tables import print_claims, print_results


def load(run):
    return (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))


@pytest.fixture(scope="module")
def minimal(tmp_path_factory):
    return list(load(minimal_run(tmp_path_factory.mktemp("minimal") / "run")))


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return list(load(rich_run(tmp_path_factory.mktemp("rich") / "run", steps=1)))


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_no_figure_is_cut_at_any_width(monkeypatch, capsys, tmp_path, columns, minimal):
    monkeypatch.setenv("COLUMNS", columns)
    results = minimal[1]
    print_results(results, None)
    out = capsys.readouterr().out
    first = next(entry for entry in results["comparisons"] if entry["arm"] == "preskip")
    for figure in (
        "34.836M",
        "0.001",
        "0.8566",  # 1.0276 − 0.171
        "48.8",  # .4875 in per cent
        "4.61",
        "2.33",
        f"−{abs(first['difference']):.4f}",
        f"[−{abs(first['low']):.4f}, −{abs(first['high']):.4f}]",
        "better",
        "items only, not training randomness (one seed)",
        "SOTU, held out (in-domain): 50 documents, 8,436 tokens, context 256",
        "last word (SOTU) (in-domain): 80 items",
    ):
        assert figure in " ".join(out.split()), figure
    assert "…" not in out
    assert "more comparisons" not in out


def test_what_intervals_cover_is_told_where_pairs_have_other_seeds(capsys, minimal):
    results = json.loads(json.dumps(minimal[1]))
    for number, entry in enumerate(results["comparisons"]):
        entry["seeds"] = 3 if number else 1
    print_results(results, None)
    assert "intervals cover up to 3 seeds and items" in " ".join(capsys.readouterr().out.split())


def test_what_was_left_out_is_told(capsys, minimal):
    print_results({**minimal[1], "notes": ["preskip, seed 2: the loss is nan at step 3"]}, None)
    assert "Note: preskip, seed 2: the loss is nan at step 3." in " ".join(capsys.readouterr().out.split())


def test_a_perplexity_beyond_all_measure_stays_short(capsys, tmp_path, minimal):
    results = json.loads(json.dumps(minimal[1]))
    results["sets"]["heldout"]["primary"] = "word_perplexity"
    results["arms"]["none"]["metrics"]["heldout"]["word_perplexity"]["value"] = 1781061.9
    print_results(results, None)
    assert "1.78e6" in capsys.readouterr().out


def test_many_arms_print_the_declared_comparisons_only(monkeypatch, capsys, tmp_path, rich):
    monkeypatch.setenv("COLUMNS", "100")
    results = rich[1]
    print_results(results, tmp_path / "report.html")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 95
    declared = [entry for entry in results["comparisons"] if entry["declared"]]
    assert len(declared) == 45
    pairs = [line for line in lines if " − " in line]
    assert len(pairs) == len(declared)
    assert f"{len(results['comparisons']) - 45} more comparisons in the report" in lines
    # The untouched model is the first reference of every set, and the best arm leads.
    first = next(line for line in pairs)
    best = min(
        (e for e in results["comparisons"] if e["set"] == "wikitext2" and e["reference"] == "none"),
        key=lambda entry: entry["difference"],
    )
    assert first.split()[0] == best["arm"]
    assert any(line.startswith("On the frontier of WikiText-2 test against books (exploratory): ") for line in lines)


def test_claims_are_a_line_each(monkeypatch, capsys, rich, minimal):
    monkeypatch.setenv("COLUMNS", "400")
    print_claims(*rich)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 2 + 10 + 1  # header, claims and controls, the mark
    assert "not shown" in next(line for line in lines if "LAMBADA accuracy rises" in line)
    assert "not measured" in next(line for line in lines if "K/V cache" in line)
    print_claims(*minimal)
    lines = capsys.readouterr().out.splitlines()
    assert "needs the set lambada_openai" in next(line for line in lines if "LAMBADA accuracy" in line)
    assert "needs arm preproj" in next(line for line in lines if "content skip adds" in line)
