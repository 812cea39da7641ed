"""What is said of an error."""

from preskip.errors import one_line


def test_a_message_of_several_lines_is_put_on_one_and_cut():
    error = ValueError("first\n\tsecond  third")
    assert one_line(error) == "first second third"
    assert one_line(error, 12) == "first second"
    assert one_line("") == ""
