"""What every arm is scored on: held-out documents, last words, lm-eval tasks and the paper's own items, as tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from preskip.data.blocks import Window
from preskip.data.corpus import Document
from preskip.data.last_word import LAST_WORD, LastWordItem, build_items
from preskip.data.local import LAMBADA_DEVELOPMENT, data_directory, lambada_development
from preskip.data.splits import Splits, choose, load_splits, locate, slug
from preskip.data.tables import Limit
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import last_word_records, last_word_windows, score_sequences, shared_groups
from preskip.evaluate.paper import LENGTH, PaperData, PaperItems, encode_paper_items, load_paper_data, paper_scores
from preskip.evaluate.texts import TextSet, prepare_texts, score_texts
from preskip.experiment.measured import measured
from preskip.experiment.parse import parse_extent
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig
from preskip.progress import progress_bar, say
from preskip.runs.schema import Domain, Record, SetFacts

if TYPE_CHECKING:
    from preskip.evaluate.tasks import TaskSuite

Config = ProbeConfig | PretrainConfig
# Tokens of an item whose windows are not at hand, about those of a passage of LAMBADA.
ITEM_TOKENS = 100
# Sets of lm-eval and of the paper's protocol that are WikiText, in-domain where that is trained on.
WIKITEXT_SETS = {"wikitext", "paper:wikitext"}


class Scored(NamedTuple):
    """A corpus of which `documents` held-out documents of `words` words are scored; `domain` is "in" or "out"."""

    splits: Splits
    documents: int
    words: int
    domain: Domain


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What every arm is evaluated on, tokenised once.

    Attributes:
        texts: document sets, the in-domain one first.
        items: last-word items.
        item_windows: the window of each.
        suite: lm-eval tasks, or None.
        paper: what the paper's own protocol scores, or None.
        development: document sets to choose learning rates on, the in-domain one first.
        sets: the evaluation sets as run.json describes them.
    """

    texts: list[TextSet]
    items: list[LastWordItem] = field(default_factory=list)
    item_windows: list[Window] = field(default_factory=list)
    suite: TaskSuite | None = None
    paper: PaperItems | None = None
    development: list[TextSet] = field(default_factory=list)
    sets: dict[str, SetFacts] = field(default_factory=dict)

    @property
    def scored_tokens(self) -> int:
        """Tokens that are read to score a model, about: the windows of tasks are not at hand."""
        windows = [window for text in self.texts for window in text.windows] + self.item_windows
        windows += self.paper.windows if self.paper else []
        return sum(len(window.input_ids) for window in windows) + ITEM_TOKENS * (self.suite.size if self.suite else 0)

    @property
    def development_tokens(self) -> int:
        """Tokens that are read to choose a learning rate."""
        return sum(len(window.input_ids) for text in self.development for window in text.windows)

    def in_clusters(self, records: Sequence[Record]) -> list[Record]:
        """Stored records with the clusters that `score` gives: an earlier preskip left some out, or gave others."""
        clusters: dict[Any, str | None] = {(LAST_WORD, item.id): item.group for item in self.items}
        for text in self.texts:
            for document, label in zip(text.documents, shared_groups(text.documents), strict=True):
                clusters[text.name, document.id] = label
        found: list[Any] = []
        for record in records:
            label = clusters.get((record.get("set"), record.get("id")), record.get("cluster"))
            found.append(record if label == record.get("cluster") else {**record, "cluster": label})
        return found

    def score(
        self,
        model: nn.Module,
        tokenizer: Any,
        label: str,
        *,
        batch_tokens: int | None,
        quiet: bool,
        notes: list[str] | None = None,
    ) -> list[Record]:
        """One record per document and item of every evaluation set.

        Where `notes` are given, tasks that fail are noted there and left out, and the rest is kept.
        """
        texts, items = sum(len(text.windows) for text in self.texts), len(self.item_windows)
        tasks, paper = self.suite.size if self.suite else 0, len(self.paper.windows) if self.paper else 0

        def behind(before: int) -> dict[str, Any]:
            """Options of a scoring whose progress follows that of the sequences before it."""
            return {"batch_tokens": batch_tokens, "advance": lambda count, note="": advance(before + count, note)}

        with progress_bar(f"evaluate {label}", texts + items + tasks + paper, quiet=quiet) as advance:
            records = score_texts(model, self.texts, tokenizer, keep_failed=True, **behind(0))
            if self.items:
                with measured(notes, "last words"):
                    scores = score_sequences(model, self.item_windows, keep_failed=True, **behind(texts))
                    records += last_word_records(LAST_WORD, self.items, scores)
            if self.suite is not None:
                with measured(notes, "tasks"):
                    records += self.suite.score(model, **behind(texts + items))
            if self.paper is not None:
                with measured(notes, "scores by the paper's protocol"):
                    records += paper_scores(model, self.paper, **behind(texts + items + tasks))
        return records


