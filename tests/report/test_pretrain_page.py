"""What the report shows of a run from scratch: sizes, curves with bands, claims; by hand-made results."""

from preskip.cli.tables import _shown
from preskip.metrics import metric_named
from preskip.report.comparison_tables import scoreboard
from preskip.report.figures import make_figures
from preskip.report.load import load_json
from preskip.report.lookup import plain_arm
from preskip.report.plots.forest import forest_records
from preskip.report.plots.plane import plane_records
from preskip.report.plots.training import evaluation_records
from preskip.report.tables import size_table
from preskip.report.words.claims import assess

SETS = {"books": {"kind": "document", "domain": "in", "title": "books", "primary": "bits_per_byte"}}


def comparison(reference, difference, verdict):
    return {
        "set": "books", "metric": "bits_per_byte", "arm": "preskip", "reference": reference, "difference": difference,
        "low": difference - 0.01, "high": difference + 0.01, "confidence": 0.95, "seeds": 2, "units": 40,
        "unit": "document", "clusters": None, "covers": "seeds and documents", "p_value": 0.001, "p_holm": 0.003,
        "margin": 0.005, "p_equivalence": 0.9, "verdict": verdict, "declared": True, "gained": None, "lost": None,
    }  # fmt: skip


def arm(parameters, matched, deviation):
    return {
        "trainable_parameters": parameters, "parameters": parameters, "non_embedding": parameters - 1000,
        "budget": "matched" if matched else "smaller", "matched": matched, "deviation": deviation,
        "forward_flops_per_token": 2 * parameters, "training_flops": 6e9 * parameters, "tokens": 10**9,
        "tokens_per_second": 4321.4, "mfu": 0.4567, "seeds": [1, 2], "metrics": {}, "learning_rate": 3e-3,
    }  # fmt: skip


def curve(*losses):
    return [{"step": 10 * (i + 1), "tokens": 1000 * (i + 1), "eval_loss": loss} for i, loss in enumerate(losses)]


RESULTS = {
    "kind": "pretrain",
    "sets": SETS,
    "arms": {
        "preskip": arm(1_538_432, "parameters", 0.0),
        "base-wide": arm(1_537_792, "parameters", -0.000416),
        "base": arm(1_251_712, None, None),
    },
    "comparisons": [comparison("base", -0.05, "better"), comparison("base-wide", 0.02, "worse")],
    "curves": {
        "preskip": {"1": curve(5.0, 4.0), "2": curve(5.5, 4.1)},
        "base": {"1": curve(6.0, 4.5), "2": curve(6.2)},
    },
}
RECORD = {"arms": {}, "model": {"name": "llama-1m"}}


def test_curves_are_means_with_the_lowest_and_the_highest_where_every_seed_has_been():
    records = evaluation_records(RESULTS["curves"])
    assert [(r["arm"], r["tokens"], r["mean"], r["low"], r["high"]) for r in records] == [
        ("preskip", 1000, 5.25, 5.0, 5.5),
        ("preskip", 2000, 4.05, 4.0, 4.1),
        ("base", 1000, 6.1, 6.0, 6.2),
    ]


def test_the_figure_says_its_last_values_in_words():
    figure = next(figure for figure in make_figures(RESULTS, []) if figure["key"] == "evaluation")
    assert "preskip 4.0500 [4.0000, 4.1000] after 2,000 tokens" in figure["alt"]
    marks = [layer["mark"]["type"] for layer in figure["spec"]["layer"]]
    assert marks == ["area", "line"]


def test_sizes_and_how_near_the_controls_come():
    table = size_table(RESULTS)
    headings = [column.title for column in table.columns]
    rows = {row[0].text: {name: cell.text for name, cell in zip(headings, row, strict=True)} for row in table.rows}
    assert rows["base-wide"]["Matched to preskip"] == "parameters −0.04 %"
    assert rows["base"]["Matched to preskip"] == "–"
    own = rows["preskip"]
    assert own["Weights"] == "1,538,432"
    assert own["Training"] == "9.23"  # PFLOP: 6e9 · 1,538,432
    assert (own["FLOPs per token"], own["Tokens per second"], own["Utilisation"]) == ("3.08 M", "4,321", "46%")
    assert size_table({**RESULTS, "kind": "probe"}).rows == []


def test_arms_are_held_against_the_plain_architecture():
    assert plain_arm(RESULTS) == "base"
    assert scoreboard(RESULTS)["rows"] == []  # declared comparisons stand apart
    exploratory = [{**entry, "declared": False, "p_holm": None} for entry in RESULTS["comparisons"]]
    board = scoreboard({**RESULTS, "comparisons": exploratory})
    assert [row["arm"] for row in board["rows"]] == ["preskip"]
    assert (board["rows"][0]["cells"][0]["outcome"], board["rows"][0]["cells"][0]["p"]) == ("better", "0.001")


def test_each_control_is_a_claim_of_its_own():
    verdicts = {claim["id"]: claim["verdict"] for claim in assess(RECORD, RESULTS)}
    assert verdicts == {
        "scratch-base": "supported",
        "scratch-base-wide": "contradicted",
        "scratch-base-deep": "not measured",
        "scratch-base-flops": "not measured",
        "scratch-preproj": "not measured",
        "scratch-skip": "not measured",
        "scratch-parallel": "not measured",
    }


def test_an_unfinished_run_is_finished_with_its_own_command(tmp_path):
    import pytest

    from preskip.errors import PreskipError

    (tmp_path / "run.json").write_text('{"schema_version": 2, "kind": "pretrain"}')
    with pytest.raises(PreskipError, match="preskip pretrain --resume"):
        load_json(tmp_path / "results.json")


def test_from_scratch_the_plane_is_around_the_plain_architecture():
    far = {"books": SETS["books"], "letters": {**SETS["books"], "domain": "out"}}
    entries = [comparison("base", -0.05, "better"), {**comparison("base", 0.02, "worse"), "set": "letters"}]
    results = {**RESULTS, "sets": far, "comparisons": entries}
    (record,) = plane_records(results, "books", "letters")
    assert (record["arm"], record["x"], record["y"]) == ("preskip", 0.05, -0.02)
    plane = next(figure for figure in make_figures(results, []) if figure["section"] == "plane-letters")
    assert plane["alt"].startswith("Benefit against the plain architecture: preskip +0.0500 in-domain")


def test_among_many_pairs_those_with_the_plain_architecture_stay():
    others = [{**comparison(f"base-{i}", 0.01 * i, "worse"), "declared": False} for i in range(20)]
    plain = [{**comparison("base", -0.05, "better"), "declared": False}]
    plain.append({**plain[0], "arm": "base", "reference": "base-wide", "difference": 0.03})
    records = forest_records(others + plain, metric_named("bits_per_byte"), "base")
    assert [record["pair"] for record in records] == ["preskip − base", "base − base-wide"]
    assert _shown({**RESULTS, "comparisons": others + plain}) == plain
