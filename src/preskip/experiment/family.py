"""The comparisons that a run declares before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from preskip.arms import REGISTRY, Arm
from preskip.evaluate.paper import COLUMNS
from preskip.experiment.parse import check_primary
from preskip.runs.schema import Declared, Family, SetFacts
from preskip.runs.stored import PLAIN, UNTRAINED
from preskip.stats import ALPHA, DEFAULT_MARGINS


def declare_family(
    arms: Sequence[Arm], sets: Mapping[str, SetFacts], primary: Sequence[str] = (), looks: Sequence[int] = ()
) -> Family:
    """The reference arm against the decisive others (`Arm.decisive`), on each set by its primary metric.

    The reference is `preskip` where it is compared, else the first arm that is not the plain model. The others are all
    the rest only where no decisive one is compared. The paper's own scoring is left out: it is there to be read beside
    the paper's table. With few seeds a large family finds little: three seeds and 21 comparisons need a difference of
    25 standard errors.

    The primary comparison alone has level 1: against the first of the others that is trained as the reference is, on
    the first in-domain set. Before it, with level 0, comes the reference against the untouched model on that set:
    whether it learned anything. All others have level 2, from scratch that against the plain model, too, which is
    trained as well as the reference is: a difference from it is a question, not a check.

    Args:
        arms: what is compared.
        sets: the evaluation sets as run.json describes them.
        primary: arm, reference, and maybe a set, in place of these; the arm is the reference arm of all comparisons.
        looks: numbers of seeds at which the comparisons are looked at.

    Raises:
        PreskipError: the primary comparison names a set that is not scored.
    """
    names = [arm.name for arm in arms if arm.name not in PLAIN]  # as long as there is another
    reference = primary[0] if primary else "preskip" if "preskip" in names else next(iter(names), None)
    others = [arm.name for arm in arms if arm.name != reference]
    others = [arm.name for arm in REGISTRY if arm.decisive and arm.name in others] or others
    if primary and primary[1] not in others:
        others.append(primary[1])
    scored = [name for name in sets if name not in COLUMNS]
    wanted = primary[2] if len(primary) > 2 else next((name for name in scored if sets[name].get("domain") == "in"), "")
    check_primary(primary, scored)
    against = primary[1] if primary else next((name for name in others if name not in PLAIN), next(iter(others), None))
    text = wanted or scored[0] if scored else ""

    def level(other: str, name: str) -> int:
        if (other, name) == (against, text):
            return 1
        return 0 if (other, name) == (UNTRAINED, text) else 2

    declared: list[Declared] = [
        {
            "arm": reference,
            "reference": other,
            "set": name,
            "metric": sets[name]["primary"],
            "level": level(other, name),
        }
        for other in others
        if reference is not None
        for name in scored
    ]
    declared.sort(key=lambda entry: entry["level"])
    family: Family = {
        "declared": declared,
        "procedure": "gatekeeping",
        "alpha": ALPHA,
        "margins": dict(DEFAULT_MARGINS),
    }
    if looks:
        family["looks"] = list(looks)
    return family
