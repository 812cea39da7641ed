"""What every stored file of a run holds, key by key, and the one version that this preskip writes and reads.

Learning rates are peaks, times seconds. `None` is JSON's null. A key that is `NotRequired` is left out where it does
not apply, or in files older than the key.
"""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict

from preskip.errors import PreskipError
from preskip.version import __version__

SCHEMA_VERSION = 2  # of run.json and results.json, and with them of every file of a run

Kind = Literal["document", "item"]
Domain = Literal["in", "out"]
Status = Literal["running", "finished", "failed", "interrupted", "diverged"]
Verdict = Literal["better", "worse", "equivalent", "undecided", "too few units"]


def check_version(path: Path, content: Any, version: int = SCHEMA_VERSION) -> None:
    """Refuse a stored file whose content states another schema version than this preskip reads, or none."""
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != version:
        raise PreskipError(
            f"{path} has schema_version {found!r}, this preskip {__version__} reads {version}: use the preskip version "
            "that wrote it"
        )


class Limits(TypedDict):
    """A value and its interval, 95 % where nothing else is said."""

    value: float
    low: float
    high: float


class MetricValue(Limits):
    """A value and its interval, with the interval's level."""

    confidence: float  # 0 to 1


Metrics: TypeAlias = dict[str, dict[str, MetricValue]]  # by set and metric


class Environment(TypedDict):
    """What a run was computed on; a package's version is None where it is not installed."""

    python: str
    platform: str
    processor: str
    cores: int  # that the process may use
    threads: int  # of torch
    memory_bytes: int  # of the machine
    device: str  # "cpu", or the accelerator's name
    preskip: NotRequired[str]
    commit: NotRequired[str | None]  # of this code, "+changes" behind it; None where nothing tells
    torch: str | None
    transformers: str | None
    peft: str | None
    accelerate: str | None
    datasets: str | None
    tokenizers: str | None
    safetensors: str | None
    numpy: str | None
    scipy: NotRequired[str | None]
    lm_eval: NotRequired[str | None]


class LmEvalFacts(TypedDict):
    """What lm-eval makes of a task."""

    version: float | str  # of the task
    num_fewshot: int
    examples_drawn: NotRequired[bool]  # whether few-shot examples are drawn at random, one item after another
    prompt_sha256: str  # of everything that makes its prompts and metrics
    of: int  # items of the whole set
    sample_seed: int | None  # of the random sample; None for the whole set


class Sample(TypedDict):
    """Which documents of a corpus `preskip eval` scores."""

    of: int  # documents of the whole corpus
    seed: int | None  # of the random sample; None for the whole corpus


class SetFacts(TypedDict):
    """One evaluation set: whole documents, or items with a score each."""

    kind: Kind
    domain: Domain  # whether its texts are of the training corpus
    title: str
    source: str
    sha256: str | None  # of its texts; None from the Hub
    context_length: int | None  # most tokens read at once; None without a limit
    stride: int | None  # tokens scored per window behind the first; None for items
    reopened: NotRequired[int | None]  # the start token that begins later windows of a document, if any
    primary: str  # the metric that it is judged by
    documents: NotRequired[int]  # of kind "document"
    tokens: NotRequired[int]  # scored, of kind "document"
    bytes: NotRequired[int]  # UTF-8, of kind "document"
    words: NotRequired[int]  # of kind "document"
    items: NotRequired[int]  # of kind "item"
    clusters: NotRequired[int]  # groups of documents or items that are resampled whole
    unit_freedom: NotRequired[float]  # of the variance over units of kind "document": fewer where sizes differ
    lm_eval: NotRequired[LmEvalFacts]  # of a task of lm-eval
    higher_is_better: NotRequired[dict[str, bool]]  # by metric, as lm-eval states it of a task
    sample: NotRequired[Sample]  # of a text of `preskip eval`
    notes: NotRequired[list[str]]  # what was left out of it, and why


class Declared(TypedDict):
    """A comparison declared before training: arm minus reference."""

    arm: str
    reference: str
    set: str
    metric: str
    level: NotRequired[int]  # of a gatekeeping family: the lowest is tested first, 1 is the primary comparison


