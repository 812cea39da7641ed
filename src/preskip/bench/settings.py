"""What `preskip bench` measures; importable in no time, since the command line shows its choices."""

from __future__ import annotations

from dataclasses import dataclass

# What each row is. Compiled rows are held against the compiled base.
ROWS = {
    "base": "the untouched model",
    "adapter": "Preskip as a PEFT adapter",
    "optimized": "the adapter after preskip.optimize",
    "baked": "the adapter baked into a preskip_<type> checkpoint",
    "lora": "LoRA on all layers with as many weights, not merged",
    "lora-merged": "the same LoRA merged into the base",
    "base-compiled": "the base under torch.compile",
    "adapter-compiled": "the adapter after preskip.optimize, under torch.compile",
    "baked-compiled": "the baked model after preskip.optimize, under torch.compile",
    "int8": "baked with an int8 branch, after preskip.optimize",
    "low-rank": "a skip of rank d/8, after preskip.optimize",
    "bottleneck": "an inner width of d/4 and a skip of rank d/8, after preskip.optimize",
    "last-third": "branches in the last third of the layers, after preskip.optimize",
    "last-quarter": "branches in the last quarter of the layers, after preskip.optimize",
    "skip": "the linear skip alone, after preskip.optimize",
}
# Rows that are arms of a probe, too, where their quality is measured.
CHEAP = {
    "low-rank": "preskip-lowrank-narrow",
    "bottleneck": "preskip-bottleneck",
    "last-third": "preskip-third-narrow",
    "last-quarter": "preskip-late-narrow",
    "skip": "skip",
}
COMPILED = tuple(name for name in ROWS if name.endswith("-compiled"))
WORK = ("prefill", "decode", "scoring", "training")
CACHES = ("dynamic", "static", "quantized")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One thing that is timed.

    Attributes:
        kind: one of `WORK`.
        batch: rows B.
        tokens: per row; for decode those already in the cache.
        new_tokens: decoding steps of one measurement; 0 for anything else.
        cache: one of `CACHES`, or "" without one.
    """

    kind: str
    batch: int
    tokens: int
    new_tokens: int = 0
    cache: str = ""

    @property
    def title(self) -> str:
        """In words, for tables."""
        if self.kind == "decode":
            return f"decode per token, batch {self.batch}, {self.cache} cache of {self.tokens:,} tokens"
        return f"{self.kind}, {self.batch} x {self.tokens:,} tokens"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and on what sizes.

    Attributes:
        rows: of `ROWS`.
        work: what is timed, in this order.
        compiled_work: kinds of work that compiled rows take part in; each shape is compiled, which takes minutes.
        rounds: measurements of each row, one of each per round.
    """

    rows: tuple[str, ...]
    work: tuple[Work, ...]
    compiled_work: tuple[str, ...] = ("decode",)
    rounds: int = 7
