"""What is printed: 80 columns, figures as a person writes them, text that is not ours as it stands."""

from __future__ import annotations

import ast
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from rich.text import Text

from preskip import progress
from preskip.cli import doctor, main, printing, tables
from preskip.cli.audit import print_audit
from preskip.cli.evaluate import _print as print_eval
from preskip.cli.explain import _print as print_explain
from preskip.errors import PreskipError
from preskip.report.words.claims import assess
from preskip.report.words.verdicts import number
from stored_runs import invoke_app

ROOT = Path(__file__).parents[2]
RUNS = [ROOT / "results" / name for name in ("standard-wikitext2", "standard-books", "scratch-books")]
# Mark-up, a closing tag that nothing opened, a link, an emoji code.
ODD = "a[red]b[/]c[/x] [link=d]:smile: preskip[report]"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(call, *arguments) -> str:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        call(*arguments)
    return out.getvalue()


def interval(value: float, half: float = 0.5) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def audit_report(name: str = "wikitext2-of-somebody") -> dict:
    figures = {name: {"bits_per_byte": interval(1.0, 0.1), "word_perplexity": interval(451837690085.451, 1e10)}}
    figures["lambada_openai"] = {"acc": interval(0.4, 0.03)}
    return {
        "dtypes": {label: {"metrics": figures, "seconds": 12.5} for label in ("float32", "bfloat16", "autocast")},
        "comparisons": [
            {"arm": label, "set": set_, "metric": metric, "verdict": "equivalent"}
            | {"difference": -1e-7, "low": -0.0011, "high": 0.0012}
            for label in ("bfloat16", "autocast")
            for set_, metrics in figures.items()
            for metric in metrics
        ],
        "context_length": 512,
        "weights_rounded": 0.9,
        "attn_implementation": "sdpa",
        "published": None,
    }


def eval_results(name: str = "wikitext2-of-somebody") -> dict:
    return {
        "sets": {name: {"kind": "document", "documents": 62}},
        "metrics": {name: {"bits_per_byte": interval(1.1), "word_perplexity": interval(451837690085.451, 1e10)}},
        "lm_eval": {name: {"mcc": -0.00001}},
        "context_length": 512,
        "stride": 512,
        "seconds": 1.25,
    }


def explain_content(token: str = " the") -> dict:
    part = {"value": -0.00001, "low": -0.0021, "high": 0.0022}
    layer = {"skip_to_attention": interval(0.02), "enrichment": interval(0.03), "effective_rank": 77.0}
    layer |= {"ablation": dict.fromkeys(("skip", "enrichment", "both"), part), "promoted": [[token, 1.0]] * 3}
    return {
        "layers": [{"layer": index, **layer} for index in range(30)],
        "texts": [{"tokens": 900}],
        "method": {"ablation_documents": 8},
        "timings": {"total": 33.25},
    }


def plans() -> dict:
    from preskip.experiment.pretrain_options import PretrainConfig
    from preskip.experiment.scratch_inputs import plan_arms

    return plan_arms(PretrainConfig(), None)


def fits(text: str) -> None:
    for line in text.splitlines():
        assert len(line) <= 80, line
    assert "…" not in text


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_stored_runs_fit_80_columns(run: Path) -> None:
    record, results = (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))
    shown = printed(tables.print_results, results, None)
    for call in (lambda: tables.print_claims(record, results), lambda: tables.print_paper(results)):
        fits(printed(call))
    fits(shown)
    for entry in results["comparisons"]:
        if entry["declared"]:
            assert f"{entry['arm']} − {entry['reference']}" in shown
    assert "p (corr.)" in shown
    assert ("p (raw)" in shown) == ("†" in shown)
    for command in ("compare", "power") if run.name == "scratch-books" else ():  # the others take seconds each
        fits(invoke_app(command, run, columns=80))
    if "dtype_audit" in results:
        fits(printed(print_audit, results["dtype_audit"]))


def test_what_is_not_a_run_fits_80_columns() -> None:
    audit, scored = printed(print_audit, audit_report()), printed(print_eval, eval_results(), None)
    for text in (audit, scored, printed(print_explain, explain_content(), [])):
        fits(text)
        assert not re.search(r"[-−+]0\.0+\b", text)
    for text in (audit, scored):
        assert "4.52e11" in text
        assert "451837690085" not in text
    from preskip.cli.pretrain import print_plans

    shown = printed(print_plans, plans())
    fits(shown)
    for word in ("layers", "weights", "MFLOP/token", "training PFLOP", "against preskip"):
        assert word in shown
    fits(invoke_app("data", columns=80))


def test_declared_and_exploratory_rows_stand_apart_and_each_p_says_which_it_is(capsys) -> None:
    """The same pair of raw 0.022 and of corrected 0.116 must not stand in one column."""
    run = RUNS[2]
    results = json.loads((run / "results.json").read_text())
    tables.print_results(results, None)
    declared, exploratory = capsys.readouterr().out.split("\nexploratory ")
    declared = declared[declared.index("\ndeclared before training") :]
    assert "p (corr.)" in declared
    assert "†" not in declared
    rows = [line for line in exploratory.splitlines() if " − " in line]
    assert rows
    assert all(row.rstrip().endswith("†") for row in rows)
    worst = next(e for e in results["comparisons"] if e["declared"] and e["reference"] == "base-flops")
    assert f"{worst['p_holm']:.2g}" in declared


