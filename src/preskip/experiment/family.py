"""The comparisons that a run declares before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from preskip.arms import REGISTRY, Arm
from preskip.evaluate.paper import COLUMNS
from preskip.runs.schema import Declared, Family, SetFacts
from preskip.stats import ALPHA, DEFAULT_MARGINS

# What is compared as it is: no reference arm, as long as there is another.
PLAIN = ("none", "base")


def declare_family(arms: Sequence[Arm], sets: Mapping[str, SetFacts]) -> Family:
    """The reference arm against the decisive others (`Arm.decisive`), on each set by its primary metric.

    The reference is `preskip` where it is compared, else the first arm that is not the plain model. The others are all
    the rest only where no decisive one is compared. The paper's own scoring is left out: it is there to be read beside
    the paper's table. With few seeds a large family finds little: three seeds and 21 comparisons need a difference of
    25 standard errors.

    Args:
        arms: what is compared.
        sets: the evaluation sets as run.json describes them.
    """
    names = [arm.name for arm in arms if arm.name not in PLAIN]
    reference = "preskip" if "preskip" in names else next(iter(names), None)
    others = [arm for arm in arms if arm.name != reference]
    others = [arm for arm in REGISTRY if arm.decisive and arm in others] or others
    declared: list[Declared] = [
        {"arm": reference, "reference": other.name, "set": name, "metric": described["primary"]}
        for other in others
        if reference is not None
        for name, described in sets.items()
        if name not in COLUMNS
    ]
    return {"declared": declared, "alpha": ALPHA, "margins": dict(DEFAULT_MARGINS)}