def local_data(config: Config, directory: Path) -> Path | None:
    """The folder with local data of a run that was started in `directory`, or None."""
    return data_directory(locate(config.data_dir, directory) if config.data_dir else None)


def load_corpora(
    config: Config, directory: Path, quiet: bool, *, limit: Limit | None = None, reserved: Sequence[str] = ()
) -> list[Scored]:
    """The training corpus, then the others, each with the number of documents and words to score.

    Args:
        config: every option.
        directory: the run was started in.
        quiet: no progress.
        limit: of the training corpus.
        reserved: names of other evaluation sets.

    Raises:
        PreskipError: a corpus that cannot be read or has too few documents, or two sets of one name.
    """
    options: dict[str, Any] = {
        "data_dir": local_data(config, directory),
        "heldout_fraction": config.heldout_fraction,
        "seed": config.split_seed,
        "progress": not quiet,
    }
    own: dict[str, Any] = {"text_column": config.text_column, "split": config.corpus_split, "limit": limit}
    other: dict[str, Any] = {"text_column": config.eval_text_column, "split": config.eval_corpus_split}
    given: dict[str, tuple[int, int]] = {}
    for text in config.eval_corpora:
        name, documents, words = parse_extent(text, config.eval_documents, config.eval_words)
        if given.setdefault(name, (documents, words)) != (documents, words):
            raise PreskipError(f"--eval-corpora names {name} twice: leave one out")
    extents = {config.corpus: (config.eval_documents, config.eval_words), **given}
    scored = []
    for name, (documents, words) in extents.items():
        is_trained_on = name == config.corpus
        try:
            splits = load_splits(locate(name, directory), **options, **(own if is_trained_on else other))
        except PreskipError as error:
            if is_trained_on:
                raise
            text = str(error).replace("--text-column", "--eval-text-column")
            raise PreskipError(text.replace("--corpus-split", "--eval-corpus-split")) from None
        scored.append(Scored(splits, documents, words, "in" if is_trained_on else "out"))
    require(config, "held-out", scored[0].splits.heldout, 2)
    names = [*(slug(text.splits.name) for text in scored), *reserved]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PreskipError(f"two evaluation sets are named {twice!r}: rename a file, or leave one out")
    return _apart(scored, quiet)


def _apart(scored: Sequence[Scored], quiet: bool) -> list[Scored]:
    """The corpora without the documents that another uses otherwise: `books24` holds out books that `books` trains on.

    The first corpus stays as it is. Nothing that it trains or chooses rates on is held out of another, no rate is
    chosen on what is held out of any, and no other corpus's training text, which `--keep-weight` reads, is scored or
    chosen on. Documents are identified by their whole text: the same passage cut elsewhere is another document.
    """
    in_domain, *others = scored
    trained = _texts(in_domain.splits.training)
    used = trained | _texts(in_domain.splits.development)
    held = [_without(other, "heldout", used) for other in others]
    for before, after in zip(others, held, strict=True):
        if left_out := len(before.splits.heldout) - len(after.splits.heldout):
            say(
                f"{after.splits.name}: {left_out} held-out documents are left out, {in_domain.splits.name} trains or "
                "chooses rates on them",
                quiet=quiet,
            )
    final = set[str]().union(*(_texts(one.splits.heldout) for one in (in_domain, *held)))
    chosen = [_without(other, "development", final | trained) for other in held]
    unread = final.union(*(_texts(one.splits.development) for one in (in_domain, *chosen)))
    return [in_domain, *(_without(other, "training", unread) for other in chosen)]


def _texts(documents: Iterable[Document]) -> set[str]:
    return {document.text for document in documents}


def _without(scored: Scored, part: str, texts: Collection[str]) -> Scored:
    kept: Any = [document for document in getattr(scored.splits, part) if document.text not in texts]
    return scored._replace(splits=replace(scored.splits, **{part: kept}))


def require(config: Config, part: str, documents: Sequence[Document], least: int) -> None:
    """Refuse a training corpus whose `part` has fewer than `least` documents (an interval takes 2)."""
    if len(documents) < least:
        count = f"{len(documents)} {part} document{'s' * (len(documents) != 1)}"
        change = "raise" if part == "held-out" else "lower"  # the others share what is not held out
        raise PreskipError(
            f"corpus {config.corpus} has {count}, {least} or more are needed: {change} --heldout-fraction, or give "
            "more documents"
        )


def prepare_documents(
    config: Config, corpora: Sequence[Scored], tokenizer: Any, context_length: int, *, reopen: bool
) -> HeldOut:
    """Choose and tokenise the held-out documents of every corpus; `reopen` is as of `prepare_texts`."""
    texts: list[TextSet] = []
    sets: dict[str, SetFacts] = {}
    for splits, count, words, domain in corpora:
        documents = choose(splits.heldout, count, words, config.split_seed)
        text = prepare_texts(slug(splits.name), documents, tokenizer, context_length=context_length, reopen=reopen)
        if len(text.documents) < 2:
            raise PreskipError(
                f"corpus {splits.name} has {len(text.documents)} held-out document(s) with tokens to score, 2 are "
                "needed: give more text"
            )
        texts.append(text)
        title = f"{text.name}, held-out documents"
        sets[text.name] = text.describe(
            tokenizer, domain=domain, title=title, source=splits.source, sha256=splits.sha256
        )
    return HeldOut(texts=texts, sets=sets)


