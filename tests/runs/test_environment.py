"""The commit that a run's code is of."""

import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from preskip.runs import environment


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the module as the package of a folder that is no checkout yet."""
    own = tmp_path / "repo" / "src" / "preskip" / "runs" / "environment.py"
    own.parent.mkdir(parents=True)
    (own.parents[1] / "version.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(own))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return own.parents[1]


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@x")
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_tells_its_commit_and_whether_the_package_differs(package):
    git(package, "init", "-q")
    git(package, "add", "version.py")
    git(package, "commit", "-q", "-m", "first")
    head = git(package, "rev-parse", "HEAD").strip()
    (package.parents[1] / "notes.txt").write_text("beside the package")
    assert environment.commit.__wrapped__() == head
    (package / "version.py").write_text("changed")
    assert environment.commit.__wrapped__() == f"{head}+changes"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_package_installed_below_another_checkout_is_not_of_its_commit(package, monkeypatch):
    git(package, "init", "-q")
    git(package, "commit", "-q", "--allow-empty", "-m", "first")

    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return recorded

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    recorded = None
    assert environment.commit.__wrapped__() is None
    recorded = json.dumps({"url": "https://example.org/preskip", "vcs_info": {"vcs": "git", "commit_id": "abc123"}})
    assert environment.commit.__wrapped__() == "abc123"
    recorded = "not JSON"
    assert environment.commit.__wrapped__() is None


def test_without_git_nothing_is_told(package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: missing())

    def missing():
        raise importlib.metadata.PackageNotFoundError

    assert environment.commit.__wrapped__() is None
