"""The paper's own scoring, for reading its table beside the standard scoring: four sets, four columns.

Shinde, "Position-Agnostic Pre-Projection for Transformer Attention" (arXiv 2604.10791). Where the text is silent, what
its published code does counts (github.com/cs-cmyk/preprojection, 07_benchmarks.py):

* LAMBADA: the first 500 items of the OpenAI version. The context is everything before the last space, the target the
  rest; the two are tokenised apart. Right if each target token is the most likely one. Above 512 tokens: left out.
* HellaSwag and ARC-Easy: the first 500 validation items. The prompt is the bare context or question, one space, and
  the ending: no activity label, no "Question:", no cleaning. Scored from the token at which the context alone would
  end; the largest mean log-likelihood per token wins, the first of equals. Cut to 512 tokens.
* "PPL": of the first 300 *rows* of WikiText-103 validation those of 50 characters and 10 tokens or more, which are
  about 150 paragraphs of 5 articles; each cut to 512 tokens and read without a start token, so its first token is not
  scored. The figure is exp(mean over paragraphs of the mean nats per token): a paragraph of 10 tokens weighs as much as
  one of 500, which is why it compares with no other perplexity. It is called the paper's "PPL" everywhere here.

Three things differ. Log-likelihoods are taken in fp32 from the logits, where the paper's code takes those of HellaSwag
and ARC-Easy in bf16 (at 3 nats a step of 0.016). Items that leave nothing to score are left out. And where the rows
come from a data directory, HellaSwag is a published sample of the validation set with bracketed cues removed, and
WikiText is the version with `<unk>`, unless wiki.valid.raw is there, too: figures then compare between arms, not with
the paper's table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from preskip.assets import file_sha256
from preskip.data.blocks import Window
from preskip.data.corpus import Document
from preskip.data.local import CUE, data_directory, load_local
from preskip.data.rows import read_text
from preskip.data.wikitext import page_title
from preskip.errors import PreskipError, explained, one_line
from preskip.evaluate.likelihood import FAILED, Score, say_failed, score_sequences
from preskip.progress import Advance, no_progress
from preskip.runs.schema import ItemRecord, Record, SetFacts

ITEMS = 500
ROWS = 300
LENGTH = 512
SHORTEST_CHARACTERS = 50
SHORTEST_TOKENS = 10

# The columns of the paper's table, and what is said of each behind the name of its data.
COLUMNS = {
    "paper:lambada": "the paper's scoring",
    "paper:hellaswag": "the paper's scoring",
    "paper:arc_easy": "the paper's scoring",
    "paper:wikitext": 'nats per token by paragraph; exp of the mean is the paper\'s "PPL"',
}
WIKITEXT_FILES = ("wikitext2/wiki.valid.raw", "wikitext2/wiki.valid.tokens")


class Question(NamedTuple):
    """One multiple-choice item: a prompt, its possible endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class PaperData:
    """The rows that the paper scores.

    Attributes:
        lambada: passages whose last word is the target.
        hellaswag, arc_easy: questions.
        wikitext: rows as the data set has them, each with its line end; empty ones included.
        sources: per set of `COLUMNS` its "title", "source" and "sha256" (None from the Hub).
    """

    lambada: Sequence[str]
    hellaswag: Sequence[Question]
    arc_easy: Sequence[Question]
    wikitext: Sequence[str]
    sources: Mapping[str, Mapping[str, Any]]

    def without_scored(self, documents: Sequence[Document]) -> list[Document]:
        """Documents that share no scored paragraph: WikiText's validation text is also development text."""
        scored = {row.strip() for row in self.wikitext if len(row.strip()) >= SHORTEST_CHARACTERS}
        return [document for document in documents if scored.isdisjoint(map(str.strip, document.text.split("\n")))]


class _Item(NamedTuple):
    set: str
    id: str
    cluster: str | None
    sequences: int  # one, or one per choice
    gold: int


@dataclass(frozen=True, kw_only=True)
class PaperItems:
    """The paper's items as token sequences, made once and scored for every arm.

    Attributes:
        windows: all sequences; their number is what `paper_scores` reports to `advance`.
        items: what they belong to, in the same order.
        sets: the evaluation sets as run.json describes them.
    """

    windows: list[Window]
    items: list[_Item]
    sets: dict[str, SetFacts]


