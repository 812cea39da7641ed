"""vLLM's log probabilities and greedy continuations: `python -m preskip.serve.vllm_scores ASKED ANSWER`.

ASKED is a file with {"model", "dtype", "prompts", "new_tokens", "options", "loras"} as JSON; ANSWER is written. With
LoRAs, all prompts are scored with each of them. A process of its own: what vLLM holds is free again when it ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Score what is asked for."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    longest = max(map(len, asked["prompts"])) + asked["new_tokens"] + 1
    options: dict[str, Any] = {"max_model_len": longest, "enable_prefix_caching": False, "seed": 0, **asked["options"]}
    llm: Any = LLM(asked["model"], dtype=asked["dtype"], **options)
    loras = [LoRARequest(one["name"], number, one["path"]) for number, one in enumerate(asked["loras"], 1)] or [None]
    tokens = asked["prompts"] * len(loras)
    prompts = [{"prompt_token_ids": prompt} for prompt in tokens]
    more = {"use_tqdm": False, "lora_request": [lora for lora in loras for _ in asked["prompts"]]}
    scored = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), **more)
    # A second time for the continuations: prompts that are scored do not read the prefix cache.
    greedy = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True)
    answers = llm.generate(prompts, greedy, **more)
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "logprobs": [
            [row[token].logprob for token, row in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
            for prompt, answer in zip(tokens, scored, strict=True)
        ],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": sum(answer.num_cached_tokens or 0 for answer in answers),
        "blocks": cache.num_gpu_blocks,
        "block_tokens": cache.block_size,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
