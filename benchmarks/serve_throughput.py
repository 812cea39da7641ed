"""Tokens per second of a baked checkpoint and its base in vLLM, side by side: `python serve_throughput.py CHECKPOINT`.

Both engines are up at once and take turns, so that what else the machine does meets both alike; the ratio is the median
over pairs of turns. Decoding reads every weight once per step, so at a batch of 1 the ratio should be near that of the
weight bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from preskip.serve.checkpoint import examine, without_branch


def main() -> None:
    """Measure and print one line of JSON per batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    facts = examine(options.checkpoint)
    with tempfile.TemporaryDirectory() as place:
        base = without_branch(options.checkpoint, Path(place) / "base")
        common: dict[str, Any] = {
            "dtype": facts.dtype if options.dtype == "auto" else options.dtype,
            "enforce_eager": True,
            "max_model_len": options.prompt_tokens + options.new_tokens,
            "enable_prefix_caching": False,
            "model_impl": "transformers",
        }
        engines = {"base": LLM(str(base), **common)}
        engines["baked"] = LLM(str(options.checkpoint), **{**common, "model_impl": "auto"})
        wanted = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
        for batch in options.batches:
            prompts = [
                {"prompt_token_ids": [(7 * row + place) % 1000 + 5 for place in range(options.prompt_tokens)]}
                for row in range(batch)
            ]
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for turn in range(options.pairs + 1):
                for name in sorted(engines, reverse=turn % 2 == 1):
                    begin = time.perf_counter()
                    engines[name].generate(prompts, wanted, use_tqdm=False)
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - begin)
            ratios = sorted(b / a for a, b in zip(seconds["base"], seconds["baked"], strict=True))
            result = {
                "batch": batch,
                "dtype": common["dtype"],
                "tokens_per_second": {
                    name: round(batch * options.new_tokens / statistics.median(times), 2)
                    for name, times in seconds.items()
                },
                "time_ratio_median": round(statistics.median(ratios), 3),
                "time_ratios": [round(ratio, 3) for ratio in ratios],
                "weight_byte_ratio": round(facts.weight_ratio, 3),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