def load_paper_data(data_dir: Path | str | None = None, *, items: int = ITEMS, rows: int = ROWS) -> PaperData:
    """Get the rows from the data directory where it has them, else from the Hub.

    Args:
        data_dir: see `preskip.data.local.data_directory`.
        items: of LAMBADA, HellaSwag and ARC-Easy, the first so many.
        rows: of WikiText, the first so many.

    Raises:
        PreskipError: a set is in neither place, or a file is not in the expected form.
    """
    directory = data_directory(data_dir)
    tasks = ("lambada_openai", "hellaswag", "arc_easy")
    found = [_task_rows(task, directory, items, _HUB[name]) for task, name in zip(tasks, COLUMNS, strict=False)]
    found.append(_wikitext_rows(directory, rows))
    lambada, hellaswag, arc_easy, wikitext = (own for own, _ in found)
    return PaperData(
        lambada=[row["text"] for row in lambada],
        hellaswag=[_hellaswag(row) for row in hellaswag],
        arc_easy=[_arc_easy(row) for row in arc_easy],
        wikitext=[row["text"] for row in wikitext],
        sources=dict(zip(COLUMNS, (source for _, source in found), strict=True)),
    )


def encode_paper_items(data: PaperData, tokenizer: Any, *, context_length: int = LENGTH) -> PaperItems:
    """Tokenise the rows; a context length below the paper's 512 is for a model that reads fewer tokens.

    Raises:
        PreskipError: no item of a set is left.
    """
    windows: list[Window] = []
    items: list[_Item] = []

    def add(set: str, id: str, sequences: list[Window] | None, cluster: str | None = None, gold: int = 0) -> None:
        if sequences:
            windows.extend(sequences)
            items.append(_Item(set, id, cluster, len(sequences), gold))

    for index, text in enumerate(data.lambada):
        add("paper:lambada", f"lambada_openai#{index}", _lambada_window(text, tokenizer, context_length))
    for name, questions in (("hellaswag", data.hellaswag), ("arc_easy", data.arc_easy)):
        for index, question in enumerate(questions):
            sequences = _choice_windows(question, tokenizer, context_length)
            add(f"paper:{name}", f"{name}#{index}", sequences, gold=question.gold)
    article = 0
    for index, row in enumerate(data.wikitext):
        article += page_title(row.strip("\n")) is not None
        if len(row.strip()) < SHORTEST_CHARACTERS:
            continue
        ids = _ids(row, tokenizer)[:context_length]
        if len(ids) >= SHORTEST_TOKENS:
            add("paper:wikitext", f"wikitext#{index}", [Window(ids, 1)], cluster=f"article#{article}")
    for name in COLUMNS:
        if not any(item.set == name for item in items):
            raise PreskipError(f"{name}: none of its rows can be scored: give the whole data set")
    if len({item.cluster for item in items if item.cluster}) < 2:  # nothing to resample by
        items = [item._replace(cluster=None) for item in items]
    return PaperItems(windows=windows, items=items, sets=_sets(data, items, context_length))


def paper_scores(
    model: nn.Module, items: PaperItems, *, batch_tokens: int | None = None, advance: Advance = no_progress
) -> list[Record]:
    """Score a model as the paper does: one record per item; `paper_columns` reads the paper's table off them.

    An item whose log-likelihood is not finite is named (`failed`), and the others are kept. The arguments besides the
    items, and the errors, are those of `score_sequences`.
    """
    scores = iter(score_sequences(model, items.windows, batch_tokens=batch_tokens, advance=advance, keep_failed=True))
    records: list[Record] = []
    for item in items.items:
        own = [next(scores) for _ in range(item.sequences)]
        record: ItemRecord = {"set": item.set, "kind": "item", "id": item.id, "cluster": item.cluster, "scores": {}}
        if any(math.isnan(score.nll) for score in own):
            record["failed"] = FAILED
        else:
            record["scores"] = _item_scores(item, own)
        records.append(record)
    say_failed(records)
    return records


def paper_columns(records: Iterable[Record]) -> dict[str, float]:
    """The columns of the paper's table from item records, also from stored ones; records of other sets are passed over.

    Returns:
        By set of `COLUMNS`, in their order: an accuracy as a share, for "paper:wikitext" the paper's "PPL".
    """
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] == "item" and record["set"] in COLUMNS and "failed" not in record:
            values[record["set"]].append(record["scores"]["nll" if record["set"] == "paper:wikitext" else "acc"])
    means = {name: sum(values[name]) / len(values[name]) for name in COLUMNS if name in values}
    return {name: math.exp(mean) if name == "paper:wikitext" else mean for name, mean in means.items()}


