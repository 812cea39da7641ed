"""Published figures to hold one's own against: EleutherAI's of the untouched Pythias, and the paper's table.

Both are data files beside this module, with their sources.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.runs.schema import PublishedDistance
from preskip.stats import CONFIDENCE

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others measured of one untouched model.

    Attributes:
        model: its name, such as pythia-160m.
        checkpoint: the checkpoint that was measured.
        source: where the figures stand.
        tasks: {task: {metric: value}}, metrics such as acc, acc_stderr, ppl; not every model has every task.
    """

    model: str
    checkpoint: str
    source: str
    tasks: dict[str, dict[str, float]]


def published_models() -> tuple[str, ...]:
    """Names of the models with published figures."""
    return tuple(_read("pythia.json")["models"])


def published_figures(model: str) -> Published:
    """The published figures of one of `published_models`.

    Raises:
        PreskipError: there are none.
    """
    content = _read("pythia.json")
    if model not in content["models"]:
        raise PreskipError(f"no published figures of {model!r}: choose one of {', '.join(content['models'])}")
    return Published(model=model, checkpoint=content["checkpoint"], **content["models"][model])


def recognise_published(name: str, config: Any = None) -> str | None:
    """Which published model a name or configuration is, if any.

    Deduplicated models, other seeds and early versions (`pythia-160m-deduped`, `-seed1`, `-v0`) have other figures and
    are not recognised.

    Args:
        name: Hub id or path as the user wrote it.
        config: the model's configuration, whose `_name_or_path` a copied folder may keep.
    """
    for candidate in (name, str(getattr(config, "_name_or_path", "") or "")):
        last = re.split(r"[/\\]", candidate.rstrip("/\\"))[-1].lower()
        if last in published_models():
            return last
    return None


def paper_table(model: str | None) -> dict[str, dict[str, float]] | None:
    """The paper's table of a model: {arm: {"trainable_parameters", and the sets of `preskip.evaluate.paper.COLUMNS`}}.

    It has pythia-160m and pythia-410m; None is returned for any other, and for None.
    """
    return _read("shinde2026.json")["tables"].get(model or "")


def accuracy_distance(correct: int, items: int, published: float) -> PublishedDistance:
    """The accuracy of `correct` of `items` minus a published one, with Wilson's interval of the measured one.

    The published figure counts as exact: on the whole set a faithful evaluation agrees with it to the last digits, on a
    sample the interval says how far chance alone can carry.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, items).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "measured": correct / items,
        "published": published,
        "difference": correct / items - published,
        "low": float(interval.low) - published,
        "high": float(interval.high) - published,
        "confidence": CONFIDENCE,
        "items": items,
        "agrees": bool(interval.low <= published <= interval.high),
    }


def perplexity_distance(nll: list[float], published: float) -> PublishedDistance:
    """Perplexity of LAMBADA's last words as lm-eval has it, exp of the mean nats of an item, beside a published one."""
    measured = math.exp(sum(nll) / len(nll))
    return {"measured": measured, "published": published, "ratio": measured / published, "items": len(nll)}


@cache
def _read(name: str) -> Any:
    return json.loads((_DATA / name).read_text(encoding="utf-8"))
