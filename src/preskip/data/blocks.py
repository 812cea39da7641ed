"""Documents as tokens: packed blocks to train on, and windows that score every token of a held-out document once."""

import re
import tempfile
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preskip.data.corpus import Document, by_id, split_text
from preskip.data.words import count_words
from preskip.errors import PreskipError
from preskip.runs.files import clear_disk_errors

if TYPE_CHECKING:
    from rich.progress import Progress

# Characters per call of the tokenizer: its own records of a text take some 100 times the room of the token ids.
BATCH_CHARACTERS = 2**20
# A longer text is tokenised in parts. Each begins with the space behind a word, where a pre-tokenizer cuts anyway.
LONGEST_TEXT = 2**20
_WORD_END = re.compile(r"[^\W\d_](?=\s)")
_LONGEST_WORD = 1000


class Window(NamedTuple):
    """A stretch of a document for the model to read.

    Args:
        input_ids: up to context_length + 1 token ids. A model reads `input_ids[:-1]` and predicts `input_ids[1:]`. Of
            many windows they are arrays: four bytes a token, where a list takes up to 40.
        scored_from: `input_ids[scored_from:]` are scored here, never 0; what comes before is context.
    """

    input_ids: Sequence[int]
    scored_from: int


class Marks(NamedTuple):
    """The tokens in front of a document and behind it; None where there is none."""

    start: int | None
    end: int | None


class TextSize(NamedTuple):
    """Bytes (UTF-8) and words of the scored text of a document; 0 words where it has none (`preskip.data.words`)."""

    bytes: int
    words: int


def pack_blocks(
    documents: Sequence[Document],
    tokenizer: Any,
    seq_len: int,
    limit_tokens: int | None = None,
    seed: int = 0,
    *,
    marks: Marks | None = None,
    opening: int | None = None,
    piece_characters: int | None = None,
    min_blocks: int = 1,
    part: str = "training",
    progress: "Progress | None" = None,
) -> NDArray[np.int32]:
    """Join shuffled documents and cut them into full blocks, in an order drawn from the seed.

    The result depends on the documents, not on the order in which they are given. No padding: the rest that does not
    fill a block is dropped. Tokens go through files, so that memory does not grow with the text.

    Args:
        documents: what to train on.
        tokenizer: a Hugging Face tokenizer; no special token is added but `marks` and `opening`.
        seq_len: tokens per block.
        limit_tokens: at most so many tokens, rounded down to whole blocks; no more is tokenised than needed. None
            takes all.
        seed: seed of the order of documents and of blocks.
        marks: the tokens around every document. None: its end-of-sequence token (for want of one: the separator or
            start token) behind it.
        opening: the token that every block begins with (`opening_token`); None for none.
        piece_characters: cut documents at paragraph borders into pieces of about this length and shuffle those
            instead, so that a small `limit_tokens` draws on many documents. None keeps documents whole.
        min_blocks: fewer blocks than this are an error (one batch).
        part: of the corpus that the documents are, for the error where there are too few.
        progress: a live rich progress display to add a task to.

    Returns:
        Token ids, [blocks, seq_len], memory-mapped.

    Raises:
        PreskipError: `seq_len` or `limit_tokens` too small, not enough text, or a full disk.
    """
    if seq_len < 2:
        raise PreskipError(f"sequence length {seq_len}: must be at least 2")
    if limit_tokens is not None and limit_tokens < seq_len * min_blocks:
        raise PreskipError(
            f"limit of {limit_tokens} tokens: one batch takes {min_blocks} × {seq_len} tokens; raise the limit"
        )
    random = np.random.default_rng(seed)
    texts = [document.text for document in by_id(documents)]
    if piece_characters is not None:
        texts = [piece for text in texts for piece in split_text(text, piece_characters)]
    texts = [texts[index] for index in random.permutation(len(texts)) if texts[index]]
    marks = marks or Marks(start=None, end=first_token(tokenizer, "eos", "sep", "bos"))
    width = seq_len if opening is None else seq_len - 1  # tokens of the text in a block
    wanted = None if limit_tokens is None else limit_tokens // seq_len * width
    total = 0
    task = None if progress is None else progress.add_task("Tokenising", total=wanted or len(texts))
    with clear_disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as stream:
        # A token is seldom less than one character, so that little is tokenised that is not wanted.
        most = BATCH_CHARACTERS if wanted is None else min(BATCH_CHARACTERS, wanted)
        for done, ids in token_stream(texts, tokenizer, marks, most):
            stream.write(np.asarray(ids, dtype=np.int32).tobytes())
            total += len(ids)
            if progress is not None and task is not None:
                progress.update(task, completed=done if wanted is None else min(total, wanted))
            if wanted is not None and total >= wanted:
                break
        blocks = (total if wanted is None else min(total, wanted)) // width
        if blocks < max(1, min_blocks):
            unit, cure = f"block of {seq_len}", "the sequence length"
            if min_blocks > 1:
                unit, cure = f"batch of {min_blocks} × {seq_len}", "the batch size or sequence length"
            raise PreskipError(
                f"corpus too small: {total} {part} tokens do not fill one {unit}; give more text, or lower {cure}"
            )
        # Otherwise a batch would hold neighbouring blocks of one document.
        return _reordered(stream, random.permutation(blocks), width, opening)