class Family(TypedDict):
    """The comparisons declared before training, whose chance of any false discovery is held at alpha."""

    declared: list[Declared]
    procedure: NotRequired[Literal["gatekeeping"]]  # left out: Holm over all, equivalence not corrected
    looks: NotRequired[list[int]]  # numbers of seeds at which the comparisons are looked at, as more seeds are added
    alpha: float
    margins: dict[str, float]  # largest difference that counts as none, by "metric" or "set.metric", in its unit


class Declaration(TypedDict):
    """What a run has declared before training."""

    sha256: str  # of the content as JSON with sorted keys
    time: str  # ISO 8601, UTC
    content: dict[str, Any]  # options, family, and the checksums of model, corpus and evaluation sets


class Extension(TypedDict):
    """Seeds that were added to a run."""

    time: str  # ISO 8601, UTC
    before: list[int]
    seeds: list[int]  # that were added
    planned: bool  # whether a look at so many seeds was declared before training


class ModelFacts(TypedDict):
    """The model of a run: the frozen base, or the architecture that is trained from scratch."""

    name: str  # as the user gave it
    type: str  # transformers' model_type of the plain model
    parameters: int
    layers: int
    hidden_size: int
    dtype: str  # of the weights
    stacked_experts: NotRequired[float]  # share of the weights; absent from scratch and in earlier runs
    attn_implementation: str
    source: str
    sha256: str | None  # of the weights; from scratch of architecture and tokenizer
    revision: NotRequired[str | None]  # on the Hub
    vocab_size: NotRequired[int]  # from scratch


class CorpusFacts(TypedDict):
    """The training corpus, and how much of it is used."""

    name: str  # as the user gave it
    training_documents: int
    training_tokens: int  # there are; a training may read fewer, or some of them again
    training_passes: float  # how often the longest training reads them
    development_documents: int
    heldout_documents: int
    source: str
    sha256: str | None  # of its texts
    packed_sha256: NotRequired[str]  # from scratch: of the packed tokens
    documents_read: NotRequired[int]  # from scratch, as the next two: of a corpus without end, the part that was read
    characters_read: NotRequired[int]
    read_whole: NotRequired[bool]


class TokenizerFacts(TypedDict):
    """The tokenizer: of the base, or that of arms which are trained from scratch."""

    source: str
    vocab_size: int
    sha256: str
    opening: NotRequired[int | None]  # the start token that begins every block and window; absent in earlier runs
    start_gain: NotRequired[float | None]  # see `preskip.evaluate.training_text`
    special_loss: NotRequired[dict[str, float] | None]  # see there


class ArmCosts(TypedDict):
    """What an arm costs, and how it is matched."""

    learning_rate: float | None  # None where nothing is trained; of the first seed, where each has its own
    learning_rates: NotRequired[dict[str, float]]  # by seed, where each has its own
    budget: str  # how its number of trained weights relates to the reference's: matched, smaller, floor, ceiling, ...
    base_dtype: str
    adapter_dtype: str | None  # None where nothing is trained
    compute_dtype: str
    attn_implementation: str
    forward_flops_per_token: int
    matched: NotRequired[str | None]  # from scratch, as all below: what it has in common with preskip
    deviation: NotRequired[float | None]  # relative difference from preskip in what is matched
    parameters: NotRequired[int]
    non_embedding: NotRequired[int]  # parameters without token and position embeddings
    training_flops: NotRequired[int]
    steps: NotRequired[int]
    tokens: NotRequired[int]  # of the training


class ReuseFacts(TypedDict):
    """What an arm reuses of the frozen base."""

    layers: int  # first layers, before any trained weight
    training: bool  # whether they are computed once per batch of training
    scoring: bool  # whether they are computed once per batch that is scored
    note: NotRequired[str]  # when they are computed in every pass all the same, and why


class PassCounts(TypedDict):
    """Forward passes of a cell."""

    passes: int  # that could reuse the frozen first layers' output, or be kept for others
    reused: int  # that did


