"""The search for a learning rate by its rule alone: what a training would reach is a function of rate and rung."""

import math
from types import SimpleNamespace

import pytest

from preskip.errors import PreskipError
from preskip.experiment import search
from preskip.runs.directory import RunDirectory


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Search over quarter decades around the default for the least of `loss(rung, power)`; None diverges."""

    def find(loss, steps=24, start=None, harm=lambda power: 0.0, **rule):
        def trial(prepared, arm, seed, folder, rung, steps, rate, base):
            power = round(4 * math.log10(rate / 1e-3), 2)  # of a rate with three figures
            value = loss(rung, power)
            dev = None if value is None else {"in": {"value": value}, "out": {"far": {"value": harm(power)}}}
            facts = {"rung": rung, "steps": steps, "learning_rate": rate, "dev": dev}
            return {**facts, "kept": False, "diverged": value is None, "power": power}

        monkeypatch.setattr(search, "_trial", trial)
        monkeypatch.setattr(search, "ARMS", {"skip": SimpleNamespace(learning_rate=1e-3)})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        config = SimpleNamespace(**{"steps": steps, "tune_share": 0.5, "lr_rule": "in-domain", "lr_harm": 0.01, **rule})
        prepared = SimpleNamespace(config=config, run=RunDirectory(folder))
        found = search.search_rate(prepared, "skip", 7, [], start)
        assert (folder / "search/skip/seed-7/search.json").is_file()
        return found, [(entry["rung"], entry["power"]) for entry in found["trace"]]

    return find


def test_the_best_inside_the_grid_takes_seven_trainings_and_is_bracketed(chosen):
    found, tried = chosen(lambda rung, power: abs(power - 0.1))
    assert tried == [(0, -2), (0, 0), (0, 2), (1, -1), (1, 0), (1, 1), (1, 2)]
    assert (found["chosen"], found["extended"]) == (1e-3, False)
    assert {entry["steps"] for entry in found["trace"]} == {6, 12}
    assert [entry["power"] for entry in found["trace"] if entry["kept"]] == [0, 2, 0]
    found, again = chosen(lambda rung, power: abs(power - 0.1), tune_share=1.0)
    assert again == tried
    assert {entry["steps"] for entry in found["trace"]} == {12, 24}


@pytest.mark.parametrize("best", range(-8, 9))
def test_both_neighbours_of_the_best_are_always_trained_on_the_last_rung(chosen, best):
    """Also where the first rung had dropped them, as it did whenever more steps wanted a lower rate."""
    for shift in (-3, 0, 4):
        found, tried = chosen(lambda rung, power, shift=shift: abs(power - best - (shift if rung == 0 else 0)))
        assert found["chosen"] == float(f"{1e-3 * 10 ** (best / 4):.3g}")
        last = {power for rung, power in tried if rung == 1}
        assert {power for power in (best - 1, best, best + 1) if abs(power) <= 8} <= last


def test_the_grid_grows_by_half_decades_while_the_best_is_at_its_edge(chosen):
    found, tried = chosen(lambda rung, power: abs(power - 6))
    assert [power for rung, power in tried if rung == 0] == [-2, 0, 2, 4, 6, 8]
    assert (found["chosen"], found["extended"]) == (0.0316, True)


def test_a_later_search_begins_at_the_rate_of_the_first_one(chosen):
    found, tried = chosen(lambda rung, power: abs(power - 2), start=float(f"{1e-3 * 10**0.5:.3g}"))
    assert tried == [(1, 1), (1, 2), (1, 3)]
    found, tried = chosen(lambda rung, power: abs(power + 1), start=0.00178)
    assert tried == [(1, -2), (1, -1), (1, 0), (1, 1), (1, 2)]
    assert found["chosen"] == 0.000562
    found, _ = chosen(lambda rung, power: None if power > -3 else abs(power + 5), start=1e-3)
    assert found["chosen"] == float(f"{1e-3 * 10**-1.25:.3g}")


def test_a_rate_that_diverges_is_never_chosen(chosen):
    found, _ = chosen(lambda rung, power: None if power > 0 else -power)
    assert found["chosen"] == 1e-3
    with pytest.raises(PreskipError, match="diverged at every learning rate"):
        chosen(lambda rung, power: None)
    with pytest.raises(PreskipError, match="diverged at its best"):
        chosen(lambda rung, power: None if rung else 0.0)


def test_the_frontier_rule_takes_the_best_that_does_no_more_harm_than_allowed(chosen):
    def harm(power):
        return 0.004 * power

    found, _ = chosen(lambda rung, power: -power, harm=harm, lr_rule="frontier", lr_harm=0.0)
    assert (found["chosen"], found["within_harm"]) == (1e-3, True)
    found, _ = chosen(lambda rung, power: -power, harm=lambda power: 1 + harm(power), lr_rule="frontier")
    assert (found["chosen"], found["within_harm"]) == (1e-5, False)  # the least harm there is
    found, _ = chosen(lambda rung, power: -power, harm=harm)
    assert found["chosen"] == 0.1
    assert "within_harm" not in found


def test_the_frontier_rule_goes_down_until_a_rate_keeps_the_limit(chosen):
    """The least harm of the grid lies between two rates that do more, as of a gate that starts closed."""

    def harm(power):
        return 0.14 + 0.01 * abs(power) if power > -5 else 0.002 * (power + 8)

    found, tried = chosen(lambda rung, power: -power, harm=harm, lr_rule="frontier")
    assert [power for rung, power in tried if rung == 1] == [-7, -6, -5, -4, -2, -1, 0, 1, 2]
    assert (found["chosen"], found["within_harm"]) == (float(f"{1e-3 * 10**-1.25:.3g}"), True)
    # Where none keeps it down to the farthest, the one of the least harm is kept, and the search says so.
    found, tried = chosen(lambda rung, power: -power, harm=lambda power: 0.1 + abs(power), lr_rule="frontier")
    assert [power for rung, power in tried if rung == 1] == [-8, -6, -4, -2, -1, 0, 1, 2]
    assert (found["chosen"], found["within_harm"]) == (1e-3, False)
    found, tried = chosen(lambda rung, power: -power, start=1e-3, harm=harm, lr_rule="frontier")
    assert found["within_harm"]  # a later seed's, too


def test_the_frontier_rule_ends_at_the_limit_and_not_at_a_step_of_the_grid(chosen):
    """Harm of 0.004 and 0.016 at two steps of the grid: half-way 0.009, below their chord as of any convex curve."""
    found, tried = chosen(lambda rung, power: -power, harm=lambda power: 0.001 * power**2 * 4, lr_rule="frontier")
    assert [power for rung, power in tried if rung == 1] == [-1, 0, 1, 1.5, 2]
    assert (found["chosen"], found["within_harm"]) == (float(f"{1e-3 * 10 ** (1.5 / 4):.3g}"), True)
    assert [(entry["rung"], entry["power"]) for entry in found["trace"] if entry["kept"]][-1] == (1, 1.5)
    # A concave one passes the limit before, and so does a second one below that: the grid's rate is kept.
    found, tried = chosen(
        lambda rung, power: -power, harm=lambda power: 0.0205 * max(power, 0) ** 0.02 - 0.01, lr_rule="frontier"
    )
    assert [round(power, 2) for rung, power in tried if 0 < power < 1] == [0.81, 0.9]
    assert (found["chosen"], found["within_harm"]) == (1e-3, True)


def test_a_rate_that_passes_the_limit_is_the_upper_end_of_a_second_one(chosen):
    def harm(power):
        return -0.0135 if power < -0.15 else 0.0101

    found, tried = chosen(lambda rung, power: -power, harm=harm, lr_rule="frontier")
    # Of 0.99 of the way no other rate would come, in three digits: nine tenths of it, and nine tenths of that.
    assert [round(power, 2) for rung, power in tried if rung == 1 and power != int(power)] == [-0.19, -0.1]
    assert (found["chosen"], found["within_harm"]) == (float(f"{1e-3 * 10 ** (-0.19 / 4):.3g}"), True)


def test_no_rate_between_is_tried_where_it_could_not_be_better(chosen):
    def harm(power):
        return 0.004 * power

    for loss, rule in (
        (lambda rung, power: abs(power - 2), {"lr_rule": "frontier"}),  # the next is worse in-domain, too
        (lambda rung, power: None if power > 2 else -power, {"lr_rule": "frontier"}),  # or diverged
        (lambda rung, power: -power, {"lr_rule": "frontier", "lr_harm": 0.0081}),  # or no rate worth it lies between
        (lambda rung, power: abs(power - 2), {"lr_rule": "in-domain"}),
    ):
        found, tried = chosen(loss, harm=harm, **rule)
        assert found["chosen"] == float(f"{1e-3 * 10**0.5:.3g}")
        assert all(power == int(power) for _, power in tried)


def test_of_rates_that_are_equally_good_the_default_is_chosen(chosen):
    found, tried = chosen(lambda rung, power: 0.0)
    assert (found["chosen"], found["extended"]) == (1e-3, False)
    assert tried == [(0, -2), (0, 0), (0, 2), (1, -2), (1, -1), (1, 0), (1, 1)]


def test_no_rung_is_the_first_step_alone(chosen):
    """The first step warms up from a rate of 0: all rates would tie."""
    found, _ = chosen(lambda rung, power: abs(power), steps=2)
    assert {entry["steps"] for entry in found["trace"]} == {2}


def test_the_untouched_base_is_scored_once_per_run(tmp_path, monkeypatch):
    """A search that was interrupted reads what the first attempt found, to the last bit."""
    records = [{"set": "corpus", "kind": "document", "id": "a", "nll": 1 / 3, "bytes": 7}]
    scored = []
    monkeypatch.setattr(search, "_score", lambda *args: scored.append(args) or records)
    prepared = SimpleNamespace(
        run=SimpleNamespace(search=tmp_path / "search"), heldout=SimpleNamespace(development=[]), base=None, quiet=True
    )
    assert [search.base_records(prepared) for _ in range(2)] == [records, records]
    assert len(scored) == 1


def test_each_training_seed_has_a_tuning_order_of_its_own():
    config = SimpleNamespace(tune_seed=0)
    seeds = [search.tuning_seed(config, seed) for seed in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert search.tuning_seed(SimpleNamespace(tune_seed=1), 3) not in seeds
    assert search.tuning_seed(config, None) == 0  # a search of an earlier preskip, for all seeds


def test_pieces_of_one_book_are_one_cluster():
    """Twelve pieces of three books that differ by book: with three clusters far less is known than with twelve."""

    def records(shift, cluster):
        return [
            {"set": "books", "kind": "document", "id": str(i), "nll": 700.0 + shift * (i // 4), "bytes": 1000,
             "tokens": 200, "words": 150, "cluster": f"book-{i // 4}" if cluster else None}
            for i in range(12)
        ]  # fmt: skip

    wide, narrow = (
        search._differences(records(7.0, cluster), records(0.0, cluster))[0][1] for cluster in (True, False)
    )
    assert wide["value"] == narrow["value"] == pytest.approx(0.00700 / 0.6931472, rel=1e-6)
    assert wide["high"] - wide["low"] > 2.5 * (narrow["high"] - narrow["low"])
