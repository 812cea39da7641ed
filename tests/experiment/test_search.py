"""The search for a learning rate by its rule alone: what a training would reach is a function of rate and rung."""

from types import SimpleNamespace

import pytest

from preskip.errors import PreskipError
from preskip.experiment import search


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Search over the powers of √10 around the default for the least of `loss(rung, power)`; None diverges."""

    def find(loss, steps=24):
        def trial(prepared, arm, folder, rung, steps, rate, base):
            power = next(p for p in range(-6, 7) if float(f"{1e-3 * 10 ** (p / 2):.3g}") == rate)
            value = loss(rung, power)
            dev = None if value is None else {"in": {"value": value, "low": value, "high": value}}
            facts = {"rung": rung, "steps": steps, "learning_rate": rate, "dev": dev}
            return {**facts, "kept": False, "diverged": value is None, "power": power}

        monkeypatch.setattr(search, "_trial", trial)
        monkeypatch.setattr(search, "ARMS", {"skip": SimpleNamespace(learning_rate=1e-3)})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "skip").mkdir(parents=True)
        prepared = SimpleNamespace(config=SimpleNamespace(steps=steps), run=SimpleNamespace(search=folder))
        found = search.search_rate(prepared, "skip", [])
        return found, [(entry["rung"], entry["power"]) for entry in found["trace"]]

    return find


def test_the_best_inside_the_grid_takes_five_trainings(chosen):
    found, tried = chosen(lambda rung, power: abs(power - 0.1))
    assert tried == [(0, -1), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert (found["chosen"], found["extended"]) == (1e-3, False)
    assert {entry["steps"] for entry in found["trace"]} == {6, 12}


def test_the_grid_grows_while_the_best_is_at_its_edge_on_either_rung(chosen):
    found, tried = chosen(lambda rung, power: abs(power - 3))
    assert [power for rung, power in tried if rung == 0] == [-1, 0, 1, 2, 3, 4]
    assert (found["chosen"], found["extended"]) == (0.0316, True)
    # Longer training wants rates that the first rung had no reason to try, one after the other.
    found, tried = chosen(lambda rung, power: abs(power - (0.1 if rung == 0 else 3)))
    assert [power for rung, power in tried if rung == 1] == [0, 1, 2, 3, 4]
    assert found["chosen"] == 0.0316


def test_a_rate_that_diverges_is_never_chosen(chosen):
    found, _ = chosen(lambda rung, power: None if power > 0 else -power)
    assert found["chosen"] == 1e-3
    with pytest.raises(PreskipError, match="diverged at every learning rate"):
        chosen(lambda rung, power: None)


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