class ArmFacts(ArmCosts):
    """An arm as it is prepared."""

    description: str
    trainable_parameters: NotRequired[int]  # frozen
    settings: NotRequired[dict[str, Any]]  # frozen: of its adapters' configurations
    reuse: NotRequired[ReuseFacts]  # frozen; left out where the first layer is trained
    flops_per_token: NotRequired[int]  # from scratch, as all below; the same as forward_flops_per_token
    hidden_size: NotRequired[int]
    layers: NotRequired[int]
    mlp_width: NotRequired[int]


class RunKind(TypedDict, total=False):
    """Which command made a run."""

    kind: Literal["pretrain"]  # left out of a run on a frozen model


class Facts(RunKind, total=False):
    """What run.json comes to hold as a run goes on."""

    model: ModelFacts
    corpus: CorpusFacts
    tokenizer: TokenizerFacts  # not in runs of an earlier preskip on a frozen base
    environment: Environment  # of the last attempt
    earlier_environments: list[Environment]  # others in which parts of the run may have been computed
    arms: dict[str, ArmFacts]  # in the order in which they are shown
    seeds: list[int]
    sets: dict[str, SetFacts]
    family: Family
    declaration: Declaration  # not in runs of an earlier preskip
    extensions: list[Extension]  # where seeds were added
    published: str | None  # name of the published model that the base is
    peak_flops: float  # from scratch: per second, what utilisation is held against
    peak_flops_source: str  # from scratch: "as given" or "measured matmul"
    # Seconds by stage, and "total", over all attempts but those that were killed. "train" and "evaluate" are of cells
    # that came through, side by side with several workers.
    timings: dict[str, float]
    peak_memory_bytes: int  # the largest of any arm


class Manifest(Facts):
    """run.json: what was asked for, on what it ran, and how far it is."""

    schema_version: int
    preskip_version: str
    status: Status
    created: str  # ISO 8601, UTC
    finished: str | None
    command: list[str]
    directory: str  # where it was started
    config: dict[str, Any]  # every option, device and dtype as resolved


class HeldOutDocument(TypedDict):
    """A document that is scored after training."""

    id: str
    text: str
    group: NotRequired[str]  # of pieces of one book, versions of one speech


class HeldOutSet(TypedDict):
    """An entry of data/heldout.json: one evaluation set."""

    name: str
    documents: list[HeldOutDocument]


class DocumentRecord(TypedDict):
    """A line of items.jsonl: one document."""

    set: str
    kind: Literal["document"]
    id: str
    nll: float | None  # nats, summed over the scored tokens; None where it has failed
    tokens: int  # scored
    bytes: int  # UTF-8, of the scored text
    words: int  # of the scored text; 0 where it has none (`preskip.data.words`)
    cluster: NotRequired[str | None]  # with others of which it is resampled
    failed: NotRequired[str]  # why it has no score: it is left out


class ItemRecord(TypedDict):
    """A line of items.jsonl: one item."""

    set: str
    kind: Literal["item"]
    id: str
    scores: dict[str, float]  # by metric; empty where it has failed
    failed: NotRequired[str]  # why it has no score: it is left out
    cluster: NotRequired[str | None]  # with others of which it is resampled
    tokens: NotRequired[int]  # of a last word
    target: NotRequired[str]  # the last word


Record: TypeAlias = DocumentRecord | ItemRecord


class StepRow(TypedDict):
    """A line of train.jsonl: one optimiser step; from scratch as many as `log_steps` says."""

    step: int
    loss: float | None  # nats per token; None on gradients of noise
    learning_rate: float  # from scratch of all but the branch
    grad_norm: float  # before clipping
    tokens: int  # with padding, where --packing paragraphs pads
    seconds: float
    step_ratio: NotRequired[dict[str, float]]  # equal steps: the common ‖ΔW‖ / ‖W‖ by part of the branch
    keep_kl: NotRequired[float]  # --keep-weight: KL(base ‖ arm) out of domain, nats per token, before the step
    tokens_per_second: NotRequired[float]  # from scratch, as all below
    mfu: NotRequired[float]  # model FLOPs utilisation, 0 to 1
    eval_loss: NotRequired[float]  # nats per token of the development blocks, where it was evaluated


