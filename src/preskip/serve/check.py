"""Whether an engine runs the branch: the same prompts through the engine and through transformers, with it and without.

An engine that ignores a branch, or loses a hook of it, answers fluently and without an error. So the engine's log
probabilities must lie on transformers' own, and nearer to those with the branch than to those without.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from preskip.errors import PreskipError
from preskip.serve.checkpoint import Facts, without_branch

# The largest difference of a log probability that float32 may show; 16 bits are held against the base's own.
FLOAT32_TOLERANCE = 1e-3
TIMES_THE_BASE = 1.5
NEW_TOKENS = 32
PROMPTS = (
    "The state of the Union is strong because our people are strong, and because",
    "A list of three colours: red, green,",
    "In the beginning there was nothing but the sea, and over it a wind that came from the north; then, one morning,",
    "def add(first, second):\n    return",
)


class Scores(TypedDict, total=False):
    """Log probabilities of each prompt's tokens but the first, greedy continuations, and an engine's K/V blocks.

    `cached` counts the prompt tokens that the continuations took from the prefix cache.
    """

    logprobs: list[list[float]]
    tokens: list[list[int]]
    cached: int
    blocks: int
    block_tokens: int


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the check found; differences are of log probabilities of prompt tokens, in nats.

    Attributes:
        engine, dtype: what was checked.
        tokens: how many prompt tokens were scored.
        largest, mean: engine against transformers.
        without_largest, without_mean: engine against transformers with the branch switched off.
        base_largest, base_mean: the base in the engine against the base in transformers.
        greedy_equal, greedy: equal tokens of the greedy continuations, and all of them.
        blocks, base_blocks: of the engine's K/V cache, on a CPU in the same memory; None where it has none.
        cache_bytes: of keys and values per token, the base's and this model's.
        is_compared: whether the engine is another than transformers, which is compared with nothing but itself.
        sensitivity: how many times more than the base the model itself moves by rounding; None where not needed.
        problem: why the check failed; None where it passed.
    """

    engine: str
    dtype: str
    tokens: int
    largest: float
    mean: float
    without_largest: float
    without_mean: float
    base_largest: float
    base_mean: float
    greedy_equal: int
    greedy: int
    blocks: int | None
    base_blocks: int | None
    cache_bytes: int
    is_compared: bool
    sensitivity: float | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)


def check(facts: Facts, engine: str, dtype: str, *, device: str, note: Callable[[str], None]) -> Checked:
    """Run the check; of transformers as the engine, only that it loads the branch and that this changes something.

    Args:
        facts: of the checkpoint.
        engine: "vllm" or "transformers".
        dtype: in which both compute.
        device: "cpu" or "cuda", of the engine; on a CPU vLLM compiles nothing.
        note: told what is being done.

    Raises:
        PreskipError: the engine does not start.
    """
    from preskip.architecture.config import adapter_settings

    prompts, adapters = _prompts(facts), list(adapter_settings(facts.config))
    as_often = prompts * max(1, len(adapters))
    options = {"enforce_eager": device == "cpu"}
    with tempfile.TemporaryDirectory(prefix="preskip-check-") as place:
        base = without_branch(facts.folder, Path(place) / "base")
        note(f"{engine} with the branch")
        ours = engine_scores(engine, facts.folder, dtype, prompts, options, adapters)
        note(f"{engine} with the base alone")
        its_base = engine_scores(engine, base, dtype, as_often, {**options, "model_impl": "transformers"})
        note("transformers")
        expected = transformers_scores(facts.folder, dtype, prompts, adapters)
        without = transformers_scores(base, dtype, as_often)

        def rounding() -> float:
            note("transformers in float32")
            exact = transformers_scores(facts.folder, "float32", prompts, adapters)
            exact_base = transformers_scores(base, "float32", as_often)
            return _difference(expected, exact)[1] / _difference(without, exact_base)[1]

        return compare(
            facts,
            engine,
            dtype,
            ours=ours,
            base=its_base,
            expected=expected,
            without=without,
            rounding=rounding,
            is_same_memory=device == "cpu",
        )


