"""The cells and searches of a probe in several processes of this machine: the results of one process."""

import pytest

from preskip.experiment.run import finish_run, start_run
from small_probe import stored


@pytest.mark.slow
def test_a_probe_in_two_processes_equals_one(local_probe, tmp_path, capsys):
    config, local_run = local_probe
    finish_run(start_run(config, tmp_path / "run", ["test"]), "probe", workers=2)
    assert stored(tmp_path / "run") == stored(local_run)
    told = capsys.readouterr().err
    assert "search 1 of 1 done: preskip" in told
    assert "cell 3 of 3 done: " in told
