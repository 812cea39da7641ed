"""A run's stored figures as the Markdown tables of docs/confirmatory.md and docs/standard-runs.md.

    python benchmarks/results_tables.py results/standard-wikitext2

The arms, the comparisons declared before training with their corrected p-values, the exploratory ones apart from them
with raw p-values and marked verdicts, the rates that were searched, the gains at equal harm where a limit on harm was
declared, and the trends over depth, from results.json and the options in run.json alone.
tests/report/test_results_page.py holds the pages to these tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preskip.metrics import metric_named
from preskip.report.load import load_json
from preskip.report.lookup import (
    DOMAINS,
    development,
    find,
    is_chosen,
    is_declared,
    metric_on,
    plain_arm,
    rate_text,
    trained_arms,
)
from preskip.report.search_tables import at_equal_harm, changes_text, spread_texts, spreads_of_rates
from preskip.report.words.claims import MEASURES
from preskip.report.words.verdicts import (
    MINUS,
    decimals,
    difference_text,
    limits_text,
    mean_difference_texts,
    nulls_text,
    number,
    p_text,
)
from preskip.runs.schema import Results

# Behind every verdict word that rests on a raw p-value.
EXPLORATORY = "†"


def tables(results: Results, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Heading and Markdown of every table that the results have; the options are those of run.json."""
    yield "Arms", arms(results)
    yield "Declared", declared(results)
    for reference in (plain_arm(results), declared_arm(results)):
        if reference in results["arms"]:
            yield f"Exploratory, against {reference}", exploratory(results, reference)
    if results.get("search"):
        each = any("by_seed" in search for search in results["search"].values())
        yield "Searched rates", (searched_by_seed if each else searched)(results)
    if options.get("lr_rule") == "frontier":
        yield "At equal harm", equal_harm(results, options["lr_harm"])
    if spreads_of_rates(results)[1]:
        yield "What the rates have of the spread over seeds", rates(results)
    if results.get("trend"):
        yield "Trends over depth", depth(results)


def declared_arm(results: Results) -> str:
    """The arm that the declared comparisons are of."""
    return results["family"]["declared"][0]["arm"]


def arms(results: Results) -> str:
    """Every trained arm's size and learning rate."""
    rows = []
    for arm in trained_arms(results):
        summary = results["arms"][arm]
        rows.append((f"`{arm}`", _weights(summary), rate_text(summary)))
    return _markdown(("arm", "weights", "lr"), rows)


def declared(results: Results) -> str:
    """The comparisons declared before training, with the corrected p-value and the verdict."""
    corrected = "corrected p" if results["family"].get("procedure") == "gatekeeping" else "p after Holm"
    rows = [
        (
            f"`{entry['arm']}` {MINUS} `{entry['reference']}`",
            f"{entry['set']}, {metric_named(entry['metric']).phrase}",
            _difference(entry),
            p_text(entry["p_holm"]),
            entry["verdict"],
        )
        for entry in results["comparisons"]
        if is_declared(entry)
    ]
    return _markdown(("difference", "on", "[95 %]", corrected, "verdict"), rows)


def exploratory(results: Results, reference: str) -> str:
    """Every arm against one on each set's primary metric where that was not declared: raw p-values, marked verdicts."""
    sets = list(results["sets"])
    headings = [
        f"{name}, {metric_on(results, name).phrase} ({DOMAINS[results['sets'][name]['domain']]})" for name in sets
    ]
    rows = []
    for arm in trained_arms(results):
        found = [find(results, arm, reference, name) for name in sets]
        if arm != reference and any(entry and not is_declared(entry) for entry in found):
            rows.append((f"`{arm}`", *map(_explored, found)))
    return _markdown(("arm", *headings), rows)


def searched(results: Results) -> str:
    """Every arm's rates of the search's last rung on development documents; the chosen one in bold."""
    rows = []
    out_of_domain = [
        name for name, entry in results["sets"].items() if entry["domain"] == "out" and entry["kind"] == "document"
    ]
    for arm, search in results["search"].items():
        longest = max(point["steps"] for point in search["trace"])
        for point in search["trace"]:
            if point["steps"] == longest and not point.get("diverged"):
                rate = f"{point['learning_rate']:g}"
                shown = f"**{rate}**" if point["learning_rate"] == search["chosen"] else rate
                others = [point["dev"]["out"].get(name) for name in out_of_domain]
                rows.append((f"`{arm}`", shown, *map(_development, (development(point, "in"), *others))))
    return _markdown(("arm", "lr", "in-domain", *out_of_domain), rows)


