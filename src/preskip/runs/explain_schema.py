"""What explain.json holds, key by key, and its version; conventions as in `preskip.runs.schema`."""

from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict

from preskip.runs.schema import Environment, Limits, MetricValue

EXPLAIN_VERSION = 1


class ExplainedSource(TypedDict):
    """Where the weights are from."""

    kind: str  # "run", "adapter" or "baked"
    name: str
    arm: str | None
    seed: int | None


class ExplainedModel(TypedDict):
    """The model that the branch is part of."""

    name: str | None
    type: str
    layers: int
    hidden_size: int
    parameters: int
    dtype: str


class ExplainedText(TypedDict):
    """A text that was read."""

    id: str
    title: str
    set: str  # "held-out" or "given"
    tokens: int
    shown: bool  # on the map
    group: NotRequired[str]  # texts of one are a cluster of the intervals; not in files of an earlier preskip


class Alignment(TypedDict):
    """Mean cosine of the skip's output with the output of another part of its layer."""

    attention: Limits | None
    mlp: Limits | None


Token: TypeAlias = list[str | float]  # a token's text, and the change of its logit


class Spectrum(TypedDict):
    """Singular values of W_skip; None without a skip."""

    spectrum: list[float] | None  # the largest, descending
    effective_rank: float | None  # exp of the entropy of all of them over their sum; None for a matrix that is 0
    stable_rank: float | None  # Σσ² / σ₁²; None for a matrix that is 0


class LayerWeights(Spectrum):
    """One layer's matrices; None for those it lacks."""

    layer: int
    up_norm: float | None
    down_norm: float | None
    skip_norm: float | None
    null: dict[str, dict[str, float]] | None  # low and high of the run's noise null, by norm


class LayerSizes(TypedDict):
    """How much one layer's branch does on text."""

    skip_to_attention: Limits | None
    enrichment: Limits | None
    skip_to_attention_wide: MetricValue | None  # at the level at which all layers hold at once
    alignment: Alignment


class PromotedTokens(TypedDict):
    """The tokens whose logits a layer's mean skip output raises and lowers most, the strongest first."""

    promoted: list[Token]
    demoted: list[Token]


class AttentionChanges(TypedDict):
    """Attention with one layer's enrichment minus without it; None where it has none."""

    entropy_change: Limits | None  # nats
    sink_change: Limits | None  # weight on the first token


class ExplainedLayer(LayerWeights, LayerSizes, PromotedTokens, AttentionChanges):
    """What one layer's branch does."""

    ablation: dict[str, Limits | None] | None  # bits per byte off minus on, by "skip", "enrichment" and "both"


# Both sizes of one class of tokens, all layers together; "by_layer" is the skip's.
ExplainedClass = TypedDict(
    "ExplainedClass",
    {
        "dimension": str,
        "class": str,
        "tokens": int,
        "skip_to_attention": Limits | None,
        "skip_to_attention_wide": MetricValue | None,
        "enrichment": Limits | None,
        "by_layer": list[float | None],
    },
)


class ExplainedDocument(TypedDict):
    """A text on the map: its tokens, and two sizes by layer and token."""

    id: str
    title: str
    tokens: list[str]  # joined, they are the text
    bypass: list[list[float | None]] | None  # ‖skip output‖ / ‖attention output‖
    enrichment: list[list[float | None]] | None  # ‖x̃ − x̂‖ / ‖x̂‖


class ExplainMethod(TypedDict):
    """How much was read."""

    statistics: str  # the set that figures are of
    context_length: int
    frequency_tokens: int  # of the reference text
    attention_documents: int
    ablation_documents: int
    ablation_words: int


class Explanation(TypedDict):
    """What is measured of a model's branches."""

    texts: list[ExplainedText]
    layers: list[ExplainedLayer]
    classes: list[ExplainedClass]
    documents: list[ExplainedDocument]
    timings: dict[str, float]  # seconds by stage
    method: ExplainMethod


class ExplainFacts(TypedDict):
    """What is explained, and when."""

    kind: Literal["explain"]
    preskip_version: str
    created: str  # ISO 8601, UTC
    command: list[str]
    source: ExplainedSource
    model: ExplainedModel
    settings: dict[str, Any]  # of the branch


class Explain(ExplainFacts, Explanation):
    """explain.json."""

    schema_version: int  # EXPLAIN_VERSION
    environment: Environment
