from preskip.probe.run import _say_other_environment


def test_another_environment_is_told(capsys):
    before = {"torch": "2.12.0", "threads": 1, "processor": "x"}
    _say_other_environment({"environment": before}, dict(before), quiet=False)
    _say_other_environment({}, dict(before), quiet=False)
    assert capsys.readouterr().err == ""
    _say_other_environment({"environment": before}, {**before, "torch": "2.13.0", "threads": 2}, quiet=False)
    assert capsys.readouterr().err == (
        "this run began with torch 2.12.0, now 2.13.0; threads 1, now 2: last digits may differ from an uninterrupted "
        "run\n"
    )
