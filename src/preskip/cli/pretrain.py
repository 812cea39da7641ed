"""`preskip pretrain`: train an architecture from scratch, with and without the branch, beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.cli.options import Json, options_of
from preskip.cli.runs import Course, Executor, OptionFile, Out, RayAddress, Resume, Workers, make_run
from preskip.experiment.pretrain_options import PretrainConfig

if TYPE_CHECKING:
    from preskip.arms.plan import Plan
    from preskip.runs.schema import Manifest, Results


@options_of(PretrainConfig)
def pretrain(
    *,
    config: OptionFile = None,
    workers: Workers = 1,
    executor: Executor = "local",
    ray_address: RayAddress = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train an architecture from scratch with Preskip, beside plain models of equal weights and of equal compute.

    Without arguments it trains four arms of about a million weights on the embedded corpus.
    """
    course = Course(
        kind=PretrainConfig,
        announce=_announcement,
        show=_show,
        executor=executor,
        ray_address=ray_address,
        workers=workers,
        show_plans=print_plans,
    )
    make_run(course, given, config=config, out=out, resume=resume, as_json=as_json)


def print_plans(plans: Mapping[str, Plan]) -> None:
    """Print what is trained: weights, compute and tokens of every arm, and how near it comes to preskip's."""
    from preskip.cli.printing import columns, print_table

    figures = ("layers", "MLP", "weights", "non-emb.", "MFLOP/token", "tokens", "steps", "training PFLOP")
    table = columns("arm", right=figures, last="against preskip")
    for name, plan in plans.items():
        matched = f"{plan.matched} {plan.deviation:+.2%}" if plan.matched and plan.deviation is not None else "–"
        table.add_row(
            name,
            str(plan.config.num_hidden_layers),
            str(plan.mlp_width),
            f"{plan.size.parameters:,}",
            f"{plan.size.non_embedding:,}",
            f"{plan.size.flops_per_token / 1e6:,.2f}",
            f"{plan.tokens:,}",
            f"{plan.steps:,}",
            f"{plan.training_flops / 1e15:,.3g}",
            matched,
        )
    print_table(table, stderr=True)


def _announcement(config: Mapping[str, Any], reason: str) -> list[str]:
    return [
        f"architecture {config['arch']}, corpus {config['corpus']}, {config['device']}",
        f"weights float32, computed in {config['dtype']}",
        *(
            [f"layer {config['layers'][0]} alone gets a branch; the depth is --num-layers"]
            if len(config["layers"] or ()) == 1
            else []
        ),
    ]


def _show(record: Manifest, results: Results, page: Path | None) -> None:
    from preskip.cli.tables import print_results

    print_results(results, page)
