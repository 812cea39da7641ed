"""Which arms and seeds the controls are trained for."""

from types import SimpleNamespace
from unittest import mock

from preskip.experiment import controls


def test_costly_controls_are_of_preskip_whatever_the_order(monkeypatch):
    trained = []

    def control(prepared, arm, seed, name, **options):
        trained.append((name, arm, seed))
        return []

    monkeypatch.setattr(controls, "_control", control)
    monkeypatch.setattr(controls, "has_branch", lambda arm, context: arm.name in ("content", "preskip"))
    config = SimpleNamespace(
        arms=("none", "content", "preskip", "lora"),
        seeds=(1, 2),
        nulls=("noise", "shuffled"),
        equal_step=True,
        dtype_audit=False,
    )
    parts = controls.run_controls(SimpleNamespace(config=config, context=None))
    assert set(trained) == {
        *(("noise", arm, seed) for arm in ("content", "preskip") for seed in (1, 2)),
        ("shuffled", "preskip", 1),
        ("equal_step", "preskip", 1),
    }
    assert set(parts["equal_step"]) == {"preskip"}


def test_controls_that_no_arm_can_have_are_told_of():
    config = SimpleNamespace(arms=("none", "lora"), seeds=(1,), nulls=("noise",), equal_step=True, dtype_audit=False)
    with mock.patch.object(controls, "has_branch", return_value=False):
        parts = controls.run_controls(SimpleNamespace(config=config, context=None))
    [note] = parts["notes"]
    assert "no arm has a branch" in note
