"""A corpus as three disjoint parts: to train on, to choose the learning rate on, to report on."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preskip.assets import EMBEDDED_MODELS
from preskip.data.corpus import (
    DOCUMENT_CHARACTERS,
    EMBEDDED_CORPORA,
    Corpus,
    Document,
    as_scored,
    by_id,
    evenly,
    load_corpus,
    split_documents,
    split_text,
)
from preskip.data.tables import Limit
from preskip.data.wikitext import page_title, wikitext_pages
from preskip.data.words import beginning
from preskip.errors import PreskipError

# Share of the training documents that are set aside to choose the learning rate on.
DEVELOPMENT = 0.1
# Between two books of `books` there are three blank lines, and nowhere else so many.
_BOOK_BORDER = r"\n{4,}"
_SUFFIXES = r"\.((txt|md|jsonl|ndjson|json|csv|tsv)(\.gz)?|parquet|arrow)$"


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The parts of a corpus, each sorted by id; no group of documents is in two of them.

    Attributes:
        name: as asked for.
        training: to train on.
        development: to choose learning rates on, never reported as a result.
        heldout: to report on.
        source: where the texts come from.
        sha256: checksum of all ids and texts.
        whole: no limit stopped the reading.
    """

    name: str
    training: list[Document]
    development: list[Document]
    heldout: list[Document]
    source: str
    sha256: str
    whole: bool = True


def load_splits(
    name: str,
    *,
    data_dir: Path | None = None,
    heldout_fraction: float = 0.2,
    seed: int = 0,
    text_column: str | None = None,
    split: str | None = "train",
    limit: Limit | None = None,
    progress: bool = True,
) -> Splits:
    """Load a corpus in its published parts where it has them, else split by document.

    Args:
        name: `wikitext2`, `books` or `books24` of the data directory (`preskip.data.local`), or any corpus of
            `load_corpus`.
        data_dir: the data directory, or None.
        heldout_fraction: share of documents to report on; not for corpora with published parts.
        seed: of the split.
        text_column: column of rows.
        split: split of a Hub data set or of a folder of tables; None takes what is scored, see `load_corpus`.
        limit: where reading rows stops, see `load_corpus`.
        progress: show a progress bar while downloading.

    Raises:
        PreskipError: unknown or empty corpus, or too few documents for three parts.
    """
    if _is_published(name):
        return _published(name, data_dir, seed)
    corpus = load_corpus(name, text_column=text_column, split=split, limit=limit, progress=progress)
    rest, heldout = split_documents(corpus, heldout_fraction, seed)
    training, development = _set_aside(Corpus(name, tuple(rest), corpus.source), seed)
    return Splits(
        name=name,
        training=training,
        development=development,
        heldout=heldout,
        source=corpus.source,
        sha256=corpus.sha256,
        whole=corpus.whole,
    )


def load_texts(
    name: str,
    *,
    data_dir: Path | None = None,
    text_column: str | None = None,
    split: str | None = None,
    progress: bool = True,
) -> Corpus:
    """Documents to score a given model on: the held-out part of a corpus with published parts, else every document.

    Arguments and errors are those of `load_splits`.
    """
    if not _is_published(name):
        corpus = load_corpus(name, text_column=text_column, split=split, progress=progress)
        return replace(corpus, documents=tuple(as_scored(document, document.text) for document in corpus.documents))
    return Corpus(name, tuple(_read_part(name, "heldout", data_dir)), TITLES[name])


def slug(name: str) -> str:
    """A corpus's name as an evaluation set is named: the last part of a path without its suffix, in safe characters."""
    last = re.sub(_SUFFIXES, "", name.rstrip("/").replace("\\", "/").split("/")[-1])
    # Marks belong to their letters: vowels of Thai and Hindi, accents that are written apart.
    safe = (kept if re.match(r"[\w.-]", kept) or unicodedata.category(kept)[0] == "M" else " " for kept in last)
    return "-".join("".join(safe).split()).strip("-") or "corpus"


