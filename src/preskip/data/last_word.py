"""Last-word items: passages of held-out documents whose last word can be found in what came before.

In the manner of LAMBADA (Paperno et al. 2016), but built from the corpus at hand and never called by that name: a
passage of whole sentences, and the model is to give the last word of the final one.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preskip.data.blocks import opening_token, text_ids
from preskip.data.corpus import Document
from preskip.errors import PreskipError

LAST_WORD = "last_word"  # the evaluation set
SHORTEST_PASSAGE = 40
LONGEST_PASSAGE = 110
SHORTEST_TARGET = 4

# English function words of four letters and more; shorter words are no targets anyway.
_STOP_WORDS = """
about above according across after again against ahead almost alone along already also although always among amongst
another anybody anyone anything anywhere aren around aside away became because become becomes been before behind being
below beneath beside besides between beyond both cannot could couldn didn does doesn doing done down during each
either else elsewhere enough even ever every everybody everyone everything everywhere except fewer first for former
from further furthermore hadn hasn have haven having hence here hers herself himself however indeed instead into isn
itself just last latter least less lest like likewise made make many maybe mere merely might more moreover most much
must myself namely near nearly neither never nevertheless next nobody none nonetheless nothing notwithstanding nowhere
often once only onto other others otherwise ought ours ourselves over own perhaps quite rather really same several
shall shan should shouldn simply since some somebody somehow someone something sometimes somewhat somewhere soon still
such than that their theirs them themselves then thence there thereafter thereby therefore therefrom therein thereof
thereto thereupon these they thing things this those though through throughout thus together too toward towards under
unless unlike until unto upon very wasn well were weren what whatever when whence whenever where whereas whereby
wherein whereof wherever whether which whichever while whither who whoever whole whom whose will with within without
won would wouldn your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

# Abbreviations after which a full stop ends no sentence.
_ABBREVIATIONS_TEXT = """
apr art aug capt co col corp dec dept dr etc feb gen gov hon inc jan jr jul jun lt maj mar messrs mr mrs ms nos nov
oct pres prof rep rev sec sen sept sgt sr st viz vol vs
"""
_ABBREVIATIONS = frozenset(_ABBREVIATIONS_TEXT.split())
# What lies behind ends each search at the first letter or mark of a row: from the others it would take its square.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z]|\s*$)")
_FINAL_WORD = re.compile(r"(?<![A-Za-z])([A-Za-z]+)[.!?]+[\"'”’)]*$")
_FINAL_MARK = re.compile(r"[.!?][\"'”’)\]]*$")
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class LastWordItem:
    """One item.

    Args:
        id: the document's id, `#` and the number of the final sentence in the document.
        document: the document's id.
        group: of the document.
        context: the passage without its last word, single spaces only, no space at its end.
        target: the last word as written, without punctuation.
    """

    id: str
    document: str
    group: str
    context: str
    target: str


def build_items(
    documents: Sequence[Document],
    max_items: int | None = None,
    seed: int = 0,
) -> list[LastWordItem]:
    """Build last-word items.

    A passage is whole sentences of one document, 40 to 110 words with the target, at least one of them before the
    final one; it reaches back as far as fits, but not over a heading. The target has at least four letters, is no
    function word, occurs as a word in the sentences before the final one (whatever its case) and not in the rest of the
    final one. Passages do not overlap, so items share no text. With `max_items` the documents take turns.

    Args:
        documents: held-out documents, in any order.
        max_items: at most so many; None for all.
        seed: seed of the choice.

    Returns:
        Items sorted by document and position.

    Raises:
        PreskipError: the documents give no item.
    """
    ranked: list[tuple[int, bytes, int, LastWordItem]] = []
    for document in documents:
        for rank, (position, item) in enumerate(_document_items(document, seed)):
            ranked.append((rank, _draw(seed, document.id), position, item))
    if not ranked:
        raise PreskipError(
            "the held-out documents give no last-word item: they need prose with passages of "
            f"{SHORTEST_PASSAGE} to {LONGEST_PASSAGE} words; hold out more text or leave out last-word accuracy"
        )
    chosen = sorted(ranked, key=lambda entry: entry[:3])[:max_items]
    return [item for *_, item in sorted(chosen, key=lambda entry: (entry[3].document, entry[2]))]


