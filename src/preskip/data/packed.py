"""Training text as one memory-mapped file of token ids, in blocks, with a checksum: written once, read by any process.

::

    FOLDER/tokens.bin     token ids, little-endian uint16 where the vocabulary fits, else uint32
    FOLDER/tokens.json    dtype, number of tokens, and checksums of the file, of the texts and of the tokenizer

`tokens.json` is written last; a folder without it is begun anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preskip.assets import file_sha256
from preskip.data.blocks import BATCH_CHARACTERS, document_marks, token_stream
from preskip.data.corpus import Document, by_id
from preskip.data.tokenizer import fingerprint
from preskip.errors import PreskipError
from preskip.progress import Advance, no_progress
from preskip.runs.files import clear_disk_errors, read_json, write_json

TOKENS, RECORD = "tokens.bin", "tokens.json"


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """A stream of tokens on disk.

    Attributes:
        dtype: of the file, "<u2" or "<u4".
        tokens: how many.
        documents: how many documents they come from.
        sha256: of the file.
        texts: checksum of the documents' ids and texts in the order in which they lie in the file.
        tokenizer: `preskip.data.tokenizer.fingerprint`.
    """

    dtype: str
    tokens: int
    documents: int
    sha256: str
    texts: str
    tokenizer: str


def write_packed(
    folder: Path, documents: Sequence[Document], tokenizer: Any, *, seed: int = 0, advance: Advance = no_progress
) -> PackedText:
    """Write documents as tokens, each between its `document_marks`, in an order drawn from the seed.

    What is there already is kept where it was made from the same texts with the same tokenizer, and is whole.

    Args:
        folder: where to write; made if missing.
        documents: what to train on; their given order does not matter.
        tokenizer: a Hugging Face tokenizer.
        seed: of the order of documents.
        advance: progress, called as advance(done documents, note).

    Raises:
        PreskipError: the disk is full, or the folder cannot be written.
    """
    ordered = by_id(documents)
    ordered = [ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))]
    digest = hashlib.sha256()
    for document in ordered:
        digest.update(f"{document.id}\0{document.text}\0".encode())
    texts = digest.hexdigest()
    kind = fingerprint(tokenizer)
    if (folder / RECORD).is_file():
        found = read_record(folder)
        if (found.texts, found.tokenizer) == (texts, kind) and _is_whole(folder / TOKENS, found):
            return found
    dtype = "<u2" if max(len(tokenizer) - 1, *tokenizer.get_vocab().values()) < 2**16 else "<u4"  # ids may have gaps
    marks = document_marks(tokenizer)
    digest, count = hashlib.sha256(), 0
    temporary = folder / f".{TOKENS}"
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        with temporary.open("wb") as file:
            for done, ids in token_stream((document.text for document in ordered), tokenizer, marks, BATCH_CHARACTERS):
                content = np.asarray(ids, dtype=dtype).tobytes()
                digest.update(content)
                count += len(content)
                file.write(content)
                advance(done, "")
        temporary.replace(folder / TOKENS)
    record = PackedText(
        dtype=dtype,
        tokens=count // np.dtype(dtype).itemsize,
        documents=len(ordered),
        sha256=digest.hexdigest(),
        texts=texts,
        tokenizer=kind,
    )
    write_json(folder / RECORD, asdict(record))
    return record


def read_record(folder: Path) -> PackedText:
    """What `tokens.json` says.

    Raises:
        PreskipError: it is missing or not of this form.
    """
    try:
        return PackedText(**read_json(folder / RECORD))
    except TypeError as error:
        raise PreskipError(f"{folder / RECORD} is of another version ({error}): delete {folder} and resume") from None


def open_blocks(folder: Path, seq_len: int) -> np.ndarray:
    """The tokens as read-only, memory-mapped blocks [N, seq_len]; the rest that fills no block is left out.

    Raises:
        PreskipError: the file is missing, cut, or not what was written.
    """
    record = read_record(folder)
    path = folder / TOKENS
    if not _is_whole(path, record):
        raise PreskipError(f"{path} is damaged (it does not match its checksum): delete {folder} and resume")
    blocks = record.tokens // seq_len
    if blocks == 0:
        raise PreskipError(
            f"corpus too small: {record.tokens:,} training tokens do not fill one block of {seq_len}: give more text, "
            "or lower --seq-len"
        )
    stream = np.memmap(path, dtype=record.dtype, mode="r", shape=(record.tokens,))
    return stream[: blocks * seq_len].reshape(blocks, seq_len)


def _is_whole(path: Path, record: PackedText) -> bool:
    size = record.tokens * np.dtype(record.dtype).itemsize
    return path.is_file() and path.stat().st_size == size and file_sha256(path) == record.sha256
