"""What all cells of a run share, prepared once: the model, the texts as tokens, and what is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from preskip.arms import Arm, ArmContext, attention_paths, branch_parameters, insert, resolve_arms
from preskip.assets import load_model, load_tokenizer, resolve_model
from preskip.data.blocks import Window, pack_blocks
from preskip.data.corpus import Document
from preskip.data.last_word import LastWordItem, build_items
from preskip.data.local import LAMBADA_DEVELOPMENT, data_directory, lambada_development
from preskip.data.recorded import locate
from preskip.data.splits import Splits, choose, load_splits, slug
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import check_causal, last_word_windows
from preskip.evaluate.paper import COLUMNS, LENGTH, PaperItems, encode_paper_items, load_paper_data
from preskip.evaluate.published import recognise_published
from preskip.evaluate.texts import TextSet, prepare_texts
from preskip.experiment.parse import parse_extent
from preskip.experiment.probe_options import ProbeConfig
from preskip.progress import progress_display, spinner
from preskip.runs import environment
from preskip.stats import ALPHA, DEFAULT_MARGINS
from preskip.train.distributed import Crew

if TYPE_CHECKING:
    from preskip.evaluate.tasks import TaskSuite

# Training text is shuffled in pieces of about this many characters, so that a short training sees many documents.
PIECE_CHARACTERS = 4000
LAST_WORD = "last_word"
# Sets of lm-eval and of the paper's protocol that are WikiText, at home where that is trained on.
WIKITEXT_SETS = {"wikitext", "paper:wikitext"}
# What the reference arm is declared against.
DECISIVE = ("none", "lora", "parallel")


class Scored(NamedTuple):
    """A corpus of which `documents` held-out documents of `words` words are scored; `domain` is "in" or "out"."""

    splits: Splits
    documents: int
    words: int
    domain: str


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What every arm is evaluated on, tokenised once.

    Attributes:
        texts: document sets, the in-domain one first.
        items: last-word items, and the windows of each.
        suite: lm-eval tasks, or None.
        paper: what the paper's own protocol scores, or None.
        development: document sets to choose learning rates on, the in-domain one first.
        sets: the evaluation sets as run.json describes them.
    """

    texts: list[TextSet]
    items: list[LastWordItem]
    item_windows: list[Window]
    suite: TaskSuite | None
    paper: PaperItems | None
    development: list[TextSet]
    sets: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything the cells of a run share.

    Attributes:
        config: every option.
        model_name: what `preskip.assets.load_model` calls the base from here.
        base: the untouched model.
        tokenizer: its tokenizer.
        context: what arms depend on.
        blocks: gives the training blocks [N, seq_len] of a seed, the same for every arm.
        heldout: what is scored.
        quiet: no progress.
        rates: peak learning rate by arm, as given, default or found.
        crew: the processes that train together.
    """

    config: ProbeConfig
    model_name: str
    base: nn.Module
    tokenizer: Any
    context: ArmContext
    blocks: Callable[[int], np.ndarray]
    heldout: HeldOut
    quiet: bool
    rates: dict[str, float | None] = field(default_factory=dict)
    crew: Crew = field(default_factory=Crew)


def prepare(
    config: ProbeConfig, directory: Path, quiet: bool, crew: Crew | None = None
) -> tuple[Bench, dict[str, Any]]:
    """Load and tokenise what a run needs.

    Args:
        config: every option.
        directory: where the run was started; relative paths that do not exist here are taken from there.
        quiet: no progress.
        crew: the processes that train together; None for this one alone.

    Returns:
        The bench, and the facts for run.json.

    Raises:
        PreskipError: anything that would fail later: model, corpora, budgets of all arms, sizes, tasks.
    """
    data_dir = data_directory(locate(config.data_dir, directory) if config.data_dir else None)
    corpora = _corpora(config, data_dir, directory, quiet)
    splits = corpora[0].splits
    model_name = locate(config.model, directory)
    source = resolve_model(model_name)
    with spinner(f"loading {config.model}", quiet=quiet):
        tokenizer = load_tokenizer(model_name, trust_remote_code=config.trust_remote_code)
        base = load_model(
            model_name,
            dtype=getattr(torch, config.dtype),
            device=config.device,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    check_causal(base)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max(config.seq_len, config.context_length)
    if limit is not None and longest > limit:
        raise PreskipError(f"{longest} tokens exceed the model's context of {limit}: lower --seq-len/--context-length")
    context = _context(config, base)
    arms = resolve_arms(config.arms)
    described = {arm.name: _arm_facts(arm, context, config) for arm in arms}
    with spinner("preparing the held-out texts", quiet=quiet):
        heldout = _heldout(config, corpora, tokenizer, limit, data_dir)
    blocks_of = _training_blocks(config, splits, tokenizer, quiet)
    bench = Bench(
        config=config,
        model_name=model_name,
        base=base,
        tokenizer=tokenizer,
        context=context,
        blocks=blocks_of,
        heldout=heldout,
        quiet=quiet,
        rates={arm.name: config.learning_rate(arm.name) for arm in arms},
        crew=crew or Crew(),
    )
    blocks = blocks_of(config.seeds[0])
    wanted = config.steps * config.batch_size * config.seq_len
    facts = {
        "model": {
            "name": config.model,
            "type": base.config.model_type,
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "layers": base.config.get_text_config().num_hidden_layers,
            "hidden_size": base.config.get_text_config().hidden_size,
            "dtype": config.dtype,
            "attn_implementation": base.config._attn_implementation,
            "source": source.source,
            "sha256": source.sha256,
            "revision": source.revision,
        },
        "corpus": {
            "name": config.corpus,
            "training_documents": len(splits.training),
            "training_tokens": int(blocks.size),
            "training_passes": round(wanted / blocks.size, 2),
            "development_documents": len(splits.development),
            "heldout_documents": len(splits.heldout),
            "source": splits.source,
            "sha256": splits.sha256,
        },
        "environment": environment.describe(config.device),
        "arms": described,
        "seeds": list(config.seeds),
        "sets": heldout.sets,
        "family": declare_family([arm.name for arm in arms], heldout.sets),
        "published": recognise_published(config.model, base.config),
    }
    return bench, facts


def declare_family(arms: Sequence[str], sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The comparisons that a run declares before training: the reference arm against the decisive others, on each set.

    The reference is `preskip` where it is compared, else the first trained arm; the metric is the set's primary one.
    The others are the untouched model, LoRA, and the parallel adapter; any others only where none of these is compared.
    The paper's own scoring is left out: it is there to be read beside the paper's table.
    With few seeds a large family finds little: three seeds and 21 comparisons need a difference of 25 standard errors.
    """
    trained = [arm for arm in arms if arm != "none"]
    reference = "preskip" if "preskip" in trained else next(iter(trained), None)
    decisive = [arm for arm in DECISIVE if arm in arms and arm != reference]
    others = decisive or [arm for arm in arms if arm != reference]
    declared = [
        {"arm": reference, "reference": other, "set": name, "metric": described["primary"]}
        for other in others
        if reference is not None
        for name, described in sets.items()
        if name not in COLUMNS
    ]
    return {"declared": declared, "alpha": ALPHA, "margins": dict(DEFAULT_MARGINS)}