class Sums(TypedDict):
    """A ratio's numerators and denominators by document."""

    above: list[float]
    below: list[float]


class NormRow(TypedDict):
    """Frobenius norms of one layer's branch; 0 for an absent part."""

    layer: int
    up_norm: float
    down_norm: float
    skip_norm: float


class DepthRow(NormRow):
    """One layer's branch: its norms, and its functional sizes on held-out text (None for an absent part)."""

    skip_to_attention: float | None  # Σ‖skip output‖ / Σ‖attention output‖ over tokens
    enrichment: float | None  # Σ‖x̃ − x̂‖ / Σ‖x̂‖ over tokens
    skip_to_attention_low: NotRequired[float | None]  # 95 % over documents, as the next three
    skip_to_attention_high: NotRequired[float | None]
    enrichment_low: NotRequired[float | None]
    enrichment_high: NotRequired[float | None]
    documents: NotRequired[dict[str, Sums]]  # by size; in cell.json alone


class AblationRow(TypedDict):
    """What one part of one layer is worth: bits per byte without it minus with it, 95 % over documents."""

    layer: int
    part: str  # "skip", "enrichment" or "both"
    difference: float
    low: float
    high: float
    documents: NotRequired[Sums]  # nats, and bytes · ln 2; in cell.json alone


class CellSummary(TypedDict):
    """cell.json: one arm trained with one seed, and scored."""

    arm: str
    seed: int
    trainable_parameters: int
    learning_rate: float | None  # None where nothing is trained
    steps: int
    final_training_loss: float | None  # nats per token; from scratch the mean of the last twentieth of the log
    seconds_per_step: float | None  # median
    peak_memory_bytes: int
    hardware: NotRequired[str]  # the processor's or accelerator's name
    train_seconds: float  # of a training that was resumed at least that of its steps
    evaluate_seconds: float
    depth: list[DepthRow]  # empty without a branch
    kv_cache_bytes_per_token: NotRequired[float | None]  # frozen; None where the model keeps none
    ablation: NotRequired[list[AblationRow]]  # frozen
    reuse: NotRequired[PassCounts]  # frozen; left out where nothing could be reused
    tokens: NotRequired[int]  # from scratch, as all below: of the training
    final_eval_loss: NotRequired[float | None]  # nats per token of the development blocks
    tokens_per_second: NotRequired[float]  # median
    mfu: NotRequired[float | None]  # median
    declaration: NotRequired[str]  # SHA-256 of what the run had declared
    notes: NotRequired[list[str]]  # what could not be computed of it, and why


class ControlSummary(TypedDict):
    """cell.json of a null or control of the depth picture."""

    arm: str
    seed: int
    control: str  # "noise", "shuffled" or "equal_step"
    depth: list[DepthRow]


# Bits per byte, arm minus untouched model, on development documents of the corpus ("in") and of other sets by name.
Development = TypedDict("Development", {"in": Limits, "out": dict[str, Limits]})


class Trial(TypedDict):
    """trial.json: one training of the search for a learning rate."""

    rung: int
    steps: int
    learning_rate: float
    seed: int  # of its initialisation and data order
    for_seed: NotRequired[int]  # training seed whose rate is searched; left out where one search serves all
    dev: Development | None  # None where it diverged
    kept: bool  # whether the search went on with it
    diverged: bool


class Search(TypedDict):
    """search.json: an arm's learning rate, and how it was found."""

    default: float
    chosen: float  # in results.json for the first seed
    extended: bool  # whether rates beyond the first grid were tried
    within_harm: NotRequired[bool]  # `--lr-rule frontier`: whether the chosen rate does no more harm than was allowed
    by_seed: NotRequired[dict[str, float]]  # in results.json: the rate chosen for each training seed
    trace: list[Trial]
    rule: NotRequired[int]  # version of what the search does; left out in results.json


class DtypeFacts(TypedDict):
    """The untouched base in one dtype."""

    weights: str
    computes: str
    seconds: NotRequired[float]  # left out where arm none had been scored in it
    metrics: Metrics


