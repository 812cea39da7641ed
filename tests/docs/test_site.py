"""The pages hold to their rules: what is generated is up to date, links, line lengths, words; the site builds."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import preskip
import preskip.architecture
from preskip.arms import ARMS, SCRATCH_ARMS
from scripts import load_script

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# STYLE's rule for words, and nothing of where the project was built.
WORDS = r"\.\./shared|\babroad\b|\bat home\b|\bcannot be had\b|\bis told\b|\bdearer\b|what is known"


def test_the_table_of_what_works_is_that_of_the_code():
    page = (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8")
    assert page == load_script("capabilities", "docs").page(), "run docs/capabilities.py again"
    assert "| `llama` | text | yes | `preskip_llama` | yes |" in page
    assert "| `vit` | images | yes | – | – |" in page


def test_the_readme_counts_what_the_table_holds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table, _, _ = (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8").partition("## What is refused")
    assert f" {len(re.findall(r'(?m)^. `', table))} families in the tests" in text
    assert len(set(re.findall(r"`preskip_\w+`", table))) == 12
    assert "architectures for twelve" in text


def test_every_stored_file_is_described():
    page = load_script("hooks", "docs").stored_files()
    for file in ("run.json", "results.json", "items.jsonl", "train.jsonl", "cell.json", "explain.json"):
        assert re.search(rf"\| `{file}` \| \[\w+\]", page), file
    assert "| `nll` | float \\| null | nats, summed over the scored tokens; None where it has failed |" in page
    names = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert all(target in {name.lower() for name in names} for target in re.findall(r"\]\(#(\w+)\)", page))


@pytest.mark.parametrize(("name", "arms"), [("arms", ARMS), ("pretraining", SCRATCH_ARMS)])
def test_every_arm_is_explained(name, arms):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert [arm for arm in arms if f"`{arm}`" not in page] == []


def test_every_public_name_has_its_reference():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for module in (preskip, preskip.architecture):
        for name in module.__all__:
            assert f"`{name}`" in page or f"{module.__name__}.{name}" in page, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_words_and_lines(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    long = [line for line in prose.splitlines() if len(line) > 100 and not line.lstrip().startswith(("|", "!", "<!--"))]
    assert not [line for line in long if " " in line.strip()[:100].strip()], "more than 100 characters"
    assert not re.findall(WORDS, text)


def test_the_readme_reads_anywhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links)
    script = re.search(r"<!-- embedded -->\n```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(script.splitlines()) <= 12
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = set(re.findall(r"'([\w-]+)\.md'", str(navigation)))
    named = re.findall(r"https://preskip\.github\.io/preskip/([\w-]+)/", text)
    assert named
    assert set(named) <= pages


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f" {page.name}\n" not in navigation]


def _without_pictures(data):
    return [value for kind, value in (data or {}).items() if not kind.startswith("image/")]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_outputs_and_uses_public_names(path):
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, start=1))
    texts = [text for output in outputs for text in (output.get("text"), *_without_pictures(output.get("data")))]
    assert not re.search(r"(?<![\w<:/.])/\w+/\w", json.dumps(texts)), "a path of the machine that ran it"
    for node in ast.walk(ast.parse("\n".join("".join(cell["source"]) for cell in cells))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("preskip"):
            for name in node.names:
                assert f"::: {node.module}.{name.name}\n" in reference, f"{node.module}.{name.name}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PreskipConfig" in (tmp_path / "site" / "api" / "index.html").read_text()