def encode_item(item: LastWordItem, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of an item's context and of its target; their concatenation is the passage tokenised as one text.

    The target carries its leading space. The start token is there only where the tokenizer itself puts one before a
    text.

    Raises:
        PreskipError: no token border lies before the target.
    """
    text = f"{item.context} {item.target}"
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        cut = next((index for index, (_, end) in enumerate(offsets) if end > len(item.context)), len(ids))
        is_border = 0 < cut < len(ids) and offsets[cut][0] >= len(item.context)
    else:  # without offsets: there is a border where the context alone gives the same tokens
        ids, before = text_ids(text, tokenizer), text_ids(item.context, tokenizer)
        cut = len(before)
        is_border = 0 < cut < len(ids) and ids[:cut] == before
    if not is_border:
        raise PreskipError(
            f"last-word item {item.id}: this tokenizer has no token border before {item.target!r}; "
            f"leave out last-word accuracy for this model"
        )
    opening = opening_token(tokenizer)
    return [*([] if opening is None else [opening]), *ids[:cut]], ids[cut:]


def split_sentences(text: str) -> list[str]:
    """Split prose into sentences; single spaces inside, abbreviations, initials and paragraph borders respected.

    A paragraph border always ends a sentence; a heading therefore counts as a sentence without a final mark.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n|\n", text):
        flat = " ".join(paragraph.split())
        begin = 0
        for match in _SENTENCE_END.finditer(flat):
            if match.group().startswith(".") and match.end() < len(flat) and _is_abbreviation(flat, match.start()):
                continue
            sentences.append(flat[begin : match.end()].strip())
            begin = match.end()
        if rest := flat[begin:].strip():
            sentences.append(rest)
    return sentences


def _is_abbreviation(text: str, stop: int) -> bool:
    word = text[text.rfind(" ", 0, stop) + 1 : stop].strip("\"'“‘([").lower()
    # Single letters are initials, and inner stops mark "U.S." and the like.
    return len(word) == 1 or "." in word or word in _ABBREVIATIONS


def _document_items(document: Document, seed: int) -> list[tuple[int, LastWordItem]]:
    """The items of a document that do not overlap, as (number of the final sentence, item), in drawn order."""
    sentences = split_sentences(document.text)
    lengths = [len(sentence.split()) for sentence in sentences]
    is_whole = [_FINAL_MARK.search(sentence) is not None for sentence in sentences]  # headings and salutations are not
    words = [[word.lower() for word in _WORD.findall(sentence)] for sentence in sentences]
    candidates = []
    for last, sentence in enumerate(sentences):
        match = _FINAL_WORD.search(sentence)
        if match is None or not words[last]:
            continue
        target = match.group(1)
        key = target.lower()
        is_part = match.start() == 0 or sentence[match.start() - 1] != " "  # of a compound such as "well-being"
        if is_part or len(target) < SHORTEST_TARGET or key in STOP_WORDS or key in words[last][:-1]:
            continue
        first, length = last, lengths[last]
        while first > 0 and is_whole[first - 1] and length + lengths[first - 1] <= LONGEST_PASSAGE:
            first -= 1
            length += lengths[first]
        if not SHORTEST_PASSAGE <= length <= LONGEST_PASSAGE or not any(key in before for before in words[first:last]):
            continue
        context = " ".join([*sentences[first:last], sentence[: match.start()].rstrip()])
        group = document.piece_of or document.group
        item = LastWordItem(f"{document.id}#{last}", document.id, group, context, target)
        candidates.append((first, last, item))
    candidates.sort(key=lambda candidate: _draw(seed, candidate[2].id))
    taken: list[tuple[int, int]] = []
    items = []
    for first, last, item in candidates:
        if all(last < other_first or first > other_last for other_first, other_last in taken):
            taken.append((first, last))
            items.append((last, item))
    return items


def _draw(seed: int, text: str) -> bytes:
    """A pseudo-random rank that depends on nothing but the seed and the text."""
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()