def searched_by_seed(results: Results) -> str:
    """The rate that every arm's search chose for each seed, and the range of what it reached there on development
    documents.
    """
    out_of_domain = [
        name for name, entry in results["sets"].items() if entry["domain"] == "out" and entry["kind"] == "document"
    ]
    rows = []
    for arm, search in results["search"].items():
        chosen = [point for point in search["trace"] if is_chosen(search, point)]
        reached = [[development(point, "in")["value"] for point in chosen]]
        reached += [[point["dev"]["out"][name]["value"] for point in chosen] for name in out_of_domain]
        rates = ", ".join(f"{rate:g}" for rate in search["by_seed"].values())
        rows.append((f"`{arm}`", rates, *map(_range, reached)))
    return _markdown(("arm", "lr by seed", "in-domain", *out_of_domain), rows)


def equal_harm(results: Results, harm: float) -> str:
    """Every arm's in-domain change at one harm out of domain, by seed, and over seeds against the rival."""
    rival, found = at_equal_harm(results, harm)
    rows = []
    for arm, (changes, against) in found.items():
        value, limits, p = mean_difference_texts(against)
        raw = f"raw p {p if p.startswith('<') else f'= {p}'}"
        rows.append((f"`{arm}`", changes_text(changes), "" if arm == rival else f"{value} {limits}, {raw}"))
    return _markdown(("arm", "in-domain by seed", f"against `{rival}`"), rows)


def rates(results: Results) -> str:
    """Every searched arm's difference to the rival: how much it varies over seeds, at their own and at mean rates."""
    rival, found = spreads_of_rates(results)
    rows = [(f"`{arm}` {MINUS} `{rival}`", *spread_texts(spreads)) for arm, spreads in found.items()]
    kinds = ("own rates", "mean rates")
    columns = [f"{domain}, {kind}" for domain in ("in-domain", "harm") for kind in kinds]
    return _markdown(("SD over seeds", *columns, "seeds"), rows)


def depth(results: Results) -> str:
    """Spearman's correlation of the skip's size with the layer, against what chance and the nulls give."""
    rows = [
        (
            f"`{arm}`",
            MEASURES[entry["measure"]],
            f"{number(entry['rho'], 2, sign=True)} {limits_text(entry['low'], entry['high'], 2)}",
            "–" if entry["null_low"] is None else _nulls(entry),
            entry["verdict"],
        )
        for arm, entries in results["trend"].items()
        for entry in entries
    ]
    return _markdown(("arm", "measure", "rank correlation [95 %]", "chance and nulls", "verdict"), rows)


def _difference(entry: Mapping[str, Any]) -> str:
    shown = difference_text(entry)
    return f"{shown['value']} {shown['interval']}"


def _explored(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if is_declared(entry):
        return "declared"
    p = p_text(entry["p_value"])
    return f"{_difference(entry)}, raw p {p if p.startswith('<') else f'= {p}'}, {entry['verdict']} {EXPLORATORY}"


def _nulls(entry: Mapping[str, Any]) -> str:
    own = nulls_text(entry)
    return limits_text(entry["null_low"], entry["null_high"], 2) + (f"; {own}" if own else "")


def _development(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    places = decimals(value["low"], value["high"], 3)
    return f"{number(value['value'], places, sign=True)} {limits_text(value['low'], value['high'], places)}"


def _range(values: Sequence[float]) -> str:
    low, high = (number(value, 3, sign=True) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _weights(summary: Mapping[str, Any]) -> str:
    count = summary["trainable_parameters"]
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    results, manifest = (load_json(options.run / f"{name}.json") for name in ("results", "run"))
    for heading, table in tables(results, manifest["config"]):
        print(f"{heading}:\n\n{table}\n")


if __name__ == "__main__":
    main()