def _item_scores(item: _Item, own: Sequence[Score]) -> dict[str, float]:
    if item.set == "paper:lambada":
        return {"acc": float(own[0].greedy), "nll": own[0].nll}
    means = [score.nll / score.tokens for score in own]
    if item.set == "paper:wikitext":
        return {"nll": means[0]}
    return {"acc": float(means.index(min(means)) == item.gold)}


def _lambada_window(text: str, tokenizer: Any, context_length: int) -> list[Window] | None:
    context, space, word = text.rpartition(" ")
    ids = _ids(context, tokenizer)
    target = list(tokenizer(space + word, add_special_tokens=False, verbose=False)["input_ids"])
    if not space or not ids or not target or len(ids) + len(target) > context_length:
        return None
    return [Window(ids + target, len(ids))]


def _choice_windows(question: Question, tokenizer: Any, context_length: int) -> list[Window] | None:
    start = len(_ids(question.context, tokenizer))
    sequences = [
        Window(_ids(f"{question.context} {ending}", tokenizer)[:context_length], start) for ending in question.endings
    ]
    # A context that fills the cut leaves no token of the ending; without a context there is none to predict from.
    return sequences if start and all(len(window.input_ids) > start for window in sequences) else None


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids with the special tokens that the tokenizer itself puts around a text (Pythia: none)."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _sets(data: PaperData, items: Sequence[_Item], context_length: int) -> dict[str, SetFacts]:
    return {
        name: {
            "kind": "item",
            "domain": "out",
            "title": f"{data.sources[name]['title']}, {title}",
            "source": data.sources[name]["source"],
            "sha256": data.sources[name]["sha256"],
            "context_length": context_length,
            "stride": None,
            "items": sum(item.set == name for item in items),
            "primary": "nll" if name == "paper:wikitext" else "acc",
        }
        for name, title in COLUMNS.items()
    }


_Rows = tuple[list[dict[str, Any]], dict[str, Any]]  # and their "title", "source" and "sha256"
_Hub = tuple[str, str | None, str, str]  # data set, configuration, split and title
_HUB: dict[str, _Hub] = {
    "paper:lambada": ("EleutherAI/lambada_openai", "en", "test", "LAMBADA, OpenAI version"),
    "paper:hellaswag": ("Rowan/hellaswag", None, "validation", "HellaSwag validation"),
    "paper:arc_easy": ("allenai/ai2_arc", "ARC-Easy", "validation", "ARC-Easy validation"),
    "paper:wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", "WikiText-103 raw validation"),
}


def _task_rows(task: str, directory: Path | None, count: int, hub: _Hub) -> _Rows:
    local = load_local(task, directory)
    _, _, split, title = hub
    if local is None or split not in local.splits:
        return _hub_rows(hub, count)
    title = local.name if task != "arc_easy" else title  # the local set is named for its test split
    rows = local.splits[split][:count]
    if task == "hellaswag":  # the cue that stands in for the published sample's is for lm-eval to remove
        rows = [{**row, "endings": [text.removeprefix(CUE).strip() for text in row["endings"]]} for row in rows]
    return rows, {"title": title, "source": ", ".join(local.files), "sha256": local.sha256}


def _wikitext_rows(directory: Path | None, count: int) -> _Rows:
    for name in WIKITEXT_FILES:
        if directory is not None and (directory / name).is_file():
            rows = [{"text": line + "\n"} for line in read_text(directory / name).split("\n")[:count]]
            title = "WikiText validation" + ("" if name.endswith(".raw") else " with <unk>")
            return rows, {"title": title, "source": name, "sha256": file_sha256(directory / name)}
    return _hub_rows(_HUB["paper:wikitext"], count)


def _hub_rows(hub: _Hub, count: int) -> _Rows:
    import datasets

    repository, config, split, title = hub
    load: Callable[..., Any] = datasets.load_dataset
    with explained(
        lambda error: (
            f"{title} is neither in the data directory nor to be had from the Hub ({type(error).__name__}: "
            f"{one_line(error, 120)}): go online, or give --data-dir"
        )
    ):
        rows = list(islice(load(repository, config, split=split, streaming=True), count))
    name = repository if config is None else f"{repository} ({config})"
    return rows, {"title": title, "source": f"Hugging Face data set {name}, split {split}", "sha256": None}


def _hellaswag(row: Mapping[str, Any]) -> Question:
    context = row["ctx"] if "ctx" in row else f"{row['ctx_a']} {row['ctx_b']}".rstrip()
    return Question(context, tuple(row["endings"]), int(row["label"]))


def _arc_easy(row: Mapping[str, Any]) -> Question:
    choices = row["choices"]
    return Question(row["question"], tuple(choices["text"]), list(choices["label"]).index(row["answerKey"]))
