"""What `preskip explain` found, in sentences with their intervals, and what it cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from preskip.report.explain.measures import DIMENSIONS, Interval, measured, value_text
from preskip.runs.explain_schema import Explain

MOST_CONTRASTS = 3
NOT_COMPARED = "no intervals are known that hold for all at once."
# Measures with a sign, by where each stands in a layer: what lies above 0, what below, how a value is set.
DIRECTIONS = {
    ("alignment", "attention"): ("with attention's output it points the same way", "the opposite way", "cosine {}"),
    ("alignment", "mlp"): ("with the MLP's output it points the same way", "the opposite way", "cosine {}"),
}
CHANGES = {
    ("entropy_change",): ("spreads attention wider", "sharpens it", "{} nats"),
    ("sink_change",): ("moves mass to the first token", "takes mass from it", "{}"),
}
FEW_CLUSTERS = 10  # below which an interval is said to be known roughly


def findings(explain: Explain) -> list[tuple[str, str]]:
    """(heading, sentence) of what was found; what was not measured is left out."""
    rows = explain["layers"]
    direction, change = "; ".join(_signed(rows, DIRECTIONS)), "; it ".join(_signed(rows, CHANGES))
    found = [
        ("Where", _where(rows)),
        ("For which tokens", _which(explain.get("classes") or [])),
        *((f"Worth of the {part}", _worth(measured(rows, "ablation", part), part)) for part in ("skip", "enrichment")),
        ("Learnt or noise", _norms(rows)),
        ("Direction", direction and f"The skip's output: {direction}."),
        ("Effect on attention", change and f"The enrichment {change}."),
        ("Rank", _rank(rows, explain["model"].get("hidden_size"))),
    ]
    return [(heading, text) for heading, text in found if text]


def limits(explain: Explain) -> list[str]:
    """What these measurements cannot show, a sentence or two each."""
    texts = counted(explain)
    found = [
        f"Intervals are 95 %, by bootstrap over {extent(texts)}"
        + (": with so few they are known only roughly." if _clusters(texts) < FEW_CLUSTERS else ".")
        + " They say how a figure varies with the text, and nothing about another training seed."
    ]
    method: Any = explain.get("method") or {}
    fewer = [
        f"{words} the first {method[key]}"
        for key, words in (
            ("ablation_documents", "the ablation reads"),
            ("attention_documents", "the attention patterns read"),
        )
        if 0 < (method.get(key) or 0) < len(texts)
    ]
    if fewer:
        found.append(f"To save time, {' and '.join(fewer)} of them: fewer documents, wider intervals.")
    if any(entry["set"] != "held-out" for entry in texts):
        found.append("The texts were given by hand: they are not a sample of anything.")
    found += [
        "A ratio of norms says how large the skip is beside attention, not what it is good for: the ablation does. "
        "Where attention writes next to nothing, the ratio is large without the skip being so.",
        "Ablation switches one layer off and leaves the others as they were trained: parts that stand in for each "
        "other both look idle.",
        "Classes overlap: rare words are also longer and more often capitalised. A difference is no cause.",
        "Classes and layers are said to stand apart only where intervals of the level 1 − 0.05/m, for m classes or m "
        "layers, do not touch: those hold all at once with 95 %. Brackets and counts of layers are of single 95 % "
        "intervals, of which 1 in 20 misses by chance.",
        "Reading the skip through the final norm and the unembedding assumes that later layers pass it on unchanged.",
    ]
    if not any(layer.get("null") for layer in explain["layers"]):
        found.append("No null was trained for this branch: whether its norms exceed what noise gives is not known.")
    return found


def counted(explain: Explain) -> list[Any]:
    """The texts that the statistics are of: the held-out ones, or the given ones where there are no others."""
    sets = [entry["set"] for entry in explain["texts"]]
    chosen = "held-out" if "held-out" in sets else "given"
    return [entry for entry in explain["texts"] if entry["set"] == chosen]


def extent(texts: Sequence[Any]) -> str:
    """Number of texts and tokens in words, and of their clusters where these are fewer."""
    plural = "" if len(texts) == 1 else "s"
    within = f" in {clusters:,} clusters" if (clusters := _clusters(texts)) < len(texts) else ""
    return f"{len(texts):,} document{plural}{within}, {sum(entry['tokens'] for entry in texts):,} tokens"


def _clusters(texts: Sequence[Any]) -> int:
    """Independent ones among the texts."""
    return len({entry.get("group", number) for number, entry in enumerate(texts)})


def layers_text(indices: Sequence[int]) -> str:
    """Layers as ranges: "0–3, 7, 9–11"."""
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ranges)


def _stand_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two layers or classes differ, all of them compared at once: their widened intervals do not touch."""
    first, second = (entry.get("skip_to_attention_wide") for entry in (one, other))
    if first is None or second is None:
        return False
    return first["low"] > second["high"] or first["high"] < second["low"]


def _ratio(entry: Mapping[str, Any]) -> float:
    return entry["skip_to_attention"]["value"]


def _at_once(entries: Sequence[Any], what: str) -> str:
    """The intervals by which they are compared."""
    level = next((wide["confidence"] for e in entries if (wide := e.get("skip_to_attention_wide"))), None)
    return f"intervals of {100 * level:.2f} %, wide enough for all {len(entries)} {what} at once," if level else ""


