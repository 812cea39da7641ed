"""Corpora by name as documents, and their split into training and held-out documents."""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from preskip.data import sotu
from preskip.errors import PreskipError

EMBEDDED_CORPORA = ("pydoc", "sotu")
# A plain text file has no document borders of its own; this many characters keep a context of several paragraphs.
DOCUMENT_CHARACTERS = 10_000
_REFUSED_SUFFIXES = {".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".bz2", ".xz", ".pdf", ".docx"}


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        id: unique in its corpus.
        text: the text, without the corpus's own mark-up, line ends as `\\n`.
        group: documents of one group belong to the same split (two versions of one speech, exact duplicates).
    """

    id: str
    text: str
    group: str


@dataclass(frozen=True)
class Corpus:
    """Named documents with their source and a checksum of their ids and texts, in any order."""

    name: str
    documents: tuple[Document, ...]
    source: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the checksum."""
        digest = hashlib.sha256()
        for document in sorted(self.documents, key=lambda document: document.id):
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
    split: str = "train",
    max_documents: int = 10_000,
    max_bytes: int = 64_000_000,
    progress: bool = True,
) -> Corpus:
    """Load a corpus.

    Args:
        name: `sotu`, `pydoc`, a text file, a folder of `.txt` and `.md` files, a `.jsonl` file with a `text` in every
            line (`id` and `group` optional), or a Hub data set `owner/name` or `owner/name:config`.
        text_column: column of a Hub data set; None takes `text`, else a column of another usual name, else the only
            column of strings.
        split: split of a Hub data set.
        max_documents: stop reading a Hub data set after so many documents.
        max_bytes: stop reading a Hub data set after so many bytes of UTF-8.
        progress: show a progress bar while downloading.

    Raises:
        PreskipError: unknown name, empty, not UTF-8, a JSONL line without text, or a data set that cannot be reached.
    """
    if name == "sotu":
        speeches = sotu.load_speeches(progress)
        return Corpus(name, tuple(Document(*speech) for speech in speeches), sotu.SOURCE)
    if name == "pydoc":
        return _load_pydoc()
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _load_folder(name, path)
    if path.is_file():
        if path.suffix.lower() in _REFUSED_SUFFIXES:
            raise PreskipError(f"corpus {name}: {path.suffix} files are not read: give .txt, .md, .jsonl or a folder")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return _load_jsonl(name, path)
        return _load_text_file(name, path)
    looks_like_file = (
        name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or path.suffix in (".txt", ".md", ".jsonl")
    )
    if not looks_like_file and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return _load_hub(name, text_column, split, max_documents, max_bytes)
    if "/" in name or path.suffix:
        raise PreskipError(f"corpus {name} does not exist: check the path")
    raise PreskipError(
        f"unknown corpus {name!r}: embedded are {', '.join(EMBEDDED_CORPORA)}; or give a text file, a folder of .txt "
        f"or .md files, a .jsonl file, or a Hub data set owner/name"
    )


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

    def by_id(documents: Iterable[Document]) -> list[Document]:
        return sorted(documents, key=lambda document: document.id)

    return Split(
        training=by_id(document for document in corpus.documents if document.group not in chosen),
        heldout=by_id(document for document in corpus.documents if document.group in chosen),
    )


def split_text(text: str, characters: int) -> list[str]:
    """Cut a text at paragraph borders into pieces of about so many characters; loses nothing but the white space there.

    Where a text has no blank lines its lines count as paragraphs; a paragraph of more than twice the length is cut at
    sentence ends or spaces.
    """
    separator = "\n\n" if re.search(r"\n[ \t]*\n", text) else "\n"
    paragraphs = re.split(r"\n[ \t]*\n\s*" if separator == "\n\n" else r"\n", text)
    pieces: list[str] = []
    gathered: list[str] = []
    length = 0
    for paragraph in (part for whole in paragraphs for part in _cut_long(whole.strip(), characters)):
        if gathered and length + len(paragraph) > characters:
            pieces.append(separator.join(gathered))
            gathered, length = [], 0
        if paragraph:
            gathered.append(paragraph)
            length += len(paragraph) + len(separator)
    if gathered:
        pieces.append(separator.join(gathered))
    return pieces


def _cut_long(paragraph: str, characters: int) -> list[str]:
    parts = []
    while len(paragraph) > 2 * characters:
        window = paragraph[:characters]
        at = max(window.rfind(". ") + 1, window.rfind("! ") + 1, window.rfind("? ") + 1)
        at = at or window.rfind(" ") or characters
        at = characters if at < 1 else at
        parts.append(paragraph[:at].strip())
        paragraph = paragraph[at:].strip()
    return [*parts, paragraph]


