"""Every Python and console block of the README and of docs/ runs as it stands, or says in a comment why it does not.

The comment stands right before the block. `<!-- not run: reason -->` leaves it out; `<!-- embedded -->` leaves it to
the slow tests, which have the embedded model. The `preskip` commands of every block, run or not, are held against the
real options, and the files and extras that commands name must exist. The blocks of a page share one namespace and one
folder, which has a tiny ./my-model, my_texts.jsonl, other_texts.jsonl and local data of lm-eval tasks.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import zoo
from commands import preskip
from local_data import write_local_data
from preskip.cli.main import app
from preskip.experiment.option_file import configured
from preskip.experiment.probe_options import ProbeConfig
from tiny_model import save_tiny_llama, write_corpus

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENT = re.compile(r"^<!-- (?:(embedded)|not run: (\S.+)) -->\s*$")
SHELL = ("console", "bash", "sh", "shell")
DATA = ("text", "yaml")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and what the comment before it says."""

    language: str
    text: str
    line: int
    embedded: bool = False
    reason: str | None = None

    @property
    def runs(self) -> bool:
        return not self.embedded and self.reason is None


def blocks(page: Path) -> list[Block]:
    """The Python and shell blocks of a page, in order; also those in lists."""
    found, comment = [], None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            comment = COMMENT.match(token.content.strip())
            assert comment or "not run" not in token.content, f"{page.name}: {token.content}"
            continue
        if token.type == "fence":
            language = token.info.split()[0] if token.info else ""
            assert language in ("python", *DATA, *SHELL), f"{page.name}:{token.map[0] + 1}: a block says what it is"
            if language not in DATA:
                embedded, reason = comment.groups() if comment else (None, None)
                found.append(
                    Block(
                        language="python" if language == "python" else "shell",
                        text=token.content,
                        line=token.map[0] + 1,
                        embedded=bool(embedded),
                        reason=reason,
                    )
                )
        comment = None
    return found


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block as words, comments left out and continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&?|;", line.partition(" #")[0])]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def run(page: Path, block: Block, names: dict[str, object]) -> None:
    """Run one block in the folder at hand."""
    place = f"{page.name}:{block.line}"
    if block.language == "python":
        exec(compile(block.text, place, "exec"), names)
        return
    for words in commands(block):
        assert words[0] == "preskip", f"{place}: only preskip's commands run here: mark the block"
        assert preskip(*words[1:]) in (0, None), f"{place}: {shlex.join(words)}"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    save_tiny_llama(folder / "my-model", max_position_embeddings=2048)
    write_corpus(folder / "my_texts.jsonl", 60)
    write_corpus(folder / "other_texts.jsonl", 8)
    write_local_data(folder / "data")
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """An empty folder with what the pages name."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRESKIP_DATA", str(inputs / "data"))
    return tmp_path


def _with(kind: str) -> list[Path]:
    return [page for page in PAGES if any(getattr(block, kind) for block in blocks(page))]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", _with("runs"), ids=lambda page: page.stem)
def test_blocks_run(page, place, capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        is_possible = zoo.IS_PEFT_TAKEN or "base.add_adapter(" not in block.text
        if block.runs and is_possible:
            run(page, block, names)
    if page.stem == "adapters":
        keys = list(names["merged"].state_dict())
        assert not any("lora_" in key for key in keys)
        assert any(".preskip." in key for key in keys)


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize("page", _with("embedded"), ids=lambda page: page.stem)
def test_blocks_of_the_embedded_model_run(page, place, embedded, capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.embedded:
            run(page, block, names)
    if page.stem == "README":
        assert "The state of the Union is strong because our people are" in capsys.readouterr().out
        assert (place / "adapter" / "adapter_config.json").is_file()


def _parsed(words: list[str]) -> None:
    """Hold a `preskip` command line against the real options, without running it."""
    app.parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_possible(page):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks(page):
        for words in commands(block) if block.language == "shell" else []:
            words = words[: words.index(">")] if ">" in words else words
            if words[0] == "preskip":
                _parsed(words[1:])
            elif "preskip" in words and words[words.index("preskip") - 1] == "-m":
                _parsed(words[words.index("preskip") + 1 :])
            elif words[0] == "make":
                assert set(words[1:]) <= targets, words
            elif words[:2] == ["pip", "install"]:
                named = re.findall(r"preskip\[([\w,]+)\]", " ".join(words))
                assert {extra for group in named for extra in group.split(",")} <= extras, words
            named = [word for word in words if re.fullmatch(r"(benchmarks|tests|configs|docs)/\S+\.\w+", word)]
            assert all((ROOT / word).is_file() for word in named), words


def test_commands_of_the_readme_s_table():
    """What the table names in code is a command with these options."""
    rows = re.findall(r"\| `preskip ([^`]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(rows) >= 8
    for row in rows:
        _parsed(shlex.split(row))


def test_option_files_are_possible(tmp_path):
    """What a page shows as a file of options is one."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    texts = [token.content for token in MarkdownIt("commonmark").parse(page) if token.info == "yaml"]
    assert texts
    for text in texts:
        (tmp_path / "study.yaml").write_text(text)
        configured(ProbeConfig, {}, tmp_path / "study.yaml")
