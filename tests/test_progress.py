import os
import sys

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
    assert captured.err == "train preskip ...\nloading ...\n"
    assert captured.out == ""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_heartbeat_says_place_count_and_time_left():
    clock = Clock()
    heart = progress.Heartbeat("train preskip seed 1", 500, clock)
    clock.now += 40
    assert heart.line() == "train preskip seed 1 · 0/500 · about 40 s so far"
    heart.advance(20)  # resumed: these were done before
    clock.now += 30
    heart.advance(120)
    with progress.placed(3, 12):
        assert heart.line() == "[3/12] train preskip seed 1 · 120/500 · about 2 min left"  # 0.3 s · 380 = 114 s
    assert heart.line().startswith("train")
    uncounted = progress.Heartbeat("loading", None, clock)
    clock.now += 7200
    assert uncounted.line() == "loading · about 2.0 h so far"


def test_a_line_comes_at_every_beat_until_the_step_is_done(capsys):
    clock, waited = Clock(), []

    class Stopped:
        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            clock.now += seconds
            heart.advance(len(waited))
            return len(waited) == 4

    heart = progress.Heartbeat("score", 10, clock)
    heart.beat(Stopped())
    assert waited == [30.0] * 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "score · 1/10 · about 30 s so far",
        "score · 2/10 · about 4 min left",
        "score · 3/10 · about 4 min left",
    ]


def test_a_stderr_that_nobody_reads_any_more_ends_nothing(monkeypatch):
    """As behind `2>&1 | head`: the work goes on, and stdout is left as it is."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        place = os.fstat(sys.__stdout__.fileno()).st_ino
        progress.say("a line")
        with progress.progress_bar("a step", 1) as advance:
            advance(1)
        with pytest.raises(BrokenPipeError):
            progress.console(stderr=True).print("a line")
        assert os.fstat(sys.__stdout__.fileno()).st_ino == place
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is still in the buffer
