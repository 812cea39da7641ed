"""Which comparisons a run declares: decisive others, in the registry's order, whatever order they were given in."""

import pytest

from preskip.arms import SCRATCH_ARMS, resolve_arms
from preskip.experiment.family import declare_family

SETS = {"sotu": {"primary": "bits_per_byte"}, "paper:wikitext": {"primary": "word_perplexity"}}


def declared(names, *among):
    family = declare_family(resolve_arms(names, *among), SETS)
    assert {entry["set"] for entry in family["declared"]} <= {"sotu"}
    return [(entry["arm"], entry["reference"]) for entry in family["declared"]]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ("parallel lora none full preskip", [("preskip", other) for other in ("none", "lora", "parallel")]),
        ("none preproj lora", [("preproj", "none"), ("preproj", "lora")]),
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