def compare(
    facts: Facts,
    engine: str,
    dtype: str,
    *,
    ours: Scores,
    base: Scores,
    expected: Scores,
    without: Scores,
    rounding: Callable[[], float] | None = None,
    is_same_memory: bool = True,
) -> Checked:
    """Judge scores.

    Args:
        facts: of the checkpoint.
        engine: see `check`.
        dtype: see `check`.
        ours: the engine's, with the branch.
        base: the engine's, of the base alone.
        expected: transformers', with the branch.
        without: transformers', without it: the base alone.
        rounding: how many times more than the base's transformers' own scores move between 16 bits and float32; a
            model that does is allowed as much more. Asked only where the base's own difference is exceeded.
        is_same_memory: both K/V caches were given the same memory, and must have as many blocks. Default True; on a
            GPU the engine gives what the weights leave.
    """
    largest, mean = _difference(ours, expected)
    without_largest, without_mean = _difference(ours, without)
    base_largest, base_mean = _difference(base, without)
    pairs = [(a, b) for x, y in zip(ours["tokens"], expected["tokens"], strict=True) for a, b in zip(x, y, strict=True)]
    limit = FLOAT32_TOLERANCE if dtype == "float32" else TIMES_THE_BASE * base_mean
    found = largest if dtype == "float32" else mean
    sensitivity = None
    if dtype != "float32" and not found <= limit and rounding is not None:
        sensitivity = rounding()
        limit *= max(1.0, sensitivity)
    what = "the largest difference" if dtype == "float32" else "the mean difference"
    problem = None
    if not found <= limit:  # also where it is no number
        problem = f"{what} to transformers is {found:.2g}, more than {limit:.2g}"
        if without_mean < mean:
            problem = f"the engine ignores the branch: {problem}, and without the branch it is {without_mean:.2g}"
    elif not mean < without_mean / 2:
        problem = (
            "the branch changes too little for this check to see it: the mean difference to transformers is "
            f"{mean:.2g} with the branch and {without_mean:.2g} without"
        )
    elif is_same_memory and ours.get("blocks") != base.get("blocks"):
        problem = f"the K/V cache has {ours.get('blocks')} blocks, the base's in the same memory {base.get('blocks')}"
    return Checked(
        engine=engine,
        dtype=dtype,
        tokens=sum(map(len, expected["logprobs"])),
        largest=largest,
        mean=mean,
        without_largest=without_largest,
        without_mean=without_mean,
        base_largest=base_largest,
        base_mean=base_mean,
        greedy_equal=sum(a == b for a, b in pairs),
        greedy=len(pairs),
        blocks=ours.get("blocks"),
        base_blocks=base.get("blocks"),
        cache_bytes=facts.cache_bytes_in(dtype),
        is_compared=engine != "transformers",
        sensitivity=sensitivity,
        problem=problem,
    )


def _difference(a: Scores, b: Scores) -> tuple[float, float]:
    """Largest and mean absolute difference of two sets of log probabilities."""
    pairs = zip(a["logprobs"], b["logprobs"], strict=True)
    every = [abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True)]
    return max(every), sum(every) / len(every)


def _prompts(facts: Facts) -> list[list[int]]:
    """The prompts as token ids; without a tokenizer, random ones."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(facts.folder)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    except Exception:  # whatever is missing there, the check needs no text
        prompts = []
    if not prompts or not all(len(prompt) > 1 and max(prompt) < facts.config.vocab_size for prompt in prompts):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(facts.config.vocab_size, (n,), generator=generator).tolist() for n in (5, 17, 30, 40)]
    positions = getattr(facts.config, "max_position_embeddings", None) or sys.maxsize
    return [prompt[: max(2, positions - NEW_TOKENS)] for prompt in prompts]


def transformers_scores(folder: Path, dtype: str, prompts: Sequence[list[int]], adapters: Sequence[str] = ()) -> Scores:
    """What transformers gives, each prompt by itself; all of them with each of several adapters."""
    import torch
    from transformers import GenerationConfig

    from preskip.assets import load_model

    # The faster attentions leave out what some models have (Gemma 2 caps its scores), and engines do not.
    model: Any = load_model(str(folder), dtype=getattr(torch, dtype), attn_implementation="eager")
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config = copy.deepcopy(settings)  # nothing of the checkpoint's own is mixed in
    result = Scores(logprobs=[], tokens=[])
    picks: list[dict[str, Any]] = [{"adapter_names": [name]} for name in adapters] or [{}]
    for pick, prompt in itertools.product(picks, prompts):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            table = model(input_ids=ids, **pick).logits[0, :-1].float().log_softmax(-1)
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **pick)
        result["logprobs"].append(table.gather(-1, ids[0, 1:, None])[:, 0].tolist())
        result["tokens"].append(answer[0, len(prompt) :].tolist())
    return result


def engine_scores(
    engine: str,
    folder: Path,
    dtype: str,
    prompts: Sequence[list[int]],
    options: dict[str, Any],
    adapters: Sequence[str] = (),
) -> Scores:
    """What an engine gives for all prompts at once, with each of several adapters.

    Raises:
        PreskipError: it ended without an answer.
    """
    if engine == "transformers":
        return transformers_scores(folder, dtype, prompts, adapters)
    from preskip.serve.by_token import engine_options, write_loras
    from preskip.serve.checkpoint import examine
    from preskip.serve.server import environment, new_log, reason_in, running

    asked: dict[str, Any] = {"model": str(folder), "dtype": dtype, "prompts": prompts, "new_tokens": NEW_TOKENS}
    log = new_log("check")  # stays where the check fails
    with tempfile.TemporaryDirectory(prefix="preskip-check-") as place:
        answer = Path(place) / "answer.json"
        asked["options"], asked["loras"] = options, []
        if adapters:
            asked["options"] = {**options, **engine_options(len(adapters))}
            (Path(place) / "loras").mkdir()
            asked["loras"] = write_loras(adapters, examine(folder).branches, Path(place) / "loras")
        (Path(place) / "asked.json").write_text(json.dumps(asked))
        arguments = [sys.executable, "-m", "preskip.serve.vllm_scores", str(Path(place) / "asked.json"), str(answer)]
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        with running(arguments, log, {**environment(), "VLLM_CPU_KVCACHE_SPACE": space}) as process:
            code = process.wait()
        if code or not answer.is_file():
            raise PreskipError(f"{engine} does not serve {folder}: {reason_in(log)}")
        log.unlink()
        return json.loads(answer.read_text())