def prepare_heldout(
    config: ProbeConfig,
    corpora: Sequence[Scored],
    tokenizer: Any,
    limit: int | None,
    data_dir: Path | None,
    quiet: bool = True,
) -> HeldOut:
    """Choose and tokenise all that a frozen model is scored on, and what its learning rates are chosen on.

    Args:
        config: every option.
        corpora: the training corpus first.
        tokenizer: of the base.
        limit: the model's context, in tokens; longer items are left out.
        data_dir: the folder of local data, or None.
        quiet: do not report what is left out.

    Raises:
        PreskipError: too little text, or a task that is unavailable.
    """
    in_domain = corpora[0].splits
    documents = prepare_documents(config, corpora, tokenizer, config.context_length, reopen=True)
    sets = documents.sets
    paper_data = load_paper_data(data_dir) if config.paper_scoring else None
    development: list[TextSet] = []
    if config.lr_mode == "tune":
        development = _development(config, corpora, tokenizer, data_dir, paper_data)
    items: list[LastWordItem] = []
    item_windows: list[Window] = []
    if config.last_word_items:
        items, item_windows = _last_words(config, in_domain.heldout, tokenizer, limit, quiet)
    if items:
        sets[LAST_WORD] = {
            "kind": "item",
            "domain": "in",
            "title": f"last word ({config.corpus.upper() if config.corpus.isidentifier() else config.corpus})",
            "source": in_domain.source,
            "sha256": in_domain.sha256,
            "context_length": limit,
            "stride": None,
            "items": len(items),
            "clusters": len({item.group for item in items}),
            "primary": "acc",
        }
    suite = None
    if config.tasks:
        from preskip.evaluate.tasks import TaskSuite

        suite = TaskSuite(
            config.tasks,
            tokenizer,
            data_dir=data_dir,
            limit=config.task_limit,
            seed=config.split_seed,
            context_length=limit,
            settings=config.task_settings,
        )
        sets |= suite.sets
    paper = None
    if paper_data is not None:
        paper = encode_paper_items(paper_data, tokenizer, context_length=min(limit or LENGTH, LENGTH))
        sets |= paper.sets
    if "wikitext" in slug(in_domain.name).lower():  # of a path the last part alone
        for name in WIKITEXT_SETS & sets.keys():
            sets[name] = {**sets[name], "domain": "in"}
    return replace(documents, items=items, item_windows=item_windows, suite=suite, paper=paper, development=development)


def _development(
    config: ProbeConfig,
    corpora: Sequence[Scored],
    tokenizer: Any,
    data_dir: Path | None,
    paper_data: PaperData | None,
) -> list[TextSet]:
    """The texts that learning rates are chosen on: none that is scored, the in-domain ones first."""
    has_lambada = "lambada_openai" in config.tasks and data_dir and (data_dir / LAMBADA_DEVELOPMENT).is_file()
    if config.lr_rule == "frontier" and len(corpora) < 2 and not has_lambada:
        raise PreskipError("--lr-rule frontier needs out-of-domain text to choose on: give --eval-corpora")
    unseen: dict[str, Sequence[Document]] = {}
    for splits, *_ in corpora:
        texts = paper_data.without_scored(splits.development) if paper_data else splits.development
        if len(texts) < 2:
            raise PreskipError(
                f"corpus {splits.name} has {len(texts)} documents to choose a learning rate on, 2 are needed: "
                "give more text, or a fixed --lr"
            )
        unseen[splits.name] = texts
    if has_lambada and data_dir:
        unseen["lambada_development"] = lambada_development(data_dir)
    extent = config.development_documents, config.development_words, config.split_seed
    return [
        prepare_texts(slug(name), choose(texts, *extent), tokenizer, context_length=config.context_length)
        for name, texts in unseen.items()
    ]


def _last_words(
    config: ProbeConfig, documents: Sequence[Document], tokenizer: Any, limit: int | None, quiet: bool
) -> tuple[list[LastWordItem], list[Window]]:
    try:
        items = build_items(documents, config.last_word_items, config.split_seed)
    except PreskipError as error:
        raise PreskipError(f"{error} (--last-word-items 0)") from None
    items, windows, left = last_word_windows(items, tokenizer, limit)
    few = len({item.document for item in items}) < 2
    if few and not left:
        raise PreskipError(
            "the last-word items come from fewer than 2 held-out documents: give more text or leave them "
            "out (--last-word-items 0)"
        )
    if left:
        what = "last words are not scored, " if few else ""
        say(f"{what}{len(left)} of {len(left) + len(items)} last-word items are left out: {left[0]}", quiet=quiet)
    return ([], []) if few else (items, windows)