def _content_group(text: str) -> str:
    """Exact duplicates must not end up on both sides of the split."""
    return "text-" + hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def _corpus(name: str, texts: Sequence[tuple[str, str]], source: str) -> Corpus:
    documents = tuple(Document(id, text, _content_group(text)) for id, text in texts if text.strip())
    if not documents:
        raise PreskipError(f"corpus {name} is empty: give one with text in it")
    return Corpus(name, documents, source)


def _load_pydoc() -> Corpus:
    from pydoc_data import topics

    source = f"pydoc_data.topics of the standard library of Python {platform.python_version()} (PSF licence)"
    return _corpus("pydoc", sorted(topics.topics.items()), source)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreskipError(
            f"corpus file {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise PreskipError(f"corpus file {path} cannot be read ({error.strerror}): check its permissions") from error
    if "\0" in text:
        raise PreskipError(f"corpus file {path} is not text (it contains zero bytes): give a UTF-8 text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _load_text_file(name: str, path: Path) -> Corpus:
    text = _read_text(path)
    pieces = text.split("\f") if "\f" in text else split_text(text, DOCUMENT_CHARACTERS)
    pieces = [piece.strip("\n") for piece in pieces if piece.strip()]
    width = len(str(max(0, len(pieces) - 1)))
    return _corpus(name, [(f"{path.stem}#{i:0{width}d}", piece) for i, piece in enumerate(pieces)], f"text file {path}")


def _load_folder(name: str, path: Path) -> Corpus:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in (".txt", ".md")
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise PreskipError(f"corpus folder {path} has no .txt or .md files: give a folder of texts")
    return _corpus(name, [(file.relative_to(path).as_posix(), _read_text(file)) for file in files], f"folder {path}")


def _load_jsonl(name: str, path: Path) -> Corpus:
    documents: list[Document] = []
    seen: dict[str, int] = {}
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"corpus file {path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise PreskipError(f"{where}: not valid JSON ({error}): every line must be one JSON object") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise PreskipError(f'{where}: no string "text": every line must look like {{"text": "..."}}')
        if not entry["text"].strip():
            continue
        id = str(entry["id"]) if entry.get("id") is not None else f"{path.stem}#{number}"
        if id in seen:
            raise PreskipError(f"{where}: id {id!r} is already that of line {seen[id]}: ids must be unique")
        seen[id] = number
        group = str(entry["group"]) if entry.get("group") is not None else _content_group(entry["text"])
        documents.append(Document(id, entry["text"], group))
    if not documents:
        raise PreskipError(f"corpus {name} is empty: give one with text in it")
    return Corpus(name, tuple(documents), f"JSONL file {path}")


def _load_hub(name: str, text_column: str | None, split: str, max_documents: int, max_bytes: int) -> Corpus:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    repository, _, config = name.partition(":")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    texts: list[tuple[str, str]] = []
    size = 0
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)  # several lines for each of its retries without a network
    try:
        # Streaming reads no more than the cap, but only a whole download can come from the cache.
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=not offline)
        column: str | None = None
        for index, row in enumerate(rows):
            column = column or _text_column(name, row, text_column)
            text = row[column]
            if not isinstance(text, str) or not text.strip():
                continue
            texts.append((f"{split}#{index}", text))
            size += len(text.encode())
            if len(texts) >= max_documents or size >= max_bytes:
                break
    except PreskipError:
        raise
    except Exception as error:  # the client raises many kinds, from several libraries
        raise PreskipError(f"corpus {name}: {_explain(error, offline)}") from error
    finally:
        hub_logging.set_verbosity(verbosity)
    return _corpus(name, texts, f"Hugging Face data set {name}, split {split}")


def _text_column(name: str, row: dict[str, object], wanted: str | None) -> str:
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if wanted is not None:
        if wanted not in row:
            raise PreskipError(f"corpus {name} has no column {wanted!r}: it has {', '.join(row)}")
        return wanted
    for usual in ("text", "content", "document", "article"):
        if usual in strings:
            return usual
    if len(strings) == 1:
        return strings[0]
    raise PreskipError(f"corpus {name}: which column is the text? It has {', '.join(row)}: choose one (text_column)")


def _explain(error: BaseException, offline: bool) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()
    kind = type(error).__name__
    if "gated" in lower:
        return "is gated on the Hub: accept its terms there and log in with `hf auth login`"
    if "config name is missing" in lower:
        return f"has several configurations, name one as owner/name:config ({text[:160]})"
    if "unknown split" in lower or "bad split" in lower:
        return f"has no such split ({text[:120]})"
    if offline:
        return "is not in the local cache and HF_HUB_OFFLINE is set: go online, or give a local file or sotu"
    if kind == "DatasetNotFoundError":
        return "is neither a local file nor a data set on the Hub: check the spelling, or log in if it is private"
    if isinstance(error, ConnectionError) or "connect" in kind.lower() or "couldn't reach" in lower:
        return "the Hub cannot be reached: go online, or give a local file or sotu"
    return f"cannot be loaded ({kind}: {text[:160]})"
