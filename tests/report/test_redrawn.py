"""Every stored result redrawn gives the same numbers, digit by digit: page, charts, cards and printed tables."""

import pytest

import redrawn


@pytest.mark.parametrize("name", redrawn.CASES)
def test_every_stored_result_redrawn_gives_the_same_numbers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, stored = redrawn.redrawn(name), redrawn.stored(name)
    assert redrawn.numbers(found) == redrawn.numbers(stored)
    assert found == stored, "words have changed: if they were meant to, run python tests/support/redrawn.py"
