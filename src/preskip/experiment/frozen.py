"""Training on a frozen base: the base is loaded once per process, arms are inserted into it and taken out again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from preskip.analysis.ablation import ablate, ablation_passes
from preskip.analysis.depth import text_profile
from preskip.arms import ARMS, Arm, ArmContext, attention_layers, attention_paths, branch_parameters, resolve_arms
from preskip.arms.experts import experts_note, stacked_share
from preskip.arms.insert import Inserted, insert
from preskip.assets import load_model, resolve_model, weights_dtype
from preskip.data.blocks import check_vocabulary, opening_token, pack_blocks, scored_size, start_token
from preskip.data.corpus import clusters
from preskip.data.splits import Splits, choose, locate
from preskip.data.tokenizer import fingerprint, load_tokenizer
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import check_causal
from preskip.evaluate.published import recognise_published
from preskip.evaluate.texts import prepare_texts
from preskip.evaluate.training_text import reading_notes, special_loss, start_gain
from preskip.experiment.family import declare_family
from preskip.experiment.heldout import LAST_WORD, Scored, load_corpora, local_data, prepare_heldout
from preskip.experiment.measured import finite, measured
from preskip.experiment.preflight import needed_bytes
from preskip.experiment.prepared import PIECE_CHARACTERS, Prepared, common_facts, started_in
from preskip.experiment.probe_options import ProbeConfig
from preskip.experiment.reuse import Reuse
from preskip.kv_cache import cache_name
from preskip.peers.tokens import Tails
from preskip.progress import progress_bar, progress_display, say, spinner
from preskip.runs.directory import Cell, RunDirectory
from preskip.runs.files import clear_disk_errors, sync_tree
from preskip.runs.schema import AblationRow, ArmFacts, Facts, StepRow, TokenizerFacts
from preskip.train.distributed import Crew
from preskip.train.frozen import TrainingSettings, train_frozen
from preskip.train.keep import Keep, kept_per_step

# Words of each document on which layers are switched off: two passes per layer are costly.
ABLATION_WORDS = 60


@dataclass(kw_only=True)
class Frozen(Prepared):
    """What the cells of a run on a frozen base share.

    Attributes:
        model_name: what `preskip.assets.load_model` calls the base from here.
        base: the untouched model.
        context: what arms depend on.
        blocks: gives the training blocks [N, seq_len] of a seed, the same for every arm.
        kept: gives the blocks of other text that `--keep-weight` is about, likewise; None without it.
        reuse: what the arms reuse of the base's first layers.
    """

    options = ProbeConfig
    arms = ARMS

    model_name: str
    base: nn.Module
    context: ArmContext
    blocks: Callable[[int], np.ndarray]
    kept: Callable[[int], np.ndarray] | None
    reuse: Reuse

    @classmethod
    def prepare(cls, run: RunDirectory, config: ProbeConfig, quiet: bool, crew: Crew) -> tuple[Frozen, Facts]:
        """See `Prepared.prepare`."""
        directory = started_in(run)
        corpora = load_corpora(config, directory, quiet, reserved=(LAST_WORD, *config.tasks))
        splits = corpora[0].splits
        model_name = locate(config.model, directory)
        # Of the first attempt: a name on the Hub may mean another model now.
        recorded: Any = run.manifest.get("model", {})
        source = resolve_model(model_name, recorded.get("revision"))
        with spinner(f"loading {config.model}", quiet=quiet):
            tokenizer = load_tokenizer(
                model_name,
                trust_remote_code=config.trust_remote_code,
                revision=source.revision,
                split_special_tokens=config.split_special_tokens,
            )
            base = load_model(
                model_name,
                dtype=getattr(torch, config.dtype),
                device=config.device,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                revision=source.revision,
            )
        check_vocabulary(base, tokenizer)
        check_causal(base)
        text_config = base.config.get_text_config()
        limit = getattr(text_config, "max_position_embeddings", None)
        longest = max(config.seq_len, config.context_length)
        if limit is not None and longest > limit:
            raise PreskipError(
                f"{longest} tokens exceed the model's context of {limit}: lower --seq-len/--context-length"
            )
        arms = resolve_arms(config.arms)
        checksum = source.sha256 or source.revision or source.path_or_id
        reuse = Reuse(run, config, base, checksum, quiet)
        try:
            context = _context(config, base)
            described = {arm.name: _arm_facts(arm, context, config, reuse) for arm in arms}
        except PreskipError as error:
            raise PreskipError(_in_options(str(error))) from None
        with spinner("preparing the held-out texts", quiet=quiet):
            heldout = prepare_heldout(config, corpora, tokenizer, limit, local_data(config, directory), quiet)
        weights = [described[arm.name]["trainable_parameters"] for arm in arms for _ in config.seeds]
        needed = needed_bytes(weights, checkpoints=config.save_steps > 0)
        for arm, reused in reuse.settled(heldout, needed).items():
            described[arm]["reuse"] = reused
        blocks = _training_blocks(config, splits, tokenizer, quiet)
        kept = _kept_blocks(config, corpora, tokenizer, quiet) if config.keep_weight else None
        prepared = cls(
            run=run,
            config=config,
            tokenizer=tokenizer,
            heldout=heldout,
            quiet=quiet,
            crew=crew,
            model_name=model_name,
            base=base,
            context=context,
            blocks=blocks,
            kept=kept,
            reuse=reuse,
        )
        first = blocks(config.seeds[0])
        described_tokenizer: TokenizerFacts = {
            "source": source.source,
            "vocab_size": len(tokenizer),
            "sha256": fingerprint(tokenizer, start_token(tokenizer)),
        }
        if config.packing == "packed":
            known: Any = run.manifest.get("tokenizer", {})  # measured once
            measured: Any = {key: known[key] for key in ("start_gain", "special_loss") if key in known}
            if "start_gain" not in known:
                measured["start_gain"] = start_gain(base, tokenizer, first, batch_tokens=config.eval_batch_tokens)
            if "special_loss" not in known:
                measured["special_loss"] = special_loss(base, tokenizer, first)
            described_tokenizer |= {"opening": opening_token(tokenizer), **measured}
            for note in reading_notes(measured):
                say(note, quiet=quiet)
        stacked = round(stacked_share(base, text_config), 3)
        if mixture := experts_note(stacked, config.arms):
            say(mixture, quiet=quiet)
        tokens, passes = int((first >= 0).sum()), config.steps * config.batch_size / len(first)  # padding is negative
        return prepared, {
            "model": {
                "name": config.model,
                "type": base.config.model_type,
                "parameters": base.num_parameters(),  # of packed matrices what they stand for
                "layers": text_config.num_hidden_layers,
                "hidden_size": text_config.hidden_size,
                "dtype": weights_dtype(base),
                "stacked_experts": stacked,
                "attn_implementation": base.config._attn_implementation,
                "source": source.source,
                "sha256": source.sha256,
                "revision": source.revision,
            },
            "tokenizer": described_tokenizer,
            **common_facts(config, splits, tokens=tokens, passes=passes, documents=len(splits.training)),
            "arms": described,
            "sets": heldout.sets,
            "family": declare_family(arms, heldout.sets, config.primary, config.looks),
            "published": recognise_published(config.model, base.config),
        }

    @contextmanager
    def build(self, arm: str, seed: int) -> Iterator[Inserted]:
        """See `Prepared.build`."""
        with insert(ARMS[arm], self.context, seed) as built, self.reuse.active(arm):
            yield built

    def fit(self, built: Inserted, settings: dict[str, Any], **where: Any) -> list[StepRow]:
        """See `Prepared.fit`."""
        config = self.config
        own = TrainingSettings(
            batch_size=config.batch_size,
            gradient_checkpointing=config.gradient_checkpointing,
            save_steps=config.save_steps,
            **settings,
        )
        keep = None
        if self.kept is not None:
            keep = Keep(weight=config.keep_weight, blocks=self.kept(own.seed), as_base=built.as_base)
        return train_frozen(built.model, self.blocks(own.seed), own, keep=keep, **where)

    def save(self, built: Inserted, cell: Cell) -> None:
        """See `Prepared.save`."""
        with clear_disk_errors(cell.adapter):
            shutil.rmtree(cell.adapter, ignore_errors=True)  # half of one, where a process was killed here
            built.save(cell.adapter)
            sync_tree(cell.adapter)

    def summarise(self, arm: str, rows: list[StepRow]) -> dict[str, Any]:
        """See `Prepared.summarise`."""
        return {
            "steps": len(rows),
            "final_training_loss": rows[-1]["loss"] if rows else None,
            "seconds_per_step": float(np.median([row["seconds"] for row in rows])) if rows else None,
        }

    def measure(self, built: Inserted, label: str) -> dict[str, Any]:
        """See `Prepared.measure`."""
        notes: list[str] = []
        found: dict[str, Any] = {"kv_cache_bytes_per_token": None, "depth": [], "ablation": []}
        with measured(notes, "size of the cache"):
            found["kv_cache_bytes_per_token"] = cache_bytes(built.model)
        with measured(notes, "depth profile"):
            found["depth"] = finite(text_profile(self.base, self.heldout.texts[0]))
        if found["depth"] and self.config.ablation_documents:
            with measured(notes, "ablation"):
                found["ablation"] = finite(self._ablate(built, label))
        if self.reuse.passes.passes:
            found["reuse"] = asdict(self.reuse.passes)
        return {**found, "notes": notes}

    def _ablate(self, built: Inserted, label: str) -> list[AblationRow]:
        """Loss change when one layer's skip or enrichment is switched off, on the beginnings of in-domain documents."""
        config, documents = self.config, self.heldout.texts[0].documents
        documents = choose(documents, config.ablation_documents, ABLATION_WORDS, config.split_seed)
        text = prepare_texts("ablation", documents, self.tokenizer, context_length=config.context_length)
        of = clusters(text.documents)
        sizes = np.bincount(of, [scored_size(document, self.tokenizer).bytes for document in text.documents])
        given: Any = (text.windows, [of[owner] for owner in text.owners], sizes.tolist())
        batch_tokens = config.eval_batch_tokens
        passes = ablation_passes(built.model, text.windows, batch_tokens)
        with progress_bar(f"ablate {label}", passes, quiet=self.quiet) as advance:
            return ablate(built.model, *given, batch_tokens=batch_tokens, advance=advance)


