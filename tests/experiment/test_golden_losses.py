"""A change that moves what is learned must be meant: stored losses of 50 steps, for every architecture.

`tests/support/golden_losses.py` writes them anew; docs/pretraining.md says when.
"""

import json

import pytest

from golden_losses import STEPS, STORED, losses
from preskip.architecture import TYPES

GOLDEN = json.loads(STORED.read_text(encoding="utf-8"))
# Processors and thread counts add in different orders: below 1e-6 over all 50 steps where it was tried (AVX2, AVX-512).
FIRST, LATER = 1e-5, 2e-4


def test_there_is_one_for_every_architecture():
    assert tuple(GOLDEN) == TYPES
    assert all(len(stored) == STEPS for stored in GOLDEN.values())


@pytest.mark.slow
@pytest.mark.parametrize("base_type", TYPES)
def test_losses_are_the_stored_ones(base_type):
    found = losses(base_type)
    assert found[0] == pytest.approx(GOLDEN[base_type][0], abs=FIRST)
    assert found == pytest.approx(GOLDEN[base_type], abs=LATER)
    assert found[-1] < 0.85 * found[0], "nothing was learned"
