"""How fast `preskip eval` scores a task, against lm-eval's own Hugging Face backend on the same model object.

Both get the same requests (lm-eval's, tokenising included) at the same dtype. lm-eval's backend runs at the batch size
that is fastest of 1, 8, 16 and 32, tried on a part of the items. The two then take turns on small chunks of the items,
since a shared machine drifts; the figure is the median over chunks of the paired ratio of times. In float32 every
greedy answer must be identical and every item's nats within 1e-3, else there is no figure. In bfloat16 lm-eval rounds
log-probabilities to 8 bits, so that they are compared with a tolerance of 5 %, and differing greedy answers counted.

    python benchmarks/eval_speed.py [--task lambada_openai] [--model smollm2] [--dtype float32] [--items 128]

Target: at least 1.5 times as fast in the lower quartile. Where it comes from: the output head (a fifth of the
multiplications at 135M weights and a vocabulary of 49,152) and the softmax run at the scored positions only, a few of
each hundred; rows of a batch are of about one length, small enough for the processor's caches, and need no mask; the
choices of a question share its row; float32 products are oneDNN's where MKL's use half the processor's width.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time

import torch

TARGET = 1.5  # of the lower quartile
BATCH_SIZES = (1, 8, 16, 32)


def main() -> None:
    """Measure, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="lambada_openai", help="an lm-eval task of log-likelihoods")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32, help="requests per turn: an item has one per choice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="default: as `preskip eval`")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, not the clock's, where others compute, too")
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter

    from lm_eval.models.huggingface import HFLM

    from preskip.assets import load_model, load_tokenizer
    from preskip.evaluate.harness import LiveModel
    from preskip.evaluate.tasks import TaskSuite
    from preskip.runs.environment import processor_name

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_model(options.model, getattr(torch, options.dtype)), load_tokenizer(options.model)
    suite = TaskSuite([options.task], tokenizer, data_dir=options.data_dir, limit=options.items)
    requests = suite.requests(options.task)
    chunks = [requests[i : i + options.chunk] for i in range(0, len(requests), options.chunk)]
    ours = LiveModel(model, tokenizer, batch_tokens=options.batch_tokens)
    theirs = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in BATCH_SIZES}

    def timed(backend: LiveModel | HFLM, chunk: list) -> tuple[float, list[tuple[float, bool]]]:
        start = clock()
        answers = backend.loglikelihood(chunk, disable_tqdm=True)
        return clock() - start, answers

    for backend in (ours, *theirs.values()):  # warm up
        timed(backend, requests[:2])
    tried = {size: min(timed(backend, chunks[0])[0] for _ in range(2)) for size, backend in theirs.items()}
    size = min(tried, key=tried.__getitem__)
    exact = options.dtype == "float32"
    ratios, seconds, differing = [], {"preskip": 0.0, "lm_eval": 0.0}, 0
    for turn in range(options.rounds):
        for number, chunk in enumerate(chunks):
            order = [("preskip", ours), ("lm_eval", theirs[size])]
            took, answers = {}, {}
            for name, backend in order if (turn + number) % 2 == 0 else reversed(order):
                took[name], answers[name] = timed(backend, chunk)
                seconds[name] += took[name]
            for mine, other in zip(answers["preskip"], answers["lm_eval"], strict=True):
                differing += mine[1] != other[1]
                tolerance = 1e-3 if exact else 0.05 * (1 + abs(other[0]))
                assert abs(mine[0] - other[0]) < tolerance, f"{mine[0]} nats, lm-eval has {other[0]}"
            assert not (exact and differing), "a greedy answer differs"
            ratios.append(took["lm_eval"] / took["preskip"])
    low, median, high = statistics.quantiles(ratios, n=4)
    result = {
        "ratio": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "pairs": len(ratios),
        "target": TARGET,
        "met": low >= TARGET,
        "greedy_differs": differing,
        "task": options.task,
        "requests": len(requests),
        "requests_per_second": {
            name: round(len(requests) * options.rounds / value, 2) for name, value in seconds.items()
        },
        "lm_eval_batch_size": size,
        "tried": {str(key): round(value, 2) for key, value in tried.items()},
        "batch_tokens": options.batch_tokens,
        "model": options.model,
        "dtype": options.dtype,
        "clock": clock.__name__,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