def token_stream(
    texts: Iterable[str], tokenizer: Any, marks: Marks, characters: int
) -> Iterator[tuple[int, list[int]]]:
    """Tokenise texts in their order, with no special tokens but `marks`; so memory does not grow with them.

    Args:
        texts: to tokenise; one of more than `LONGEST_TEXT` characters is cut.
        tokenizer: a Hugging Face tokenizer; a fast one spreads what it gets at once over its threads.
        marks: the tokens around every text.
        characters: that the tokenizer gets at once, unless a single text has more.

    Yields:
        After every call, how many texts are done, and the next token ids.
    """
    done = 0
    for batch in _batches((part for text in texts for part in _parts(text)), characters):
        every = tokenizer([part.text for part in batch], add_special_tokens=False, verbose=False)["input_ids"]
        stream: list[int] = []
        for part, ids in zip(batch, every, strict=True):
            if part.is_first and marks.start is not None:
                stream.append(marks.start)
            stream += ids
            if part.is_last and marks.end is not None:
                stream.append(marks.end)
            done += part.is_last
        yield done, stream


class _Part(NamedTuple):
    """A stretch of a text, and whether the text begins or ends with it."""

    text: str
    is_first: bool
    is_last: bool


def _parts(text: str) -> Iterator[_Part]:
    start = 0
    while len(text) - start > LONGEST_TEXT:
        stop = start + LONGEST_TEXT
        words = [found.end() for found in _WORD_END.finditer(text, max(start, stop - _LONGEST_WORD), stop)]
        stop = words[-1] if words else stop
        yield _Part(text[start:stop], is_first=start == 0, is_last=False)
        start = stop
    yield _Part(text[start:] if start else text, is_first=start == 0, is_last=True)


def _batches(parts: Iterable[_Part], characters: int) -> Iterator[list[_Part]]:
    """Parts in their order, as many at once as have so many characters together, but at least one."""
    batch: list[_Part] = []
    length = 0
    for part in parts:
        if batch and length + len(part.text) > characters:
            yield batch
            batch, length = [], 0
        batch.append(part)
        length += len(part.text)
    if batch:
        yield batch


def _reordered(stream: IO[bytes], order: NDArray[np.int64], width: int, opening: int | None) -> NDArray[np.int32]:
    """Blocks of a file of tokens in another order, each behind `opening`, in a file that vanishes with the array.

    Reading and writing leave the blocks out of this process's memory, where mapping both files would not.
    """
    first = np.asarray([] if opening is None else [opening], dtype=np.int32)
    size = width * first.itemsize
    stream.flush()
    with tempfile.TemporaryFile() as file:
        for block in order.tolist():
            stream.seek(block * size)
            file.write(first.tobytes() + stream.read(size))
        file.flush()
        return np.memmap(file, dtype=np.int32, mode="c", shape=(len(order), first.size + width))


