"""Which arms' frozen first layers are computed once per batch: tried as arms are prepared, kept in the run's folder.

What the base gives to an arm's first trained layer is the same in every training on the same blocks (of other arms,
rates and controls) and in every scoring of the same windows, that of the untouched base included.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from preskip.arms.insert import Inserted
from preskip.assets import weights_dtype
from preskip.errors import PreskipError
from preskip.experiment.heldout import HeldOut
from preskip.experiment.probe_options import ProbeConfig
from preskip.progress import say
from preskip.runs.directory import RunDirectory
from preskip.runs.environment import hardware_name, version_of
from preskip.runs.schema import ReuseFacts
from preskip.train.distributed import uses_fsdp
from preskip.train.keep import kept_per_step
from preskip.train.kept_states import KeptStates
from preskip.train.prefix import FrozenPrefix, Passes

# Share of the free disk that the states may take, where weights and checkpoints leave it.
SHARE = 0.5
Way = Literal["training", "scoring"]
WAYS: tuple[Way, ...] = ("training", "scoring")


class Reuse:
    """What the arms of a run reuse of the base's first layers, in one process.

    Args:
        run: keeps the states.
        config: every option.
        base: the untouched base.
        checksum: of the base's weights, or another sign of which they are.
        quiet: do not say what is not reused.

    Attributes:
        arms: by arm what is reused; an arm that trains the first layer is not in it.
        passes: counts of the arm that was built last.
    """

    def __init__(self, run: RunDirectory, config: ProbeConfig, base: Any, checksum: str, quiet: bool) -> None:
        self.config, self.base, self.quiet = config, base, quiet
        self.arms: dict[str, ReuseFacts] = {}
        self.passes = Passes()
        self._kept = KeptStates(run.prefix, quiet=quiet)
        self._prefix: FrozenPrefix | None = None
        identity = [checksum, weights_dtype(base), base.config._attn_implementation, hardware_name(config.device)]
        identity += [version_of("torch"), version_of("transformers"), config.gradient_checkpointing]
        if config.reuse_prefix and not uses_fsdp():  # which copies the layers and cuts them
            try:
                self._prefix = FrozenPrefix(base, json.dumps(identity))
            except PreskipError:
                return  # no such list of layers

    def try_arm(self, arm: str, inserted: Inserted) -> None:
        """Find out what an arm can reuse, while it is inserted."""
        layers = self._prefix.untrained_layers(inserted.model) if self._prefix else 0
        if self._prefix is None or not layers:
            return
        facts = self.arms[arm] = {"layers": layers, "training": True, "scoring": True}
        for way in WAYS:
            fault = self._prefix.fault(inserted.model, layers, training=way == "training")
            if fault is not None:
                _leave_out(facts, way, fault)

    def settled(self, heldout: HeldOut, weights: float = 0.0) -> dict[str, ReuseFacts]:
        """What every arm reuses, without what is used once or has no room on the disk; said is what for another reason.

        Args:
            heldout: what is scored.
            weights: bytes of the disk that weights and checkpoints take, which states leave free.
        """
        self._kept.reserve += round(weights)
        self._leave_out_used_once()
        self._leave_out_without_room(heldout)
        said: dict[str, list[str]] = defaultdict(list)
        for arm, facts in self.arms.items():
            if "note" in facts:
                said[f"the first {facts['layers']} layers are computed {facts['note']}"].append(arm)
        for line, arms in said.items():
            say(f"{', '.join(arms)}: {line}", quiet=self.quiet)
        return self.arms

    def _leave_out_used_once(self) -> None:
        trainings: Counter[int] = Counter()  # by number of first layers
        again = bool(self.config.equal_step or "shuffled" in self.config.nulls)
        for arm, facts in self.arms.items():
            if facts["training"]:
                trainings[facts["layers"]] += 1 + self.config.is_tuned(arm) + again
        for facts in self.arms.values():
            if trainings[facts["layers"]] <= 1:
                facts["training"] = False

    def _leave_out_without_room(self, heldout: HeldOut) -> None:
        free = shutil.disk_usage(self._kept.folder.parent).free + self._kept.size()
        room = max(0.0, min(SHARE * free, free - self._kept.reserve))
        sizes = self._sizes(heldout)
        for way in WAYS:
            needed = sum(sizes.values())
            if sizes[way] and needed > room:
                sizes[way] = 0
                reason = f"{needed / 2**20:,.0f} MiB of states take more than their {room / 2**20:,.0f} MiB of disk"
                for facts in self.arms.values():
                    if facts[way]:
                        _leave_out(facts, way, reason)

    @contextmanager
    def active(self, arm: str) -> Iterator[None]:
        """Reuse what an arm can reuse, while it is inserted; of the untouched base, keep what the arms will read."""
        self.passes = Passes()
        facts = self.arms.get(arm)
        depths = {way: facts["layers"] if facts and facts[way] else 0 for way in WAYS}
        keep = {own["layers"] for own in self.arms.values() if own["scoring"]} if arm == "none" else set()
        if self._prefix is None or not (any(depths.values()) or keep):
            yield
            return
        with self._prefix.reused(self._kept, **depths, keep=keep) as self.passes:
            yield

    def _sizes(self, heldout: HeldOut) -> dict[Way, float]:
        """Bytes of the states by what they are kept for."""
        config = self.config
        per_token = self.base.config.get_text_config().hidden_size * getattr(torch, config.dtype).itemsize
        # Read twice: by the base and by the arm.
        kept = kept_per_step(config.batch_size) / config.batch_size if config.keep_weight else 0
        orders = len(config.seeds) * (1 + bool(config.tuned_arms))
        tokens: dict[Way, int] = {
            "training": round(orders * config.steps * config.batch_size * config.seq_len * (1 + 2 * kept)),
            "scoring": heldout.scored_tokens + heldout.development_tokens,
        }
        return {way: per_token * tokens[way] * len({f["layers"] for f in self.arms.values() if f[way]}) for way in WAYS}


def _leave_out(facts: ReuseFacts, way: Way, reason: str) -> None:
    facts[way] = False
    facts["note"] = "; ".join([*filter(None, [facts.get("note")]), f"in every pass of {way}: {reason}"])
