"""A small probe that one process has run, for those that others run."""

import pytest
import torch

from preskip.experiment.run import finish_run, start_run
from small_probe import small_probe


@pytest.fixture(scope="session")
def local_probe(tmp_path_factory):
    """The configuration, and the folder of the finished run."""
    folder = tmp_path_factory.mktemp("local_probe")
    config = small_probe(folder)
    with torch.random.fork_rng():
        finish_run(start_run(config, folder / "run", ["test"]), quiet=True)
    return config, folder / "run"