class PublishedDistance(TypedDict):
    """A measured figure beside a published one: an accuracy with its interval, or a perplexity with their ratio."""

    measured: float
    published: float
    items: int
    difference: NotRequired[float]  # of an accuracy, as the next four
    low: NotRequired[float]
    high: NotRequired[float]
    confidence: NotRequired[float]
    agrees: NotRequired[bool]
    ratio: NotRequired[float]  # of a perplexity


class PublishedAudit(TypedDict):
    """Distances of each dtype to the published figures."""

    model: str
    checkpoint: str
    source: str
    distances: dict[str, dict[str, dict[str, PublishedDistance]]]  # by dtype, task and metric


class Deviations(TypedDict):
    """Standard deviations of one seed, one unit, and one seed on one unit; None where they cannot be told apart."""

    seed: float | None
    unit: float
    residual: float | None


class Detail(TypedDict):
    """What stands beside a paired difference."""

    by_seed: list[float]  # the difference of each paired seed
    new_seed: list[float] | None  # low, high of one more seed's prediction interval; None with one seed, or where
    # no answer differs
    probability_higher: float  # that the arm's figure is higher than the reference's, over all pairs of seeds
    p_sign_flip: float | None  # randomisation test over units or clusters; None where there are over 40
    unit_freedom: float | None  # degrees of freedom of the variance over units


class Looked(TypedDict):
    """A declared comparison at the looks so far: p-values and limits adjusted for all that were declared."""

    seeds: int  # at the last of these looks
    level: float  # two-sided, that p is held to at this look
    low: float  # at 1 - level
    high: float
    p_value: float  # the smallest level of all looks together at which one so far would have decided
    p_equivalence: float | None


class PairedDifference(Declared):
    """Arm minus reference on one set and metric, paired on seeds and item ids."""

    difference: float
    low: float
    high: float
    confidence: float
    seeds: int
    units: int  # documents or items
    unit: Kind
    clusters: int | None  # resampled in place of units; None where units are independent; 1: all units of one cluster
    covers: str  # what the interval is over
    gained: int | None  # items on which the arm is right more often; None where scores are not right or wrong
    lost: int | None
    p_value: float  # two-sided
    deviations: Deviations
    margin: float | None  # largest difference that counts as none; None where none is stated
    p_equivalence: float | None
    detail: NotRequired[Detail]
    looked: NotRequired[Looked]  # of a declared comparison, where looks were declared


class Comparison(PairedDifference):
    """A paired difference, judged within the family."""

    declared: bool  # before training
    p_holm: float | None  # p adjusted by the family's procedure; None where it was not declared
    p_equivalence_holm: NotRequired[float | None]  # the same of the equivalence, by Holm; of a gatekeeping family
    verdict: Verdict


class DesignFacts(TypedDict):
    """A paired comparison's size, and its standard deviations in the metric's unit."""

    units: int
    unit_deviation: float
    seeds: int
    residual_deviation: float
    seed_deviation: float
    unit_freedom: NotRequired[float | None]  # of the variance over units; None: units - 1


class PowerEntry(Declared):
    """The smallest true difference that a comparison finds."""

    units: int  # or clusters
    seeds: int
    resolvable: float  # in the metric's unit
    doubled: NotRequired[float]  # the same if training seeds vary twice as much
    decides_none: NotRequired[float]  # probability that arms which do not differ are shown to be equivalent
    basis: Literal["measured", "assumed"]
    alpha: float
    power: float
    family: int  # comparisons that share alpha
    design: DesignFacts


class DtypeAudit(TypedDict):
    """controls/dtype-audit.json: what the dtype alone costs the untouched base."""

    model: str
    device: str
    attn_implementation: str
    weights_rounded: float  # share of the weights that bf16 cannot hold
    context_length: int | None
    dtypes: dict[str, DtypeFacts]  # "float32", "autocast", "bfloat16"
    comparisons: list[Comparison]  # each dtype minus float32
    published: PublishedAudit | None


