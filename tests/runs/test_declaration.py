"""A declaration has its own hash, and whatever differs from it is named."""

import copy
import hashlib
import json

import pytest

from preskip.runs.declaration import changes, declare, extension, identity, margin_changes

FAMILY = {
    "declared": [{"arm": "preskip", "reference": "lora", "set": "sotu", "metric": "bits_per_byte", "level": 1}],
    "procedure": "gatekeeping",
    "alpha": 0.05,
    "margins": {"bits_per_byte": 0.005},
}
FACTS = {"family": FAMILY, "model": {"sha256": "a"}, "corpus": {"sha256": None}, "sets": {"sotu": {"sha256": "b"}}}


@pytest.fixture
def manifest():
    config = {"seeds": [1, 2], "steps": 4, "lr_rule": "frontier"}
    found = {"config": config, "family": FAMILY, "declaration": declare(config, FACTS)}
    return copy.deepcopy(found)


def test_the_hash_is_of_what_stands_beside_it(manifest):
    declaration = manifest["declaration"]
    text = json.dumps(declaration["content"], sort_keys=True, separators=(",", ":"))
    assert declaration["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert declaration["content"] == {
        "config": {"seeds": [1, 2], "steps": 4, "lr_rule": "frontier"},
        "family": FAMILY,
        "model": "a",
        "corpus": None,
        "sets": {"sotu": "b"},
    }
    assert declaration["time"].endswith("+00:00")
    assert declare({"seeds": [1, 2], "steps": 5, "lr_rule": "frontier"}, FACTS)["sha256"] != declaration["sha256"]
    opened = declare(manifest["config"], {**FACTS, "tokenizer": {"opening": 2}})
    assert opened["content"] == {**declaration["content"], "opening": 2}
    assert opened["sha256"] != declaration["sha256"]
    searched = declare(manifest["config"], FACTS, search_rule=3)
    assert searched["content"] == {**declaration["content"], "search_rule": 3}
    assert changes(manifest) == []


def test_what_was_changed_is_named(manifest):
    manifest["config"]["steps"] = 8
    manifest["family"]["margins"]["bits_per_byte"] = 0.02
    manifest["family"]["declared"] = []
    assert changes(manifest) == [
        "the option steps is 8, declared was 4",
        "the margin of bits_per_byte is 0.02, declared was 0.005: equivalence within it was not declared",
        "the family's declared was changed after it was declared",
    ]
    manifest["declaration"]["content"]["config"]["steps"] = 8
    assert changes(manifest)[0].startswith("the declaration was edited")
    assert changes({"config": {}, "family": {}}) == []


def test_weights_are_known_by_their_checksum_and_on_the_hub_by_their_revision():
    assert identity({"sha256": "a", "revision": "b"}) == "a"
    assert identity({"sha256": None, "revision": "b"}) == "b"


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.1), ("looks", [2, 3]), ("procedure", None)])
def test_every_part_of_the_family_is_held_against_the_declared_one(manifest, name, value):
    manifest["family"][name] = value
    assert changes(manifest) == [f"the family's {name} was changed after it was declared"]


def test_added_seeds_are_no_change_where_a_look_was_declared(manifest):
    manifest["config"]["seeds"] = [1, 2, 3]
    assert changes(manifest) == ["the option seeds is [1, 2, 3], declared was [1, 2]"]
    manifest["extensions"] = [extension({"looks": [2, 3]}, [1, 2], [3])]
    assert manifest["extensions"][0]["planned"]
    assert changes(manifest) == []
    manifest["extensions"] = [extension(FAMILY, [1, 2], [3])]
    assert changes(manifest) == [
        "seed 3 added after the results of 2 had been seen, without a declared look: p-values are not adjusted for "
        "looking"
    ]


def test_margins_beside_the_declared_ones():
    assert margin_changes(FAMILY, {"bits_per_byte": 0.005}) == []
    assert margin_changes(FAMILY, {"acc": 0.1}) == [
        "the margin of acc is 0.1, none was declared: equivalence within it was not declared"
    ]


def test_added_seeds_are_named_in_a_run_without_a_declaration(manifest):
    del manifest["declaration"]
    manifest["config"]["seeds"] = [1, 2, 3]
    manifest["extensions"] = [extension(FAMILY, [1, 2], [3])]
    assert changes(manifest) == [
        "seed 3 added after the results of 2 had been seen, without a declared look: p-values are not adjusted for "
        "looking"
    ]


def test_a_margin_of_one_set_equal_to_the_declared_one_is_no_change():
    declared = {"margins": {"acc": 0.01, "sotu.acc": 0.02}}
    assert margin_changes(declared, {"lambada_openai.acc": 0.01, "acc": 0.01, "sotu.acc": 0.02}) == []
    assert margin_changes(declared, {"sotu.acc": 0.01, "em": 0.1}) == [
        "the margin of sotu.acc is 0.01, declared was 0.02: equivalence within it was not declared",
        "the margin of em is 0.1, none was declared: equivalence within it was not declared",
    ]
