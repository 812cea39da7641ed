"""The texts on which a branch is explained: held-out documents of its run or of another corpus, and given ones."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preskip.analysis.explain.reading import Text
from preskip.data.corpus import EMBEDDED_CORPORA, Document, clusters
from preskip.data.local import data_directory
from preskip.data.scan import clean_text
from preskip.data.splits import choose, load_splits, load_texts, locate
from preskip.data.words import count_words
from preskip.errors import PreskipError
from preskip.runs.files import read_json
from preskip.runs.weights import Source

DEFAULT_CORPUS = "sotu"


def heldout_texts(
    source: Source,
    corpus: str | None,
    count: int,
    words: int,
    *,
    text_column: str | None = None,
    split: str | None = None,
    data_dir: Path | None,
    quiet: bool = True,
) -> tuple[list[Text], list[str]]:
    """The held-out documents to read, and all of them as the reference of how frequent tokens are.

    A run's own held-out documents where there is a run; of another corpus those that a run would hold out where it is
    embedded or has published parts, else every document.

    Args:
        source: what is explained.
        corpus: name as `preskip.data.corpus.load_corpus` takes it; None is the run's, else sotu.
        count: most documents.
        words: of each, from its beginning.
        text_column: column of rows; None is the run's, else the one that holds text.
        split: of a data set in parts; None is the run's, else what is scored (`preskip.data.corpus.load_corpus`).
        data_dir: folder of local data; None is the run's, else the default.
        quiet: no progress.

    Raises:
        PreskipError: a corpus that cannot be loaded, or fewer than 2 documents.
    """
    documents = _documents(source, corpus, text_column, split, data_dir, quiet)
    usable = [document for document in documents if count_words(document.text) != 1]
    if len(usable) < 2:
        raise PreskipError(f"{len(usable)} held-out document is too few for an interval: give another --corpus")
    seed = source.config.get("split_seed", 0)
    chosen = choose(usable, count, words, seed)
    # Shuffled: ablation, attention patterns and the map take the first ones, which by id would be the oldest.
    order = np.random.default_rng(seed).permutation(len(chosen))
    of = clusters(chosen)
    texts = [Text(chosen[index].id, chosen[index].id, chosen[index].text, group=f"{of[index]}") for index in order]
    return texts, [document.text for document in documents]


def _documents(
    source: Source, corpus: str | None, text_column: str | None, split: str | None, data_dir: Path | None, quiet: bool
) -> Sequence[Document]:
    config = source.config
    own = config.get("corpus")
    stored = None if source.run is None else source.run / "data" / "heldout.json"
    is_own = corpus in (None, own) and own is not None
    if is_own and stored is not None and stored.is_file():  # a run from scratch
        documents = read_json(stored)[0]["documents"]
        return [Document(entry["id"], entry["text"], entry.get("group", entry["id"])) for entry in documents]
    name = locate(corpus or own or DEFAULT_CORPUS, source.directory)
    given = data_dir or (locate(config["data_dir"], source.directory) if config.get("data_dir") else None)
    if name in (own and locate(own, source.directory), *EMBEDDED_CORPORA):
        if is_own:
            text_column, split = text_column or config.get("text_column"), split or config["corpus_split"]
        return load_splits(
            name,
            data_dir=data_directory(given),
            heldout_fraction=config.get("heldout_fraction", 0.2),
            seed=config.get("split_seed", 0),
            text_column=text_column,
            split=split,
            progress=not quiet,
        ).heldout
    found = load_texts(name, data_dir=data_directory(given), text_column=text_column, split=split, progress=not quiet)
    return found.documents


def given_texts(given: Sequence[str]) -> list[Text]:
    """Texts that the user gives: a file is read, anything else is the text itself.

    Raises:
        PreskipError: a file that is not UTF-8, a path that does not exist, or an empty text.
    """
    texts = []
    for number, value in enumerate(given, 1):
        path = Path(value)
        is_file = os.path.isfile(value)  # Path.is_file raises for what is too long to be a name
        if not is_file and len(value.split()) == 1 and path.suffix in (".txt", ".md"):
            raise PreskipError(f"--text {value}: no such file")
        try:
            text = clean_text(path.read_text(encoding="utf-8") if is_file else value)
        except (OSError, UnicodeDecodeError):
            raise PreskipError(f"--text {value} cannot be read: give a UTF-8 text file") from None
        if not text.strip():
            raise PreskipError(f"--text {value!r} is empty: give a text of 2 or more tokens")
        title = path.name if is_file else f"“{' '.join(text.split())[:40]}”"
        texts.append(Text(f"given-{number}", title, text, "given"))
    return texts