class ArmResults(ArmCosts):
    """An arm's figures over its seeds; facts of run.json are repeated."""

    trainable_parameters: int
    seeds: list[int]
    metrics: Metrics
    final_training_loss: float | None  # mean over seeds, as the next, and those marked below
    seconds_per_step: float | None
    peak_memory_bytes: int  # the largest of any seed
    final_eval_loss: NotRequired[float | None]  # from scratch: mean; of the next two the harmonic mean
    tokens_per_second: NotRequired[float | None]
    mfu: NotRequired[float | None]


class NullRun(TypedDict):
    """The norms that one training without a signal gives."""

    seed: int
    layers: list[NormRow]


class Trend(TypedDict):
    """Whether a measure of the branch grows with depth: Spearman's ρ between layer and measure."""

    measure: str
    rho: float
    low: float
    high: float
    null_low: float | None  # band of ρ by chance, and of a norm by its nulls; None where a norm has no noise null
    null_high: float | None
    nulls: NotRequired[dict[str, list[float]]]  # ρ of each run, by null
    autocorrelation: NotRequired[float]  # of neighbouring layers, which widens the band
    size: NotRequired[float | None]  # mean of the later third of the layers over the mean of the rest
    size_low: NotRequired[float | None]
    size_high: NotRequired[float | None]
    verdict: str  # "later more", "later less", "no trend" or "undecided"
    seeds: int
    layers: int
    covers: str  # what the interval is over


class CurvePoint(TypedDict):
    """An evaluation while training from scratch."""

    step: int
    tokens: int  # read by then
    eval_loss: float  # nats per token


class CacheSizes(TypedDict):
    """K/V cache of the untouched model and of preskip."""

    base_bytes: float
    arm_bytes: float
    per: Literal["token"]


class PaperResults(TypedDict):
    """The paper's own scoring beside its table."""

    columns: dict[str, dict[str, float]]  # by arm and set: accuracy as a share, of paper:wikitext the paper's "PPL"
    model: str | None  # name of the published model
    published: dict[str, dict[str, float]] | None  # the paper's table by arm; None for another model


BySeed: TypeAlias = dict[str, list[DepthRow]]  # by training seed, as text


class Results(RunKind):
    """results.json: what came out, from the finished cells alone."""

    schema_version: int
    sets: dict[str, SetFacts]
    arms: dict[str, ArmResults]
    family: Family
    comparisons: list[Comparison]
    power: list[PowerEntry]
    depth: dict[str, BySeed]  # by arm with a branch
    trend: NotRequired[dict[str, list[Trend]]]  # by arm with a branch
    ablation: NotRequired[dict[str, dict[str, list[AblationRow]]]]  # by arm and seed
    nulls: NotRequired[dict[str, dict[str, list[NullRun]]]]  # by null and arm
    equal_step: NotRequired[dict[str, BySeed]]  # by arm: the control with equal steps
    kv_cache: NotRequired[CacheSizes]
    paper: NotRequired[PaperResults]
    search: NotRequired[dict[str, Search]]  # by tuned arm
    dtype_audit: NotRequired[DtypeAudit]
    curves: NotRequired[dict[str, dict[str, list[CurvePoint]]]]  # from scratch, by arm and seed
    notes: NotRequired[list[str]]  # what could not be computed, and why


class EvalResults(TypedDict):
    """results.json of `preskip eval`, beside its items.jsonl."""

    model: str
    adapter: str | None  # its folder
    dtype: str  # of the base's weights
    adapter_dtype: str | None
    attn_implementation: str
    parameters: int
    adapter_parameters: int
    device: str
    context_length: int
    stride: int
    split_special_tokens: NotRequired[bool]  # True where special tokens in a text were read as text
    seconds: float
    environment: Environment
    sets: dict[str, SetFacts]
    metrics: Metrics
    lm_eval: dict[str, dict[str, float]]  # by task or group, and metric, as lm-eval aggregates them
    task_settings: NotRequired[dict[str, Any]]  # options of `preskip.evaluate.task_settings` other than the defaults
    notes: NotRequired[list[str]]  # what could not be computed or was left out, and why
