"""`preskip probe`: insert, train frozen, evaluate, compare, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.cli.options import Json, options_of
from preskip.cli.runs import Course, Executor, OptionFile, Out, RayAddress, Resume, Workers, make_run
from preskip.experiment.probe_options import ProbeConfig

if TYPE_CHECKING:
    from preskip.runs.schema import Manifest, Results


@options_of(ProbeConfig)
def probe(
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
    """Insert Preskip into a frozen model, train it beside LoRA of the same size, and compare.

    Without arguments it runs the embedded model on the embedded corpus, in a few minutes on two cores.
    """
    course = Course(
        kind=ProbeConfig,
        announce=_announcement,
        show=_show,
        executor=executor,
        ray_address=ray_address,
        workers=workers,
    )
    make_run(course, given, config=config, out=out, resume=resume, as_json=as_json)


def _announcement(config: Mapping[str, Any], reason: str) -> list[str]:
    return [
        f"model {config['model']}, corpus {config['corpus']}, {config['device']}",
        f"base weights {config['dtype']} ({reason}), inserted weights float32",
    ]


def _show(record: Manifest, results: Results, page: Path | None) -> None:
    from preskip.cli.audit import print_audit
    from preskip.cli.tables import print_claims, print_paper, print_results

    print_results(results, page)
    print_paper(results)
    print_claims(record, results)
    if "dtype_audit" in results:
        print_audit(results["dtype_audit"])