def _in_options(text: str) -> str:
    """A message about fields of a PEFT configuration, in the options that stand for them."""
    text = re.sub(r"layers_to_transform=\[([\d, ]+)\]", lambda found: f"--layers {found[1].replace(' ', '')}", text)
    text = re.sub(r"layers_to_transform='(\w+)'", r"--layers \1", text)
    for field in ("target_modules", "exclude_modules"):
        text = text.replace(f"{field}=", f"--{field.replace('_', '-')} ").replace(field, f"--{field.replace('_', '-')}")
    return text.replace("layers_to_transform", "--layers")


def _context(config: ProbeConfig, base: nn.Module) -> ArmContext:
    layers = attention_layers(base, config.layers)
    targets = attention_paths(base, layers, config.target_modules, config.exclude_modules)
    return ArmContext(
        base=base,
        settings=config.settings,
        skip_position=config.skip_position,
        layers=layers,
        targets=tuple(targets),
        by_name=config.target_modules is not None or config.exclude_modules is not None,
        budget=branch_parameters(base, config.settings, targets),
        match=config.match,
        lora_ranks=config.lora_ranks,
        lora_scale=config.lora_scale,
    )


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
                opening=opening_token(tokenizer),
                piece_characters=PIECE_CHARACTERS,
                min_blocks=config.batch_size,
                progress=progress,
            )

    return blocks_of


