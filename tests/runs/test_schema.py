"""The schema against what is stored: every file under results/ has the keys that its type names, and no other."""

from pathlib import Path
from typing import Any

import pytest
from typing_extensions import TypedDict

from conforming import RUN_FILES, faults, file_faults
from preskip.errors import PreskipError
from preskip.runs import environment, explain_schema, schema

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(
    path.parent for pattern in ("*", "unfinished/*", "peers/*/*") for path in RESULTS.glob(f"{pattern}/run.json")
)


class SweepRow(TypedDict):
    """A row of benchmarks/pretrain_lr_sweep.py."""

    width: int
    learning_rate: float
    arm: str
    development_loss: float | None  # null where it diverged


class Sweep(TypedDict):
    """The output of benchmarks/pretrain_lr_sweep.py."""

    settings: dict[str, Any]
    environment: schema.Environment
    rows: list[SweepRow]


class Ratio(TypedDict):
    """A ratio over the rounds of a measurement."""

    median: float
    low: float
    high: float


class Throughput(TypedDict):
    """The output of benchmarks/pretrain_throughput.py."""

    settings: dict[str, Any]
    environment: schema.Environment
    peak_flops: float
    forward_flops_per_token: dict[str, int]
    rounds: list[dict[str, dict[str, float]]]
    tokens_per_second: dict[str, float]
    preskip_to_base_by_flops: float
    base_to_plain_wall: Ratio
    base_to_plain_processor: Ratio
    preskip_to_base_wall: Ratio
    preskip_to_base_processor: Ratio


class Bench(TypedDict):
    """The output of `preskip bench --json`."""

    model: str
    adapter: str | None
    dtype: str
    environment: schema.Environment
    rows: dict[str, dict[str, float]]
    left_out: dict[str, str]
    layers: dict[str, int | None]
    limits: dict[str, float]
    rounds: int
    work: list[dict[str, Any]]


class CheapForms(TypedDict):
    """The output of benchmarks/cheap_forms.py."""

    model: str
    corpus: str
    dtype: str
    design: dict[str, int]
    seeds: list[int]
    threads: int
    learning_rates: dict[str, float]
    weights: dict[str, int]
    comparisons: list[dict[str, Any]]


class BySeed(TypedDict):
    """A figure of trainings with a branch in two dtypes."""

    bfloat16: list[float]
    float32: list[float]
    differences: list[float]
    mean_difference: float
    deviation_between_seeds: float
    within: bool


class BranchDtype(TypedDict):
    """The output of benchmarks/branch_dtype.py."""

    model: str
    corpus: str
    design: dict[str, float]
    seeds: list[int]
    threads: int
    loss_of_last_steps: BySeed
    largest_difference_of_a_step: float
    bits_per_byte: BySeed
    interval: dict[str, Any]
    moved_share: dict[str, float]


BENCHMARKS = {
    "pretrain-lr-sweep/*.json": Sweep,
    "pretrain-throughput/*.json": Throughput,
    "cheap-forms/bench.json": Bench,
    "cheap-forms/quality.json": CheapForms,
    "branch-dtype/*.json": BranchDtype,
    "peers/*/rates.json": dict[str, dict[str, float | None]],  # null where it diverged
}


def test_every_stored_file_conforms():
    kinds = {
        path: kind
        for run in RUNS
        for pattern, kind in RUN_FILES.items()
        for path in [*run.glob(pattern), *run.glob(f"{pattern}.gz")]
    }
    kinds |= {path: kind for pattern, kind in BENCHMARKS.items() for path in RESULTS.glob(pattern)}
    drawn = set(RESULTS.glob("peers/*/loss.svg"))  # by benchmarks/scratch_report.py, not kept
    assert {path for path in RESULTS.rglob("*") if path.is_file()} - drawn == set(kinds)
    kept = {"standard-wikitext2", "standard-books", "scratch-books", "confirmatory-smollm2-wikitext2"}
    kept |= {"confirmatory-smollm2-books24"}
    kept |= {"confirmatory-gemma-3-270m-wikitext2", "confirmatory-gemma-3-270m-books24"}
    kept |= {f"peers/llama-1m/{part}" for part in ("study", "speed")}
    assert {str(run.relative_to(RESULTS)) for run in RUNS} == kept
    assert {run.parent.name for run in RUNS if not (run / "results.json").is_file()} <= {"unfinished"}
    assert [fault for path, kind in kinds.items() for fault in file_faults(path, kind)] == []


def test_this_environment_conforms():
    assert list(faults(environment.describe("cpu"), schema.Environment)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"set": None}, ["x.set: None in place of <class 'str'>"]),
        ({"more": 1}, ["x: unknown key 'more' of DocumentRecord"]),
        ({"tokens": 1.5}, ["x.tokens: 1.5 in place of <class 'int'>"]),
        ({"tokens": True}, ["x.tokens: True in place of <class 'int'>"]),
        ({"kind": "text"}, ["x.kind: 'text' is none of 'document'"]),
        ({"nll": 3}, []),
        ({"cluster": None}, []),
        ({"cluster": 3}, ["x.cluster: 3 in place of <class 'str'>"]),
    ],
)
def test_faults_are_found(change, expected):
    record = {"set": "a", "kind": "document", "id": "b", "nll": 1.0, "tokens": 1, "bytes": 2, "words": 1}
    assert list(faults({**record, **change}, schema.DocumentRecord, "x")) == expected
    assert list(faults({**record, **change}, schema.Record, "x")) == expected
    assert len(list(faults({}, schema.DocumentRecord, "x"))) == len(record)
    assert list(faults([], schema.DocumentRecord, "x")) == ["x: list in place of DocumentRecord"]


@pytest.mark.parametrize(("content", "found"), [({"schema_version": 1}, "1"), ({}, "None"), ([], "None")])
def test_another_version_is_refused(content, found):
    schema.check_version(Path("run.json"), {"schema_version": 2})
    schema.check_version(Path("explain.json"), {"schema_version": 1}, explain_schema.EXPLAIN_VERSION)
    with pytest.raises(PreskipError, match=f"run.json has schema_version {found}, this preskip .* reads 2: use"):
        schema.check_version(Path("run.json"), content)
