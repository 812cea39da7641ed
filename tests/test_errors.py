"""What is said of an error."""

import pytest
import torch

from preskip.errors import is_out_of_memory, one_line


def test_a_message_of_several_lines_is_put_on_one_and_cut():
    error = ValueError("first\n\tsecond  third")
    assert one_line(error) == "first second third"
    assert one_line(error, 12) == "first second"
    assert one_line("") == ""


def test_memory_that_does_not_suffice_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    for error in (caught.value, torch.OutOfMemoryError("of a device"), MemoryError()):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shape"), OSError("disk"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)
