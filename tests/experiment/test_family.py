"""Which comparisons a run declares: the primary one first, then decisive others in the registry's order."""

import pytest

from preskip.arms import SCRATCH_ARMS, resolve_arms
from preskip.errors import PreskipError
from preskip.experiment.family import declare_family

SETS = {
    "books": {"primary": "bits_per_byte", "domain": "out"},
    "sotu": {"primary": "bits_per_byte", "domain": "in"},
    "paper:wikitext": {"primary": "word_perplexity", "domain": "in"},
}


def declared(names, *among, **options):
    family = declare_family(resolve_arms(names, *among), SETS, **options)
    assert {entry["set"] for entry in family["declared"]} <= {"sotu", "books"}
    assert family["procedure"] == "gatekeeping"
    entries = family["declared"]
    has_gain = len(entries) > 2 and "none" in names
    levels = [0, 1] if has_gain else [1]
    assert [entry["level"] for entry in entries] == [*levels, *[2] * (len(entries) - len(levels))][: len(entries)]
    assert {entry["set"] for entry in entries[: len(levels)]} in (set(), {"sotu"})
    if has_gain:
        assert entries[0]["reference"] == "none"
    found = [(entry["arm"], entry["reference"]) for entry in entries]
    assert sorted(found) == sorted(2 * list(dict.fromkeys(found)))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ("parallel lora none full preskip", [("preskip", other) for other in ("none", "lora", "parallel")]),
        ("none preproj lora", [("preproj", "none"), ("preproj", "lora")]),
        ("none preskip", [("preskip", "none")]),
        ("preskip skip", [("preskip", "skip")]),
        ("none", []),
    ],
)
def test_of_a_frozen_base(names, pairs):
    assert declared(names.split()) == pairs


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (
            "base parallel base-deep base-flops skip preskip base-wide",
            [("preskip", other) for other in ("base-wide", "base-flops", "base", "base-deep", "parallel")],
        ),
        ("base base-deep skip", [("base-deep", "base")]),
        ("base", []),
    ],
)
def test_from_scratch(names, pairs):
    assert declared(names.split(), SCRATCH_ARMS) == pairs


def test_the_options_may_name_the_primary_comparison():
    names = ["none", "preskip", "content", "lora", "full"]
    assert declared(names, primary=("content", "lora")) == [("content", "none"), ("content", "lora")]
    pairs = declared(names, primary=("content", "full"))  # not decisive, so it is declared for this alone
    assert pairs == [("content", "none"), ("content", "full"), ("content", "lora")]
    family = declare_family(resolve_arms(names), SETS, ("content", "lora", "books"), (3, 5))
    assert (family["declared"][1]["set"], family["looks"]) == ("books", [3, 5])
    with pytest.raises(PreskipError, match="'news' is not compared: choose one of books, sotu"):
        declare_family(resolve_arms(names), SETS, ("content", "lora", "news"))