def _set_aside(corpus: Corpus, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and development documents; a corpus of one group has no development part."""
    if len({document.group for document in corpus.documents}) < 2:
        return by_id(corpus.documents), []
    parts = split_documents(corpus, DEVELOPMENT, seed)
    return parts.training, parts.heldout


def _is_published(name: str) -> bool:
    """Whether the name stands for files of the data directory; a file of the user's goes before."""
    return name in PUBLISHED and not Path(name).exists()


def _read_part(name: str, part: str, data_dir: Path | None) -> list[Document]:
    if data_dir is None:
        raise no_data_directory(name)
    path = find_file(data_dir, PUBLISHED[name][part])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise PreskipError(
            f"corpus {name}: {path} is missing or not UTF-8: `preskip data` says where to get it"
        ) from None
    if name == "wikitext2":
        return _pages(text, part)
    pieces = _pieces(text, part)
    if name == "books24":
        if part == "training":
            return [piece for piece in pieces if not _is_fourth(piece)]
        fourths = [piece for piece in _read_part("books", "training", data_dir) if _is_fourth(piece)]
        return _spread(fourths + pieces)
    return pieces


def no_data_directory(name: str) -> PreskipError:
    """What to say of a corpus with published parts where there is no data directory."""
    return PreskipError(
        f"corpus {name} is read from the data directory: give --data-dir, or see `preskip data` for how to get it"
    )


def find_file(directory: Path, file: str) -> Path:
    """A file of the data directory; one whose articles are shuffled may be there in the published order instead."""
    path = directory / file
    return path if path.is_file() else directory / file.removesuffix(SHUFFLED)


def missing_file(name: str, directory: Path, *, scored_only: bool = False) -> str | None:
    """The first file that a corpus with published parts lacks in the data directory; None where all are there.

    With `scored_only` those that the held-out part is read from: of `books24` some of the training books, too.
    """
    parts = PUBLISHED[name]
    files = parts.values() if not scored_only or name == "books24" else [parts["heldout"]]
    return next((file for file in files if not find_file(directory, file).is_file()), None)


def _published(name: str, data_dir: Path | None, seed: int) -> Splits:
    parts: dict[str, Any] = {part: _read_part(name, part, data_dir) for part in PUBLISHED[name]}
    if "development" not in parts:
        parts["training"], parts["development"] = _set_aside(Corpus(name, tuple(parts["training"]), name), seed)
    digest = hashlib.sha256()
    for document in (document for part in sorted(parts) for document in parts[part]):
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return Splits(name=name, **parts, source=TITLES[name], sha256=digest.hexdigest())


def _pages(text: str, part: str) -> list[Document]:
    documents = []
    for number, page in enumerate(wikitext_pages(text)):
        if page.strip():
            title = page_title(page.strip().split("\n")[0]) or "untitled"
            documents.append(Document(f"{number:04d} {title}", page.strip(), f"{part}-{number}"))
    return documents


def _pieces(text: str, part: str) -> list[Document]:
    """Pieces of books; those of one book, the one that a piece begins in, are a group."""
    borders = [border.end() for border in re.finditer(_BOOK_BORDER, text)]
    documents, start = [], 0
    # The published pieces have one blank line between paragraphs, also between books, and no indentation behind it.
    even = re.sub(r"\n[ \t]*\n\s*", "\n\n", text)
    for number, piece in enumerate(split_text(even, DOCUMENT_CHARACTERS)):
        start = text.index(piece.split("\n\n")[0], start)
        documents.append(Document(f"{part}#{number:05d}", piece, f"{part}-book-{bisect_right(borders, start)}"))
    return documents


def _is_fourth(piece: Document) -> bool:
    """Whether a piece is of every fourth of the training books, by the number in its group."""
    return int(piece.group.rpartition("-")[2]) % 4 == 3


def _spread(pieces: list[Document]) -> list[Document]:
    """At most `PIECES_OF_A_BOOK` pieces of each book, evenly spread over it: clusters of about one size."""
    books: dict[str, list[Document]] = {}
    for piece in pieces:
        books.setdefault(piece.group, []).append(piece)
    chosen = []
    for book in books.values():
        count = min(len(book), PIECES_OF_A_BOOK)
        chosen += [book[(2 * index + 1) * len(book) // (2 * count)] for index in range(count)]
    return chosen


PIECES_OF_A_BOOK = 4
SHUFFLED = ".shuffled_articles"
# Files of the corpora with published parts, in the data directory.
PUBLISHED = {
    "wikitext2": {
        "training": f"wikitext2/wiki.train.tokens{SHUFFLED}",
        "development": "wikitext2/wiki.valid.tokens",
        "heldout": "wikitext2/wiki.test.raw",
    },
    "books": {"training": "books/books_train.txt", "heldout": "books/books_valid.txt"},
    "books24": {"training": "books/books_train.txt", "heldout": "books/books_valid.txt"},
}
TITLES = {
    "wikitext2": "WikiText-2: train and validation with <unk>, test raw, by page",
    "books": "English books dated 1900 or earlier, in pieces of 10,000 characters; held out: 4 other books",
    "books24": "English books dated 1900 or earlier, in pieces of 10,000 characters; held out: 4 pieces of 24 books",
}


def locate(name: str, directory: Path) -> str:
    """A name of a model, corpus or folder as a run records it; a path that is not here is of the folder it started in.

    No path stands for the name of an embedded or published one.
    """
    path = directory / name
    is_named = name in EMBEDDED_MODELS or name in EMBEDDED_CORPORA or name in PUBLISHED
    return str(path) if path.exists() and not Path(name).exists() and not is_named else name


def choose(documents: Sequence[Document], count: int, words: int, seed: int) -> list[Document]:
    """A fixed, seeded choice of documents to score, each cut to its first words (`preskip.data.words.beginning`).

    Every group gives a document before one gives a second: no long book stands for all.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    spread = evenly([documents[index].group for index in order])[:count]
    chosen = (documents[index] for index in sorted(order[place] for place in spread))
    return [as_scored(document, beginning(document.text, words)) for document in chosen]