def _context(config: ProbeConfig, base: nn.Module) -> ArmContext:
    targets = attention_paths(base, config.layers, config.target_modules, config.exclude_modules)
    return ArmContext(
        base=base,
        settings=config.settings,
        skip_position=config.skip_position,
        layers=config.layers,
        targets=tuple(targets),
        by_name=config.target_modules is not None or config.exclude_modules is not None,
        budget=branch_parameters(base, config.settings, targets),
        match=config.match,
        lora_ranks=config.lora_ranks,
        lora_scale=config.lora_scale,
    )


def _corpora(config: ProbeConfig, data_dir: Path | None, directory: Path, quiet: bool) -> list[Scored]:
    """The training corpus, then the others, each with the number of documents and words to score."""
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "heldout_fraction": config.heldout_fraction,
        "seed": config.split_seed,
        "progress": not quiet,
    }
    extents = {config.corpus: (config.eval_documents, config.eval_words)}
    for text in config.eval_corpora:
        name, documents, words = parse_extent(text, config.eval_documents, config.eval_words)
        extents[name] = (documents, words)
    scored = []
    for name, (documents, words) in extents.items():
        is_home = name == config.corpus
        own: dict[str, Any] = {"text_column": config.text_column, "split": config.corpus_split} if is_home else {}
        splits = load_splits(locate(name, directory), **options, **own)
        scored.append(Scored(splits, documents, words, "in" if is_home else "out"))
    names = [*(slug(text.splits.name) for text in scored), LAST_WORD, *config.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PreskipError(f"two evaluation sets are named {twice!r}: rename a file, or leave one out")
    return scored


def _training_blocks(config: ProbeConfig, splits: Splits, tokenizer: Any, quiet: bool) -> Callable[[int], np.ndarray]:
    wanted = config.steps * config.batch_size * config.seq_len

    @lru_cache(maxsize=2)
    def blocks_of(seed: int) -> np.ndarray:
        if config.packing == "paragraphs":
            from preskip.data.paragraphs import block_labels, paper_blocks, paper_paragraphs

            paragraphs = paper_paragraphs(document.text for document in splits.training)
            return block_labels(*paper_blocks(paragraphs, tokenizer, config.seq_len))
        with progress_display("tokenise training text", quiet=quiet) as progress:
            return pack_blocks(
                splits.training,
                tokenizer,
                config.seq_len,
                limit_tokens=wanted,
                seed=seed,
                piece_characters=PIECE_CHARACTERS,
                min_blocks=config.batch_size,
                progress=progress,
            )

    return blocks_of


def _heldout(
    config: ProbeConfig, corpora: Sequence[Scored], tokenizer: Any, limit: int | None, data_dir: Path | None
) -> HeldOut:
    """Choose and tokenise what is scored; items longer than the model's context of `limit` tokens are left out."""
    home = corpora[0].splits
    if len(home.heldout) < 2:
        raise PreskipError(
            f"corpus {config.corpus} has {len(home.heldout)} held-out document, an interval needs 2 or more: raise "
            "--heldout-fraction, or give more documents"
        )

    def prepared(name: str, documents: Sequence[Document], count: int, words: int) -> TextSet:
        chosen = choose(documents, count, words, config.split_seed)
        return prepare_texts(slug(name), chosen, tokenizer, context_length=config.context_length)

    texts, sets = [], {}
    for splits, count, words, domain in corpora:
        text = prepared(splits.name, splits.heldout, count, words)
        texts.append(text)
        title = f"{text.name}, held-out documents"
        sets[text.name] = text.describe(
            tokenizer, domain=domain, title=title, source=splits.source, sha256=splits.sha256
        )
    paper_data = load_paper_data(data_dir) if config.paper_scoring else None
    development = []
    if config.lr_mode == "tune":
        extent = config.development_documents, config.development_words
        for splits, *_ in corpora:
            unseen = paper_data.without_scored(splits.development) if paper_data else splits.development
            if len(unseen) < 2:
                raise PreskipError(
                    f"corpus {splits.name} has {len(unseen)} documents to choose a learning rate on, 2 are needed: "
                    "give more text, or a fixed --lr"
                )
            development.append(prepared(splits.name, unseen, *extent))
        if "lambada_openai" in config.tasks and data_dir and (data_dir / LAMBADA_DEVELOPMENT).is_file():
            development.append(prepared("lambada_development", lambada_development(data_dir), *extent))
    items, item_windows = _last_words(config, home.heldout, tokenizer, limit) if config.last_word_items else ([], [])
    if items:
        sets[LAST_WORD] = {
            "kind": "item",
            "domain": "in",
            "title": f"last word ({config.corpus.upper() if config.corpus.isidentifier() else config.corpus})",
            "source": home.source,
            "sha256": home.sha256,
            "context_length": limit,
            "stride": None,
            "items": len(items),
            "clusters": len({item.document for item in items}),
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
        )
        sets |= suite.sets
    paper = None
    if paper_data is not None:
        paper = encode_paper_items(paper_data, tokenizer, context_length=min(limit or LENGTH, LENGTH))
        sets |= paper.sets
    for name in WIKITEXT_SETS & sets.keys() if "wikitext" in home.name.lower() else ():
        sets[name] = {**sets[name], "domain": "in"}
    return HeldOut(
        texts=texts,
        items=items,
        item_windows=item_windows,
        suite=suite,
        paper=paper,
        development=development,
        sets=sets,
    )


def _last_words(
    config: ProbeConfig, documents: Sequence[Document], tokenizer: Any, limit: int | None
) -> tuple[list[LastWordItem], list[Window]]:
    try:
        items = build_items(documents, config.last_word_items, config.split_seed)
        windows = last_word_windows(items, tokenizer)
    except PreskipError as error:
        raise PreskipError(f"{error} (--last-word-items 0)") from None
    fitting = [
        pair for pair in zip(items, windows, strict=True) if limit is None or len(pair[1].input_ids) <= limit + 1
    ]
    if len({item.document for item, _ in fitting}) < 2:
        raise PreskipError(
            "the last-word items that fit the model's context come from fewer than 2 held-out documents: give more text"
            " or leave them out (--last-word-items 0)"
        )
    return [item for item, _ in fitting], [window for _, window in fitting]


def _arm_facts(arm: Arm, context: ArmContext, config: ProbeConfig) -> dict[str, Any]:
    """What run.json says of an arm; it is inserted once, so that an impossible one is found before training."""
    kept = ("r", "lora_alpha", "layers_to_transform", "skip_position", *asdict(context.settings))
    settings: dict[str, Any] = {}
    for config_of_arm in arm.configs(context):
        described = config_of_arm.to_dict()
        settings |= {key: described[key] for key in kept if described.get(key) is not None}
    with insert(arm, context, config.seeds[0]) as inserted:
        trainable, flops = inserted.parameters if arm.trains else 0, inserted.flops_per_token
    return {
        "description": arm.description,
        "learning_rate": config.learning_rate(arm.name),
        "budget": "none" if not arm.trains else arm.budget if config.match != "none" else "unmatched",
        "base_dtype": config.dtype,
        "adapter_dtype": "float32" if arm.trains else None,
        "compute_dtype": config.dtype,
        "attn_implementation": context.base.config._attn_implementation,  # type: ignore[union-attr]
        "trainable_parameters": trainable,
        "forward_flops_per_token": flops,
        "settings": settings,
    }
