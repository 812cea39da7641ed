"""Training from scratch: a model is built per cell; what cells share lies in the run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from preskip.analysis.depth import text_profile
from preskip.architecture.models import architecture
from preskip.arms import SCRATCH_ARMS, resolve_arms
from preskip.arms.insert import Inserted
from preskip.arms.plan import Plan, on_meta
from preskip.data.blocks import document_marks
from preskip.data.packed import open_blocks
from preskip.data.tokenizer import fingerprint
from preskip.errors import PreskipError, explained, one_line
from preskip.experiment.family import declare_family
from preskip.experiment.heldout import HeldOut, load_corpora, prepare_documents, require
from preskip.experiment.measured import finite, measured
from preskip.experiment.prepared import Prepared, common_facts, started_in
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.reading import amount_read, reading_limit
from preskip.experiment.scratch_inputs import (
    arch_facts,
    development_blocks,
    is_complete,
    keep_arch,
    most_tokens,
    open_texts,
    open_tokenizer,
    plan_arms,
    store_texts,
    store_training,
    stored_arch,
    stored_tokenizer,
)
from preskip.model_types import PREFIX
from preskip.progress import say, spinner
from preskip.runs.attempt import check_same_inputs
from preskip.runs.directory import Cell, RunDirectory
from preskip.runs.files import clear_disk_errors, sync_tree
from preskip.runs.schema import Facts, StepRow
from preskip.train.distributed import Crew
from preskip.train.scratch import ScratchSettings, train_scratch
from preskip.train.speed import measured_peak


@dataclass(kw_only=True)
class Scratch(Prepared):
    """What the cells of a run from scratch share.

    Attributes:
        plans: the arms, solved.
        blocks: training blocks [N, seq_len], memory-mapped.
        development: blocks that are evaluated while training, [M, seq_len].
    """

    options = PretrainConfig
    arms = SCRATCH_ARMS

    plans: dict[str, Plan]
    blocks: np.ndarray
    development: np.ndarray

    @classmethod
    def prepare(cls, run: RunDirectory, config: PretrainConfig, quiet: bool, crew: Crew) -> tuple[Scratch, Facts]:
        """See `Prepared.prepare`."""
        directory = started_in(run)
        limit = reading_limit(config, most_tokens(run, config))
        corpora = load_corpora(config, directory, quiet, limit=limit)
        splits = corpora[0].splits
        require(config, "development", splits.development, 1)
        tokenizer = stored_tokenizer(run, config, splits, quiet)
        plans = plan_arms(config, tokenizer, stored_arch(run, config))
        for line in _tokenizer_lines(tokenizer, plans):
            say(line, quiet=quiet)
        first = plans[config.arms[0]]
        with explained(lambda error: _attention_fault(config, error)):
            meta: Any = on_meta(first.config, **_attention(config))
        attention = config.attn_implementation or meta.config._attn_implementation
        reach = getattr(first.config, "max_position_embeddings", None)
        longest = max(config.seq_len, config.scoring_context)
        if reach is not None and longest > reach:
            raise PreskipError(
                f"{longest} tokens exceed the architecture's context of {reach}: lower --seq-len/--context-length, or "
                f"--set max_position_embeddings={longest}"
            )
        with spinner("preparing the held-out texts", quiet=quiet):
            development = development_blocks(run, config, splits, tokenizer)
            heldout = prepare_documents(config, corpora, tokenizer, config.scoring_context, reopen=False)
        # Before what the cells share is written: a finished run must stay as it is.
        given: Any = {"corpus": {"name": config.corpus, "sha256": splits.sha256}, "sets": heldout.sets}
        check_same_inputs(run, given, is_complete=is_complete(run, config))
        keep_arch(run, config)
        packed = store_training(run, config, plans, tokenizer, splits, quiet)
        store_texts(run, development, heldout.texts)
        plain = plans.get("base", first).config
        passes = max(plan.tokens for plan in plans.values()) / packed.tokens
        facts = common_facts(config, splits, tokens=packed.tokens, passes=passes, documents=packed.documents)
        facts["corpus"] |= amount_read(splits) | {"packed_sha256": packed.sha256}
        mark = fingerprint(tokenizer)
        own = {
            "arch": arch_facts(run, config),
            "overrides": config.overrides,
            "vocab_size": len(tokenizer),
            "tokenizer": mark,
        }
        arms: dict[str, Any] = {
            name: {
                **plan.facts,
                "learning_rate": config.rate(name),
                "base_dtype": "float32",
                "adapter_dtype": "float32",
                "compute_dtype": config.dtype,
                "attn_implementation": attention,
            }
            for name, plan in plans.items()
        }
        facts |= {
            "model": {
                "name": config.arch,
                "type": plain.model_type.removeprefix("preskip_"),
                "parameters": first.size.parameters,
                "layers": plain.num_hidden_layers,
                "hidden_size": plain.hidden_size,
                "vocab_size": plain.vocab_size,
                "dtype": "float32",
                "attn_implementation": attention,
                "source": f"random weights, {config.arch}",
                # Two runs compare the same thing if architecture and tokenizer are the same.
                "sha256": hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest(),
                "revision": None,
            },
            "tokenizer": {
                "source": config.tokenizer or "byte-level BPE trained on the training documents",
                "vocab_size": len(tokenizer),
                "sha256": mark,
            },
            "arms": arms,
            "sets": heldout.sets,
            "family": declare_family(
                resolve_arms(config.arms, SCRATCH_ARMS), heldout.sets, config.primary, config.looks
            ),
            "published": None,
        }
        if run.manifest.get("peak_flops") is None:
            peak = config.peak_flops or measured_peak(config.device, getattr(torch, config.dtype))
            facts |= {"peak_flops": peak, "peak_flops_source": "as given" if config.peak_flops else "measured matmul"}
        prepared = cls.open(run, config)
        prepared.quiet, prepared.crew = quiet, crew
        return prepared, facts

    @classmethod
    def open(cls, run: RunDirectory, config: PretrainConfig) -> Scratch:
        """See `Prepared.open`: it needs the run directory alone."""
        tokenizer = open_tokenizer(run, config)
        development, texts = open_texts(run, config, tokenizer)
        return cls(
            run=run,
            config=config,
            tokenizer=tokenizer,
            heldout=HeldOut(texts=texts),
            plans=plan_arms(config, tokenizer, stored_arch(run, config)),
            blocks=open_blocks(run.path / "data", config.seq_len),
            development=development,
        )

    @contextmanager
    def build(self, arm: str, seed: int) -> Iterator[Inserted]:
        """See `Prepared.build`."""
        yield Inserted(model=build_model(self.config, self.plans[arm], seed))

    def fit(self, built: Inserted, settings: dict[str, Any], **where: Any) -> list[StepRow]:
        """See `Prepared.fit`."""
        config = self.config
        own = ScratchSettings(
            batch_size=config.batch_size,
            warmup_steps=config.warmup(settings["steps"]),
            final_rate=config.final_rate,
            weight_decay=config.weight_decay,
            beta2=config.beta2,
            max_grad_norm=config.max_grad_norm,
            branch_rate_factor=config.branch_rate_factor,
            dtype=config.dtype,
            compile=config.compile,
            gradient_checkpointing=config.gradient_checkpointing,
            log_steps=config.log_steps,
            eval_steps=config.eval_steps,
            save_steps=config.save_steps,
            keep_checkpoints=config.keep_checkpoints,
            report_to=config.report_to,
            peak_flops=self.run.manifest.get("peak_flops"),
            **settings,
        )
        return train_scratch(built.model, self.blocks, own, evaluation=self.development, **where)

    def save(self, built: Inserted, cell: Cell) -> None:
        """See `Prepared.save`: the whole model, with its tokenizer."""
        model: Any = built.model
        with clear_disk_errors(cell.folder):
            config = model.config
            config.use_cache = True  # Trainer has turned it off
            if config.model_type.startswith(PREFIX):
                config.auto_map = architecture(config.model_type).auto_map
            model.save_pretrained(cell.folder / "model")
            self.tokenizer.save_pretrained(cell.folder / "model")
            sync_tree(cell.folder / "model")

    def summarise(self, arm: str, rows: list[StepRow]) -> dict[str, Any]:
        """See `Prepared.summarise`."""
        plan, per_step = self.plans[arm], self.config.tokens_per_step
        evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
        return {
            "steps": plan.steps,
            "tokens": plan.tokens,
            "final_training_loss": float(np.mean([row["loss"] for row in rows[-max(1, len(rows) // 20) :]])),
            "final_eval_loss": evaluated[-1] if evaluated else None,
            "seconds_per_step": float(np.median([row["seconds"] * per_step / row["tokens"] for row in rows])),
            "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
            "mfu": float(np.median([row["mfu"] for row in rows])) if "mfu" in rows[-1] else None,
        }

    def measure(self, built: Inserted, label: str) -> dict[str, Any]:
        """See `Prepared.measure`."""
        notes: list[str] = []
        found: dict[str, Any] = {"depth": []}
        with measured(notes, "depth profile"):
            found["depth"] = finite(text_profile(built.model, self.heldout.texts[0]))
        return {**found, "notes": notes}


def build_model(config: PretrainConfig, plan: Plan, seed: int) -> nn.Module:
    """A freshly initialised model in fp32; the base's weights are the same for a seed with and without the branch."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(plan.config, dtype=torch.float32, **_attention(config))
    return model.to(config.device)


def _attention(config: PretrainConfig) -> dict[str, Any]:
    return {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}


def _attention_fault(config: PretrainConfig, error: Exception) -> str:
    reason = one_line(error, 120)
    return f"--attn-implementation {config.attn_implementation} cannot be used here ({reason}): try eager or sdpa"


def _tokenizer_lines(tokenizer: Any, plans: Mapping[str, Plan]) -> Iterator[str]:
    """What of a tokenizer makes a model other than one may think."""
    rows = next(iter(plans.values())).config.vocab_size
    if rows >= 1.1 * len(tokenizer):  # fewer are there to fill a multiple of 64 or 128
        yield (
            f"the architecture keeps {rows:,} embeddings for the {len(tokenizer):,} tokens of the tokenizer: "
            f"--set vocab_size={len(tokenizer)} leaves the others out"
        )
    if document_marks(tokenizer).end is None:
        yield "the tokenizer has no end token: documents follow each other without a mark"
