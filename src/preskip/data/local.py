"""The data directory: standard evaluation sets as local files, in place of the Hub.

The directory is `--data-dir`, else the environment variable PRESKIP_DATA, else the user's, where that exists::

    lambada/lambada_openai_test.jsonl                 LAMBADA, OpenAI version: {"text"} in every line (5,153)
    lambada/lambada_development_plain_text.txt        LAMBADA development set, lower-cased and tokenised, one a line
    wikitext2/wiki.test.raw                           WikiText-2/103 raw test (62 pages)
    arc_easy/arc_easy_validation.jsonl                {"id", "question", "choices": {"text", "label"}, "answerKey"}
    arc_easy/arc_easy_test.jsonl                      the same, or {"id", "question", "choices": [text], "gold": index}
    hellaswag/hellaswag_val_1000_olmes.jsonl          {"ind", "query", "choices", "gold"}, sample of the validation set

Every file is optional. Rows come in the schema of the Hub's data set, so that an lm-eval task reads them unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.assets import file_sha256
from preskip.data.corpus import Document
from preskip.data.rows import read_text
from preskip.data.wikitext import wikitext_pages
from preskip.errors import PreskipError

DATA_VARIABLE = "PRESKIP_DATA"
LAMBADA_DEVELOPMENT = "lambada/lambada_development_plain_text.txt"

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """The local rows of one lm-eval task.

    Attributes:
        splits: rows in the Hub's schema by the name of their split.
        files: the files they come from, relative to the data directory.
        sha256: checksum of these files, in the order of `files` (of the file itself where there is one).
        name: what the data are, for a reader.
    """

    splits: Mapping[str, Rows]
    files: tuple[str, ...]
    sha256: str
    name: str


@dataclass(frozen=True, kw_only=True)
class _Layout:
    name: str
    files: Mapping[str, str]  # split: file; the first is the one that lm-eval evaluates
    read: Callable[[Path], Rows]


def data_directory(path: Path | str | None = None) -> Path | None:
    """The data directory, or None where there is none.

    Args:
        path: as given by the user; None takes PRESKIP_DATA, else `$XDG_DATA_HOME/preskip`, which is
            `~/.local/share/preskip` unless set, where that exists.

    Raises:
        PreskipError: the given directory, or that of PRESKIP_DATA, does not exist.
    """
    directory = data_place(path)
    if directory.is_dir():
        return directory
    if path or os.environ.get(DATA_VARIABLE):
        where = "--data-dir" if path else DATA_VARIABLE
        raise PreskipError(f"{where}: folder {directory} does not exist: check the path")
    return None


def data_place(path: Path | str | None = None) -> Path:
    """Where the data directory is, whether it exists or not; see `data_directory`."""
    given = path or os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).expanduser()
    # The XDG specification says that a relative path there is to be ignored.
    xdg = os.environ.get("XDG_DATA_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local/share") / "preskip"


def load_local(task: str, directory: Path | None) -> LocalData | None:
    """The local data of an lm-eval task, or None where the directory has none.

    Args:
        task: an lm-eval task name.
        directory: see `data_directory`.

    Raises:
        PreskipError: a file cannot be read, or is not in the expected form.
    """
    layout = LAYOUT.get(task)
    if layout is None or directory is None:
        return None
    files = {split: name for split, name in layout.files.items() if (directory / name).is_file()}
    if next(iter(layout.files)) not in files:
        return None
    splits = {split: layout.read(directory / name) for split, name in files.items()}
    names = tuple(files.values())
    contents = [file_sha256(directory / name) for name in names]
    sha256 = contents[0] if len(contents) == 1 else hashlib.sha256("".join(contents).encode()).hexdigest()
    return LocalData(splits=splits, files=names, sha256=sha256, name=layout.name)


def lambada_development(directory: Path) -> list[Document]:
    """The passages of LAMBADA's development set as documents, detokenised but still in lower case: tune on these.

    Raises:
        PreskipError: the file is not there, or cannot be read.
    """
    path = directory / LAMBADA_DEVELOPMENT
    if not path.is_file():
        raise PreskipError(f"{path} does not exist: it holds LAMBADA's development set, one passage a line")
    texts = [detokenise_lambada(line) for line in read_text(path).splitlines() if line.strip()]
    return [Document(f"lambada_development#{i:04d}", text, f"{i}") for i, text in enumerate(texts)]


def detokenise_lambada(text: str) -> str:
    """Undo the tokenisation of the original LAMBADA text (Penn Treebank style): quotes, contractions, punctuation.

    The case is not restored. A single `'` is taken as an apostrophe where it is glued to a word, else as the quote that
    closes the last open "`".
    """
    text = " ".join(text.split())
    text = re.sub(r"`` ?", "“", text)
    text = re.sub(r" ?''", "”", text)
    text = re.sub(r" (n't|'(?:s|m|re|ve|ll|d))\b", r"\1", text)
    text = re.sub(r"` ?", "‘", text)
    text = re.sub(r" '(?= |$)", "’", text)
    text = re.sub(r" ([.,;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$#]) ", r"\1", text)
    return text.translate(str.maketrans("“”‘’", "\"\"''"))


def _checked(convert: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], Rows]:
    def read(path: Path) -> Rows:
        rows = []
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            try:
                rows += [convert(json.loads(line))] if line.strip() else []
            except json.JSONDecodeError as error:
                raise PreskipError(f"{path}, line {number}: not valid JSON ({error}): get the file again") from error
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                raise PreskipError(
                    f"{path}, item {len(rows) + 1}: not in the documented form ({error!r}): get the file again"
                ) from error
        if not rows:
            raise PreskipError(f"{path} is empty: get the file again")
        return rows

    return read


def _lambada(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"]}


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    choices, key = row["choices"], row.get("answerKey")
    if isinstance(choices, list):
        labels = [chr(ord("A") + index) for index in range(len(choices))]
        choices, key = {"text": choices, "label": labels}, labels[row["gold"]]
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": {"text": choices["text"], "label": choices["label"]},
        "answerKey": choices["label"][choices["label"].index(key)] if key in choices["label"] else row["answerKey"],
    }


CUE = "[step]"


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """Rows that lm-eval's `process_docs` turns into the published sample, which holds what it makes of the raw rows.

    It strips the raw texts and then removes what stands in brackets, so a space at the beginning comes from a bracket.
    """
    label, _, context = row["query"].partition(": ")
    return {
        "ind": row["ind"],
        "activity_label": label,
        "ctx_a": context,
        "ctx_b": "",
        "endings": [CUE + choice if choice.startswith(" ") else choice for choice in row["choices"]],
        "label": str(row["gold"]),
    }


def _wikitext(path: Path) -> Rows:
    return [{"page": page} for page in wikitext_pages(read_text(path))]


LAYOUT: Mapping[str, _Layout] = {
    "lambada_openai": _Layout(
        name="LAMBADA, OpenAI version, test",
        files={"test": "lambada/lambada_openai_test.jsonl"},
        read=_checked(_lambada),
    ),
    "wikitext": _Layout(
        name="WikiText-2 raw, test, by page",
        files={"test": "wikitext2/wiki.test.raw"},
        read=_wikitext,
    ),
    "arc_easy": _Layout(
        name="ARC-Easy, test",
        files={"test": "arc_easy/arc_easy_test.jsonl", "validation": "arc_easy/arc_easy_validation.jsonl"},
        read=_checked(_arc),
    ),
    "hellaswag": _Layout(
        name="HellaSwag, a published sample of 1,000 validation items",
        files={"validation": "hellaswag/hellaswag_val_1000_olmes.jsonl"},
        read=_checked(_hellaswag),
    ),
}
