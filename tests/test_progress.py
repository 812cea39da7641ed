import pytest
from rich.console import Console

from preskip import progress


@pytest.mark.parametrize(("width", "has_bar"), [(40, False), (80, True), (120, True)])
def test_count_and_time_left_are_whole_at_any_width(monkeypatch, width, has_bar):
    console = Console(force_terminal=True, width=width, record=True, color_system=None)
    monkeypatch.setattr(progress, "console", lambda **_: console)
    with progress.progress_bar("train preskip", 100) as advance:
        advance(7, "loss 10.823")
    last = console.export_text().splitlines()[-1]
    assert "7/100" in last
    assert "left -:--:--" in last
    assert ("loss 10.823" in last) == ("━" in last) == has_bar
    assert "…" not in last


def test_without_a_terminal_a_step_is_one_line(capsys):
    with progress.progress_bar("train preskip", 100) as advance:
        advance(7, "loss 10.823")
    with progress.progress_bar("train lora", 100, quiet=True) as advance:
        advance(7)
    with progress.spinner("loading"):
        pass
    captured = capsys.readouterr()
    assert captured.err == "train preskip ...\n"
    assert captured.out == ""
