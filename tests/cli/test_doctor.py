import json

import pytest

from preskip.cli import doctor
from preskip.cli.main import main


def test_doctor_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert facts["problems"] == []
    assert facts["cache"]["path"] == str(tmp_path)
    assert facts["cache"]["models"]["smollm2"]["cached"] is False
    assert facts["devices"][0]["name"] == "cpu"


def test_doctor_names_what_is_missing_and_fails_on_a_required_one(capsys, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "imaginary", (("no_such_module",), "pip install it"))
    monkeypatch.setitem(doctor.OLDEST, "torch", "99.0")
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "no_such_module" in out
    assert "99.0 or newer is needed" in " ".join(out.split())


def test_doctor_says_where_transformers_refuses_this_peft(capsys, monkeypatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.1")
    assert doctor.adapter_problem() is None
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 0
    assert "model.load_adapter with peft 99.0 or newer" in " ".join(capsys.readouterr().out.split())


def test_unknown_command_and_version(capsys):
    from preskip import __version__

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == __version__
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: Unknown command "nonsense"')