def _kept_blocks(
    config: ProbeConfig, corpora: Sequence[Scored], tokenizer: Any, quiet: bool
) -> Callable[[int], np.ndarray]:
    """Training text of the corpora out of domain, in blocks; their held-out and development documents are not in it."""
    documents = [document for scored in corpora if scored.domain == "out" for document in scored.splits.training]
    if not documents:
        raise PreskipError(
            "--keep-weight needs text out of domain: give --eval-corpora another corpus than the one trained on"
        )
    rows = config.steps * kept_per_step(config.batch_size)

    @lru_cache(maxsize=2)
    def blocks_of(seed: int) -> np.ndarray:
        with progress_display("tokenise text to keep", quiet=quiet) as progress:
            return pack_blocks(
                documents,
                tokenizer,
                config.seq_len,
                limit_tokens=rows * config.seq_len,
                seed=seed,
                opening=opening_token(tokenizer),
                piece_characters=PIECE_CHARACTERS,
                progress=progress,
            )

    blocks_of(config.seeds[0])  # too little text is found before training
    return blocks_of


def _arm_facts(arm: Arm, context: ArmContext, config: ProbeConfig, reuse: Reuse) -> ArmFacts:
    """What run.json says of an arm; it is inserted once, so that an impossible one is found before training."""
    kept = ("r", "lora_alpha", "layers_to_transform", "skip_position", *asdict(context.settings))
    settings: dict[str, Any] = {}
    for config_of_arm in arm.configs(context):
        described = config_of_arm.to_dict()
        settings |= {key: described[key] for key in kept if described.get(key) is not None}
    with insert(arm, context, config.seeds[0]) as inserted:
        trainable, flops = inserted.parameters, inserted.flops_per_token
        reuse.try_arm(arm.name, inserted)
    return {
        "description": arm.description,
        "learning_rate": config.learning_rate(arm.name),
        "budget": "none" if not arm.trains else arm.budget if config.match != "none" else "unmatched",
        "base_dtype": weights_dtype(context.base),
        "adapter_dtype": "float32" if arm.trains else None,
        "compute_dtype": config.dtype,
        "attn_implementation": context.base.config._attn_implementation,  # type: ignore[union-attr, typeddict-item]
        "trainable_parameters": trainable,
        "forward_flops_per_token": flops,
        "settings": settings,
    }


@torch.inference_mode()
def cache_bytes(model: nn.Module) -> float | None:
    """Bytes of the K/V cache per token that the model keeps after reading 16; None where it keeps none."""
    tokens = 16
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (torch.arange(tokens, device=next(model.parameters()).device)[None] + 2) % rows
    cache = getattr(model(input_ids=ids, use_cache=True), cache_name(), None)
    layers = [layer for layer in getattr(cache, "layers", None) or () if not isinstance(layer, Tails)]
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        return None
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / tokens
