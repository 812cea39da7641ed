"""What stands beside a difference, in words: its seeds, where the next would lie, who wins, whence its variance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from preskip.metrics import metric_named
from preskip.report.words.verdicts import comparison_decimals, limits_text, number, p_text
from preskip.runs.schema import Comparison, SetFacts
from preskip.runs.stored import PLAIN
from preskip.stats.detail import variance_shares
from preskip.stats.verdicts import units_of_variance

NONE = "–"


def detail_texts(entry: Comparison, described: SetFacts | None = None) -> dict[str, str]:
    """The `detail` of a comparison as shown in tables: keys by_seed, next_seed, wins, variance, sign_flip; "–" where
    there is none.

    Args:
        entry: the comparison.
        described: its evaluation set as in run.json, for the metric's direction.
    """
    detail = entry.get("detail")
    if detail is None:
        return dict.fromkeys(("by_seed", "next_seed", "wins", "variance", "sign_flip"), NONE)
    about = metric_named(entry["metric"], described)
    places = comparison_decimals(entry)
    predicted, several = detail["new_seed"], entry["seeds"] > 1
    lower, higher = (None, None) if predicted is None else (about.factor * limit for limit in predicted)
    wins = detail["probability_higher"]
    shares = variance_shares(entry["deviations"], entry["seeds"], units_of_variance(entry))
    flipped = detail["p_sign_flip"]
    return {
        "by_seed": " ".join(number(about.factor * value, places, sign=True) for value in detail["by_seed"]),
        "next_seed": limits_text(lower, higher, places),
        "wins": f"{1 - wins if about.lower_is_better else wins:.2f}" if several else NONE,
        "variance": NONE if shares is None else " / ".join(f"{100 * part:.0f}" for part in shares.values()),
        "sign_flip": NONE if flipped is None else p_text(flipped),
    }


def gain_share(
    entry: Comparison, comparisons: Iterable[Comparison], sets: Mapping[str, SetFacts]
) -> tuple[float, str] | None:
    """The margin of a comparison as a share of what its arm gains in-domain over the plain one in the same metric, and
    that arm; None without such a comparison, or where the arm gains nothing.
    """
    margin = entry.get("margin")
    arm = entry["reference"] if entry["arm"] in PLAIN else entry["arm"]
    if margin is None:
        return None
    for other in comparisons:
        described = sets.get(other["set"])
        pair = (other["arm"], other["reference"])
        if described is None or described["domain"] != "in" or other["metric"] != entry["metric"] or arm not in pair:
            continue
        if not set(pair) & set(PLAIN):
            continue
        gain = other["difference"] if other["arm"] == arm else -other["difference"]
        if metric_named(entry["metric"], described).lower_is_better:
            gain = -gain
        return (margin / gain, arm) if gain > 0 else None
    return None
