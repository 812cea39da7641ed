"""Paired statistics over evaluated items: intervals, tests, equivalence, the family's correction, power, trends.

docs/statistics.md says in one page what is computed; `bootstrap` says how the intervals are made and why.
"""

from preskip.metrics import DEFAULT_MARGINS
from preskip.stats.bootstrap import RESAMPLES, RatioDistribution, bootstrap_ratio
from preskip.stats.comparisons import compare, compare_arms, looks_without_seeds, summarise
from preskip.stats.designs import Design, Needed, needed, resolvable
from preskip.stats.families import apply_family, holm
from preskip.stats.intervals import CONFIDENCE, Interval
from preskip.stats.power import measured_power, planned_power
from preskip.stats.tests import AccuracyDifference, mcnemar, paired_accuracy_difference, paired_ratio_difference
from preskip.stats.verdicts import ALPHA, Verdict, verdict_of

__all__ = [
    "ALPHA",
    "CONFIDENCE",
    "DEFAULT_MARGINS",
    "RESAMPLES",
    "AccuracyDifference",
    "Design",
    "Interval",
    "Needed",
    "RatioDistribution",
    "Verdict",
    "apply_family",
    "bootstrap_ratio",
    "compare",
    "compare_arms",
    "holm",
    "looks_without_seeds",
    "mcnemar",
    "measured_power",
    "needed",
    "paired_accuracy_difference",
    "paired_ratio_difference",
    "planned_power",
    "resolvable",
    "summarise",
    "verdict_of",
]