def _where(rows: Sequence[Any]) -> str:
    sizes = [row for row in rows if row["skip_to_attention"] is not None]
    if not sizes:
        return ""
    top, bottom = (pick(sizes, key=_ratio) for pick in (max, min))
    most, least = (value_text(row["skip_to_attention"]) for row in (top, bottom))
    text = f"Most content goes round attention at layer {top['layer']}: the skip's output is {most} times as large as "
    text += "attention's."
    if top is bottom:
        return text
    text += f" Least at layer {bottom['layer']}: {least}."
    if _stand_apart(top, bottom):
        return text
    at_once = _at_once(sizes, "layers")
    return f"{text} The two do not stand apart: " + (f"{at_once} overlap." if at_once else NOT_COMPARED)


def _which(classes: Sequence[Any]) -> str:
    sized = [entry for entry in classes if entry.get("skip_to_attention")]
    dimensions = [[e for e in sized if e["dimension"] == name] for name in dict.fromkeys(e["dimension"] for e in sized)]
    if not any(len(inside) > 1 for inside in dimensions):
        return ""
    apart = [[sorted(pair, key=_ratio) for pair in combinations(own, 2) if _stand_apart(*pair)] for own in dimensions]
    clear = [max(pairs, key=_contrast) for pairs in apart if pairs]  # of each dimension the pair of the largest ratio
    clear.sort(key=_contrast, reverse=True)
    parts = [
        f"{DIMENSIONS.get(top['dimension'], top['dimension']).lower()}: "
        + " against ".join(f"{entry['class']} {value_text(entry['skip_to_attention'])}" for entry in (top, bottom))
        for bottom, top in clear[:MOST_CONTRASTS]
    ]
    at_once = _at_once(sized, "classes")
    if not parts:
        reason = f"{at_once} overlap." if at_once else NOT_COMPARED
        return f"No class of tokens stands apart from the others of its kind: {reason}"
    return f"The ratio of skip to attention differs most by {'; by '.join(parts)}. Here {at_once} do not touch."


def _contrast(pair: Sequence[Any]) -> float:
    low, high = pair
    return _ratio(high) / max(1e-12, _ratio(low))


def _worth(rows: Sequence[tuple[int, Interval]], part: str) -> str:
    if not rows:
        return ""
    helps = [layer for layer, found in rows if found["low"] > 0]
    hurts = [layer for layer, found in rows if found["high"] < 0]
    top, most = max(rows, key=lambda row: row[1]["value"])
    text = f"One layer's {part} switched off costs most at layer {top}: {value_text(most, sign=True)} bits per byte. "
    text += f"Its interval lies above 0 in {len(helps)} of {len(rows)} layers"
    text += f" ({layers_text(helps)})" if helps and len(helps) < len(rows) else ""
    text += f", below it in {len(hurts)} ({layers_text(hurts)})" if hurts else ", below it in none"
    rest = len(rows) - len(helps) - len(hurts)
    return text + (f", and includes it in {rest}." if rest else ".")


def _norms(rows: Sequence[Any]) -> str:
    banded = [row for row in rows if (row.get("null") or {}).get("skip_norm") and row.get("skip_norm") is not None]
    if not banded:
        return ""
    above = [row["layer"] for row in banded if row["skip_norm"] > row["null"]["skip_norm"]["high"]]
    below = [row["layer"] for row in banded if row["skip_norm"] < row["null"]["skip_norm"]["low"]]
    inside = len(banded) - len(above) - len(below)
    text = f"‖W_skip‖ exceeds what noise gradients give in {len(above)} of {len(banded)} layers"
    text += f" ({layers_text(above)})" if above and len(above) < len(banded) else ""
    text += f", and falls short of it in {len(below)} ({layers_text(below)})" if below else ""
    return text + (f"; in {inside} it is no larger than noise makes it." if inside else ".")


def _signed(rows: Sequence[Any], measures: Mapping[Any, tuple[str, str, str]]) -> list[str]:
    """In how many layers each measure lies above 0, in how many below, and where it is largest."""
    parts = []
    for path, (up, down, form) in measures.items():
        found = measured(rows, *path)
        if found:
            layer, most = max(found, key=lambda row: abs(row[1]["value"]))
            above, below = sum(each["low"] > 0 for _, each in found), sum(each["high"] < 0 for _, each in found)
            parts.append(
                f"{up} in {above} layer{'' if above == 1 else 's'} and {down} in {below} of {len(found)} "
                f"(strongest at layer {layer}: {form.format(value_text(most, sign=True))})"
            )
    return parts


def _rank(rows: Sequence[Any], width: int | None) -> str:
    ranks = [(row["layer"], row["effective_rank"]) for row in rows if row.get("effective_rank") is not None]
    if not ranks:
        return ""
    (low_layer, low), (high_layer, high) = (pick(ranks, key=lambda row: row[1]) for pick in (min, max))
    of = f" of {width:,}" if width else ""
    return f"The skip's effective rank runs from {low:.0f} (layer {low_layer}) to {high:.0f} (layer {high_layer}){of}."
