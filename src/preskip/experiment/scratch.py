"""Training from scratch: a model is built per cell; what cells share lies in the run directory.

::

    RUN/tokenizer/              the tokenizer
    RUN/arch.json               the architecture's config, where it was given as a file
    RUN/data/tokens.bin, .json  training text (`preskip.data.packed`)
    RUN/data/development.npy    blocks that are evaluated while training
    RUN/data/heldout.json       documents that are scored afterwards
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from preskip.analysis.depth import text_profile
from preskip.architecture.models import architecture
from preskip.architecture.shapes import SHAPES
from preskip.arms import SCRATCH_ARMS, resolve_arms
from preskip.arms.insert import Inserted
from preskip.arms.plan import Plan, Planner, on_meta
from preskip.arms.shape import config_file, tokenizer_fields
from preskip.data.blocks import document_marks, pack_blocks
from preskip.data.corpus import Document
from preskip.data.packed import PackedText, open_blocks, write_packed
from preskip.data.splits import Splits, locate
from preskip.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from preskip.errors import PreskipError, explained, one_line
from preskip.evaluate.texts import prepare_texts
from preskip.experiment.family import declare_family
from preskip.experiment.heldout import HeldOut, load_corpora, prepare_documents, require
from preskip.experiment.measured import finite, measured
from preskip.experiment.prepared import Prepared, common_facts, started_in
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.reading import CHARACTERS_PER_TOKEN, amount_read, reading_limit
from preskip.model_types import PREFIX
from preskip.progress import progress_bar, spinner
from preskip.runs.attempt import check_same_inputs
from preskip.runs.directory import Cell, RunDirectory
from preskip.runs.files import clear_disk_errors, read_json, sync_tree, write_json
from preskip.runs.schema import Facts, HeldOutSet, StepRow
from preskip.train.distributed import Crew
from preskip.train.scratch import ScratchSettings, train_scratch
from preskip.train.speed import measured_peak

# Blocks of whole development documents that are tokenised for each one that is evaluated, so that many documents count.
DRAWN_FROM = 16


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
        tokenizer = _tokenizer(run, config, splits, quiet)
        arch = _arch(run, config)
        plans = plan_arms(config, tokenizer, arch)
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
            development = _development(run, config, splits, tokenizer)
            heldout = prepare_documents(config, corpora, tokenizer, config.scoring_context)
        # Before what the cells share is written: a finished run must stay as it is.
        given: Any = {"corpus": {"name": config.corpus, "sha256": splits.sha256}, "sets": heldout.sets}
        cells = [run.cell(arm, seed) for arm in config.arms for seed in config.seeds]
        is_complete = all(cell.is_done for cell in cells)
        check_same_inputs(run, given, is_complete=is_complete)
        file = config_file(arch)
        if file is not None and "model" not in run.manifest:  # a run that an earlier preskip began has no copy
            write_json(_arch_copy(run), read_json(file))
        data = run.path / "data"
        with progress_bar("tokenise training text", len(splits.training), quiet=quiet) as advance:
            packed = write_packed(data, splits.training, tokenizer, seed=config.split_seed, advance=advance)
        if not is_complete and run.manifest.get("corpus", {}).get("packed_sha256", packed.sha256) != packed.sha256:
            raise PreskipError(
                f"{data / 'tokens.bin'} was missing or damaged, and the training text now becomes other tokens than "
                "when this run began: start a new run"
            )
        _check_enough(config, plans, packed, splits)
        with clear_disk_errors(run.path):
            temporary = data / ".development.npy"
            np.save(temporary, development)
            temporary.replace(data / "development.npy")
        stored: list[HeldOutSet] = [
            {"name": text.name, "documents": [{"id": d.id, "text": d.text, "group": d.group} for d in text.documents]}
            for text in heldout.texts
        ]
        write_json(data / "heldout.json", stored)
        plain = plans.get("base", first).config
        passes = max(plan.tokens for plan in plans.values()) / packed.tokens
        facts = common_facts(config, splits, tokens=packed.tokens, passes=passes, documents=packed.documents)
        facts["corpus"] |= amount_read(splits) | {"packed_sha256": packed.sha256}
        mark = fingerprint(tokenizer)
        own = {
            "arch": read_json(_arch_copy(run)) if _arch_copy(run).is_file() else config.arch,
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
        tokenizer = load_tokenizer(str(run.path / "tokenizer"), trust_remote_code=config.trust_remote_code)
        data = run.path / "data"
        try:
            development = np.load(data / "development.npy")
        except (OSError, ValueError):
            raise PreskipError(f"{data / 'development.npy'} is missing or damaged: delete {data} and resume") from None
        texts = [
            prepare_texts(
                entry["name"],
                [Document(its["id"], its["text"], its.get("group", its["id"])) for its in entry["documents"]],
                tokenizer,
                context_length=config.scoring_context,
            )
            for entry in read_json(data / "heldout.json")
        ]
        return cls(
            run=run,
            config=config,
            tokenizer=tokenizer,
            heldout=HeldOut(texts=texts),
            plans=plan_arms(config, tokenizer, _arch(run, config)),
            blocks=open_blocks(data, config.seq_len),
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


def plan_arms(config: PretrainConfig, tokenizer: Any | None, arch: str | None = None) -> dict[str, Plan]:
    """Solve every arm of a run.

    Args:
        config: every option.
        tokenizer: of all arms; None where it will be trained.
        arch: the architecture, where it lies elsewhere than the options say.

    Raises:
        PreskipError: an architecture that cannot be built; the arm is named.
    """
    fields = {"vocab_size": config.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if tokenizer is not None:
        fields = tokenizer_fields(tokenizer)
    planner = Planner(
        arch=arch or config.arch,
        overrides=config.overrides,
        fields=fields,
        own_vocabulary=config.tokenizer is not None,
        settings=config.settings,
        skip_position=config.skip_position,
        layers=config.layers,  # type: ignore[arg-type]  # numbers: see PretrainConfig
        seq_len=config.seq_len,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
    )
    return {name: planner.plan(SCRATCH_ARMS[name]) for name in config.arms}


def most_tokens(run: RunDirectory, config: PretrainConfig) -> int:
    """Tokens of the arm that reads most; only those of equal FLOPs read more than the others.

    Raises:
        PreskipError: an arm that cannot be built, before any corpus is read.
    """
    if all(SCRATCH_ARMS[arm].matches == "parameters" for arm in config.arms):
        return config.steps * config.tokens_per_step
    tokenizer = None if config.tokenizer is None else _given_tokenizer(run, config)
    return max(plan.tokens for plan in plan_arms(config, tokenizer, _arch(run, config)).values())


def _arch(run: RunDirectory, config: PretrainConfig) -> str:
    """The run's copy of an architecture that was given as a file, or that one where there is no copy; else the name."""
    copy = _arch_copy(run)
    if copy.is_file():
        return str(copy)
    return config.arch if config.arch in SHAPES else locate(config.arch, started_in(run))


