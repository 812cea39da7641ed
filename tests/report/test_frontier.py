"""The frontier on hand-made verdicts, where the right answer is plain."""

from __future__ import annotations

from typing import Any

import pytest

from preskip.report.words.frontier import assess_plane, planes


def results(verdicts: dict[tuple[str, str], tuple[str, str]]) -> dict[str, Any]:
    """Arms a, b, c; verdicts: (arm, reference) → (in-domain, out-of-domain)."""
    sets = {
        "home": {"domain": "in", "kind": "document", "title": "Home", "primary": "bits_per_byte"},
        "far": {"domain": "out", "kind": "item", "title": "Far", "primary": "acc"},
    }
    comparisons = [
        {"set": name, "metric": entry["primary"], "arm": arm, "reference": reference, "verdict": verdict}
        | {"difference": 0.0, "low": -1.0, "high": 1.0}
        for (arm, reference), pair in verdicts.items()
        for (name, entry), verdict in zip(sets.items(), pair, strict=True)
    ]
    return {"sets": sets, "arms": {"a": {}, "b": {}, "c": {}}, "comparisons": comparisons}


@pytest.mark.parametrize(
    ("verdicts", "on", "possible", "dominated"),
    [
        # Better on one axis and equivalent on the other is enough; the stored direction does not matter.
        ({("a", "b"): ("better", "equivalent"), ("c", "a"): ("worse", "worse")}, ["a"], [], ["b", "c"]),
        # Better in-domain and worse out-of-domain is a trade, not a win.
        ({("a", "b"): ("better", "worse"), ("c", "b"): ("equivalent", "equivalent")}, ["a", "b", "c"], [], []),
        # Undecided on one axis leaves the place open; so does a comparison that was never made.
        ({("a", "b"): ("better", "undecided")}, ["a", "c"], ["b"], []),
        # Dominated by one arm outweighs being merely behind another.
        ({("a", "b"): ("better", "undecided"), ("c", "b"): ("better", "better")}, ["a", "c"], [], ["b"]),
    ],
)
def test_who_is_on_the_frontier(
    verdicts: dict[tuple[str, str], tuple[str, str]], on: list[str], possible: list[str], dominated: list[str]
) -> None:
    plane = assess_plane(results(verdicts), "home", "far")
    assert (plane["on"], list(plane["possible"]), list(plane["dominated"])) == (on, possible, dominated)


def test_an_axis_that_was_not_compared_dominates_nobody() -> None:
    found = results({("a", "b"): ("better", "better")})
    found["comparisons"] = found["comparisons"][:1]
    plane = assess_plane(found, "home", "far")
    assert plane["possible"] == {"b": "a is better in-domain and not compared out-of-domain"}
    assert plane["dominated"] == {}


def test_the_reason_names_a_rival_that_is_on_the_frontier() -> None:
    verdicts = {("a", "b"): ("better", "better"), ("a", "c"): ("better", "better"), ("c", "a"): ("worse", "worse")}
    verdicts |= {("c", "b"): ("better", "better")}
    plane = assess_plane(results(verdicts), "home", "far")
    assert plane["sentence"] == (
        "On the frontier of Home against Far (exploratory): a. "
        "Off it: b (a is better in-domain and better out-of-domain); "
        "c (a is better in-domain and better out-of-domain)"
    )


def test_a_plane_needs_a_set_on_both_sides() -> None:
    found = results({})
    assert planes(found) == [("home", "far")]
    found["sets"]["far"]["domain"] = "in"
    assert planes(found) == []
