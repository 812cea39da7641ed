"""The passes of modules for a while, and how they are put back."""

import pytest
from torch import nn

from preskip.forwards import evaluating


def test_evaluation_mode_ends_with_the_context_for_each_module_as_it_was():
    """Also by an error, and a module that its model does not train stays as it was."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}

    def reads():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reads()
    assert [module.training for module in model.modules()] == modes