def _arch_copy(run: RunDirectory) -> Path:
    return run.path / "arch.json"


def _given_tokenizer(run: RunDirectory, config: PretrainConfig) -> Any:
    """The run's copy of the tokenizer that was given, or that one where there is no copy yet."""
    assert config.tokenizer is not None
    copy = run.path / "tokenizer"
    name = str(copy) if copy.is_dir() else locate(config.tokenizer, started_in(run))
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code)


def _tokenizer(run: RunDirectory, config: PretrainConfig, splits: Splits, quiet: bool) -> Any:
    folder = run.path / "tokenizer"
    if not folder.is_dir():
        if config.tokenizer is not None:
            tokenizer: Any = _given_tokenizer(run, config)
        else:
            with spinner(f"training a tokenizer of {config.vocab_size} tokens", quiet=quiet):
                tokenizer = train_tokenizer(splits.training, config.vocab_size)
        temporary = run.path / ".tokenizer"
        with clear_disk_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            tokenizer.save_pretrained(temporary)
            sync_tree(temporary)
            temporary.rename(folder)
    return load_tokenizer(str(folder), trust_remote_code=config.trust_remote_code)


def _development(run: RunDirectory, config: PretrainConfig, splits: Splits, tokenizer: Any) -> np.ndarray:
    """Blocks of development text, made as those of the training text are.

    A run that goes on keeps its own, so that its losses can be compared, whatever preskip began it.
    """
    if "corpus" in run.manifest:
        with suppress(OSError, ValueError, EOFError):
            return np.load(run.path / "data" / "development.npy")
    blocks = pack_blocks(
        splits.development,
        tokenizer,
        config.seq_len,
        limit_tokens=DRAWN_FROM * config.eval_blocks * config.seq_len,
        seed=config.split_seed,
        marks=document_marks(tokenizer),
        part="development",
    )
    return blocks[: config.eval_blocks]


def _check_enough(config: PretrainConfig, plans: dict[str, Plan], packed: PackedText, splits: Splits) -> None:
    longest = max(plans.values(), key=lambda plan: plan.tokens)
    usable = packed.tokens // config.seq_len * config.seq_len
    if longest.tokens > usable and not config.repeat:
        has = f"{usable:,} training tokens, arm {longest.name} is to read {longest.tokens:,}: "
        if splits.whole:
            raise PreskipError(
                f"corpus {config.corpus} has {has}it would be read {longest.tokens / max(1, usable):.1f} times; give "
                "more text or fewer --tokens, or allow it with --repeat"
            )
        raise PreskipError(
            f"the part of corpus {config.corpus} that was read has {has}{CHARACTERS_PER_TOKEN} characters per token "
            "were read; give a tokenizer with shorter tokens, or allow text to be read again with --repeat"
        )
    if usable < config.tokens_per_step:
        raise PreskipError(
            f"corpus too small: {packed.tokens:,} training tokens do not fill one batch of {config.batch_size} x "
            f"{config.seq_len}: give more text, or lower --batch-size or --seq-len"
        )
