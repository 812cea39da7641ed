"""Paired statistics over evaluated items: intervals, tests, equivalence, the family's correction, power.

docs/statistics.md says in one page what is computed; `bootstrap` says how the intervals are made and why.
"""

from preskip.metrics import DEFAULT_MARGINS
from preskip.stats.bootstrap import RESAMPLES, RatioDistribution, bootstrap_ratio
from preskip.stats.comparisons import compare, compare_arms, summarise
from preskip.stats.distribution import CONFIDENCE, Interval
from preskip.stats.exact import holm, mcnemar
from preskip.stats.family import apply_family
from preskip.stats.paired import (
    AccuracyDifference,
    bits_per_byte,
    paired_accuracy_difference,
    paired_ratio_difference,
    word_perplexity,
)
from preskip.stats.power import Design, Needed, measured_power, needed, planned_power, resolvable
from preskip.stats.verdict import ALPHA, VERDICTS, Verdict, verdict_of

__all__ = [
    "ALPHA",
    "CONFIDENCE",
    "DEFAULT_MARGINS",
    "RESAMPLES",
    "VERDICTS",
    "AccuracyDifference",
    "Design",
    "Interval",
    "Needed",
    "RatioDistribution",
    "Verdict",
    "apply_family",
    "bits_per_byte",
    "bootstrap_ratio",
    "compare",
    "compare_arms",
    "holm",
    "mcnemar",
    "measured_power",
    "needed",
    "paired_accuracy_difference",
    "paired_ratio_difference",
    "planned_power",
    "resolvable",
    "summarise",
    "verdict_of",
    "word_perplexity",
]