def heldout_windows(
    document: Document, tokenizer: Any, context_length: int, stride: int, *, reopen: bool = True
) -> list[Window]:
    """Cut a document into windows that score each of its tokens exactly once.

    The text follows the tokenizer's start token (for want of one: its end token), so that its first token is
    scored, too. Without either the first token cannot be scored; `scored_size` takes it off the bytes. A later window
    begins with the start token, too, in place of its first token, where the tokenizer itself opens a text with it:
    such a model may be lost without (Gemma).

    Args:
        document: what to score.
        tokenizer: a Hugging Face tokenizer.
        context_length: most tokens that the model reads at once.
        stride: tokens scored per window behind the first, 1 to `context_length`. The smaller, the more context each
            token has: at least `context_length - stride + 1`. `context_length` itself is the cheapest.
        reopen: whether later windows begin with the start token, where the tokenizer opens texts; a model that was
            trained from scratch on blocks without it needs none.

    Returns:
        Windows in the document's order; none for an empty document.

    Raises:
        PreskipError: `context_length` or `stride` out of range.
    """
    if context_length < 1 or not 1 <= stride <= context_length:
        raise PreskipError(
            f"context length {context_length} and stride {stride}: the stride must lie between 1 and the context length"
        )
    ids = text_ids(document.text, tokenizer)
    start, opening = start_token(tokenizer), opening_token(tokenizer) if reopen else None
    sequence = array("i", ids if start is None else [start, *ids])
    windows: list[Window] = []
    scored = 1  # the first token of the sequence is never predicted
    while scored < len(sequence):
        end = min(len(sequence), scored + (stride if windows else context_length))
        begin = max(0, end - context_length - 1)
        tokens = sequence[begin:end]
        if opening is not None:
            tokens[0] = opening
        windows.append(Window(tokens, scored - begin))
        scored = end
    return windows


def scored_size(document: Document, tokenizer: Any) -> TextSize:
    """Return the bytes and words that the windows of `heldout_windows` score."""
    text = document.text
    if start_token(tokenizer) is None:
        text = text[_first_end(text, tokenizer) :]
    return TextSize(len(text.encode("utf-8")), count_words(text))


def _first_end(text: str, tokenizer: Any) -> int:
    """Characters of a text that its first token holds.

    A tokenizer in pure Python has no offsets: its token is looked for at the beginning of the text, without the marks
    that vocabularies put on pieces of words.
    """
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return next(iter(offsets["offset_mapping"]), (0, 0))[1]
    ids = text_ids(text, tokenizer)
    if not ids:
        return 0
    start = len(text) - len(text.lstrip())
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    piece = token.removesuffix("@@").removesuffix("</w>").lstrip("▁Ġ")
    if not text[start:].casefold().startswith(piece.casefold()):
        piece = tokenizer.decode(ids[:1]).strip() or text[start : start + 1]
    return start + len(piece)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with a token that the model has no embedding for; more embeddings than tokens are allowed.

    Args:
        model: a transformers or PEFT model.
        tokenizer: that is to be used with it.

    Raises:
        PreskipError: the token and both sizes are named.
    """
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer)


def check_rows(rows: int, tokenizer: Any) -> None:
    """Refuse a tokenizer with a token beyond so many embeddings, see `check_vocabulary`."""
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda pair: pair[1], default=("", -1))
    if highest >= rows:
        raise PreskipError(
            f"the tokenizer's token {token!r} has id {highest} and the model has {rows:,} embeddings for the "
            f"{len(vocabulary):,} tokens: call resize_token_embeddings({highest + 1}) and save the model, or give it "
            "its own tokenizer"
        )


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokenise a text of any length without special tokens, and without the warning about long ones."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def keeps(tokenizer: Any, text: str) -> bool:
    """Whether the tokens of a text give it back, but for white space and forms of one character (NFKC)."""
    ids = text_ids(text, tokenizer)
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _characters(back) == _characters(text)


def _characters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def start_token(tokenizer: Any) -> int | None:
    """Return the token that opens a text: start, end or classification token, the first that the tokenizer has."""
    return first_token(tokenizer, "bos", "eos", "cls")


def opening_token(tokenizer: Any) -> int | None:
    """Return the start token where the tokenizer itself puts it before a text (Gemma, Llama), else None."""
    start = tokenizer.bos_token_id
    opens = start is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [start]
    return int(start) if opens else None


def document_marks(tokenizer: Any) -> Marks:
    """The tokens around a document when a model is trained from scratch, which knows no others.

    A document opens as it is scored (`heldout_windows`): with the start token, or with the end token that closes the
    document before it where that is the same.
    """
    start, end = start_token(tokenizer), first_token(tokenizer, "eos", "bos", "cls")
    return Marks(start=None if start == end else start, end=end)


def first_token(tokenizer: Any, *kinds: str) -> int | None:
    """Return the id of the first of these special tokens ("bos", "eos", "sep", "cls", "pad") that a tokenizer has."""
    ids = (getattr(tokenizer, f"{kind}_token_id") for kind in kinds)
    return next((int(token) for token in ids if token is not None), None)