def test_claims_are_marked_as_on_the_page(capsys) -> None:
    run = RUNS[0]
    record, results = (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))
    tables.print_claims(record, results)
    shown, claims = capsys.readouterr().out, assess(record, results)
    assert {claim["exploratory"] for claim in claims if claim["id"] in ("depth", "cache")} == {True, False}
    assert shown.count("†") - 1 == sum(claim["exploratory"] for claim in claims)  # less that of the note


def test_where_nothing_is_resolved_it_is_said() -> None:
    entry = {"metric": "acc", "difference": 0.306, "low": -3.556, "high": 4.167}
    assert printing.difference_cell(entry) == "+30.6 (resolves nothing)"
    assert printing.difference_cell({**entry, "low": -0.1}).startswith("+30.6 [−10.0, +4")
    assert printing.size_cell("acc", 1.5) == "nothing"
    assert printing.size_cell("acc", 0.012) == "1.2"
    assert printing.size_cell("bits_per_byte", 1.5) == "1.5"


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(451837690085.451, 4, "4.52e11"), (-0.00001, 4, "0.0000"), (-123456.7, 1, "−1.23e5"), (34836480, 0, "34,836,480")],
)
def test_one_formatter_of_numbers(value: float, places: int, text: str) -> None:
    assert number(value, places) == text


def test_columns_without_room_go_below(capsys) -> None:
    table = printing.columns("a name", right=[f"figure {i}" for i in range(12)], last="said")
    table.add_row("one", *[f"{i}.0000000" for i in range(12)], "word")
    printing.print_table(table)
    out = capsys.readouterr().out
    fits(out)
    assert out.count("a name") == 2
    for index in range(12):
        assert f" {index}.0000000" in out
    assert "word" in out


def test_text_that_is_not_ours_is_printed_as_it_stands(capsys, monkeypatch) -> None:
    def found() -> str:
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    table = printing.columns(ODD, right=[ODD], last=ODD)
    table.add_row(ODD, ODD, ODD)
    table.title = Text(ODD)
    monkeypatch.setenv("COLUMNS", "400")
    printing.print_table(table, [ODD], [ODD])
    assert found().count(ODD) == 9
    progress.say(ODD)
    with progress.progress_bar(ODD, 3):
        pass
    assert found().count(ODD) == 2
    with suppress(SystemExit):
        main.main([ODD])
    assert ODD in found()
    with pytest.raises(SystemExit):
        main.main(["report", ODD])
    assert ODD in found()
    print_audit(audit_report(ODD))
    assert f"{ODD}, bits per byte" in found()
    print_eval(eval_results(ODD), Path(ODD))
    assert found().count(ODD) == 2
    print_explain(explain_content(ODD), [Path(ODD)])
    assert found().count(ODD) == 3 * 30 + 1
    doctor._print(
        {
            "preskip": "1",
            "environment": {"processor": ODD},
            "devices": [{"name": ODD, "bfloat16": True}],
            "cache": {"path": ODD},
            "missing": {"report": {"modules": ["altair"], "mend": ODD}},
            "problems": [ODD],
            "adapter_problem": ODD,
            "serving_problem": ODD,
        }
    )
    assert found().count(ODD) == 7


def test_a_terminal_shows_text_as_it_stands_too(monkeypatch) -> None:
    out = progress.Console(force_terminal=True, width=200, record=True, color_system=None, markup=False, emoji=False)
    monkeypatch.setattr(progress, "console", lambda **_: out)
    with progress.progress_bar(ODD, 3) as advance:
        advance(1, ODD)
    with progress.spinner(ODD):
        pass
    assert out.export_text().count(ODD) >= 3


def test_consoles_are_made_in_one_place() -> None:
    """Any other would read mark-up in what it prints."""
    for path in (ROOT / "src/preskip").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
        assert "Console" not in names or path.name == "progress.py", path
        assert "from_markup" not in names, path


def test_an_extra_that_is_absent_is_no_problem(capsys, monkeypatch) -> None:
    from preskip.runs import environment

    before = environment.version_of
    monkeypatch.setattr(environment, "version_of", lambda name: None if name == "lm_eval" else before(name))
    monkeypatch.setitem(doctor.EXTRAS, "imaginary", (("no_such_module",), "pip install 'preskip[report]'"))
    with pytest.raises(SystemExit) as stop:
        main.main(["doctor"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "no_such_module: pip install 'preskip[report]'" in out
    assert "problem:" not in out
    monkeypatch.setattr(environment, "version_of", lambda name: None if name == "safetensors" else before(name))
    with pytest.raises(SystemExit) as stop:
        main.main(["doctor"])
    assert stop.value.code == 1
    assert "problem: safetensors is not installed" in capsys.readouterr().out


def test_an_error_is_one_line_with_its_brackets(capsys, monkeypatch) -> None:
    def fail(*_, **__):
        raise PreskipError(ODD)

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main([])
    assert capsys.readouterr().err == f"error: {ODD}\n"
