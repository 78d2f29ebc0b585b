"""One stream and sixteen, over gRPC, beside transformers: same weights, prompts and threads.

`python bench/beside_transformers.py [--pairs 3]`. SmolLM2-135M, two threads in all. The sides take
turns, each in fresh processes that end before the next begins, so that what else the machine does
meets all of them and none waits beside another. Prints medians and ratios as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

WARM_UP_TOKENS = 8
RUNS = 2
STEADY = 1.25
"""Slowest and fastest round of a side may differ by this factor."""
SIDE_LIMIT_S = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A load, and how our service is started for it."""

    streams: int
    tokens: int
    flags: tuple[str, ...]
    target: float
    """Our int8 over transformers' best dtype, at least."""

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}"


CASES = (
    Case(
        streams=1, tokens=128, target=2.5,
        flags=("--stages", "1", "--threads-per-stage", str(harness.THREADS)),
    ),
    Case(
        streams=16, tokens=64, target=2.0,
        flags=("--stages", "2", "--threads-per-stage", "1", "--balance", "speed"),
    ),
)  # fmt: skip


def ours(case: Case, fmt: str) -> float:
    """Output tokens per second that gRPC clients of a fresh service see, warm-up excluded."""
    with harness.Service("--format", fmt, *case.flags) as service:
        service.load(streams=case.streams, tokens=WARM_UP_TOKENS, seed=1)
        runs = [service.load(streams=case.streams, tokens=case.tokens) for _ in range(RUNS)]
    return statistics.mean(float(run["output_tokens_per_s"]) for run in runs)


def theirs(case: Case, side: str) -> float:
    """Output tokens per second of another program, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(case.streams), str(case.tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SIDE_LIMIT_S)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _timed(generate: Callable[[int], None], case: tuple[int, int]) -> float:
    """Tokens per second of `generate(new tokens)`, warm-up excluded."""
    streams, tokens = case
    generate(WARM_UP_TOKENS)
    rates = []
    for _ in range(RUNS):
        started = time.perf_counter()
        generate(tokens)
        rates.append(streams * tokens / (time.perf_counter() - started))
    return statistics.mean(rates)


def transformers_side(dtype: str, case: tuple[int, int]) -> float:
    """`generate` with a static batch of all streams, greedy."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(harness.THREADS)
    model = AutoModelForCausalLM.from_pretrained(
        harness.converted(), dtype=getattr(torch, dtype)
    ).eval()
    ids = torch.tensor(harness.prompts(case[0]))

    def generate(tokens: int) -> None:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        assert output.shape == (case[0], harness.PROMPT_TOKENS + tokens)

    return _timed(generate, case)


def llama_cpp_side(case: tuple[int, int]) -> float:
    """llama.cpp on the GGUF as it is; one stream only."""
    from llama_cpp import Llama

    model = Llama(str(harness.gguf()), n_threads=harness.THREADS, n_ctx=512, verbose=False)
    prompt = harness.prompts(1)[0]

    def generate(tokens: int) -> None:
        model.reset()
        for count, _ in enumerate(model.generate(prompt, temp=0.0), 1):
            if count == tokens:
                return

    return _timed(generate, case)


def sides(case: Case, formats: list[str]) -> dict[str, Callable[[], float]]:
    """What is measured, by name, ours and theirs in turn."""
    result: dict[str, Callable[[], float]] = {
        "transformers fp32": lambda: theirs(case, "float32"),
        "tightfit int8": lambda: ours(case, "int8"),
        "transformers bf16": lambda: theirs(case, "bfloat16"),
    }
    for fmt in formats:
        result[f"tightfit {fmt}"] = lambda fmt=fmt: ours(case, fmt)
    if case.streams == 1 and importlib.util.find_spec("llama_cpp"):
        result["llama.cpp Q4_1"] = lambda: theirs(case, "llama.cpp")
    return result


def measure(case: Case, *, pairs: int, formats: list[str]) -> dict[str, object]:
    """Medians over `pairs` rounds, and the median of the rounds' ratios to the better dtype."""
    measures = sides(case, formats)
    runs: dict[str, list[float]] = {side: [] for side in measures}
    busy = []
    for i in range(pairs):
        # The order turns round every time, so that a drift of the machine favours nobody.
        for side in list(measures)[:: 1 if i % 2 == 0 else -1]:
            busy.append(harness.settle())
            runs[side].append(measures[side]())
            print(f"{case.name}, {side}: {runs[side][-1]:.1f} tok/s", file=sys.stderr, flush=True)
    # The better dtype over all rounds, not the luckier of each.
    best = max(
        ("transformers fp32", "transformers bf16"), key=lambda side: statistics.median(runs[side])
    )
    ratios = [a / b for a, b in zip(runs["tightfit int8"], runs[best], strict=True)]
    return {
        "runs_tokens_per_s": runs,
        "median_tokens_per_s": {side: statistics.median(values) for side, values in runs.items()},
        "best_of_transformers": best,
        "int8_over_best_transformers": statistics.median(ratios),
        "target": case.target,
        "unsteady": [side for side, values in runs.items() if max(values) > STEADY * min(values)],
        "busiest_start": max(busy),
    }


def measure_all(*, pairs: int, formats: list[str]) -> dict[str, dict[str, object]]:
    """Every case, by name."""
    harness.converted()
    return {case.name: measure(case, pairs=pairs, formats=formats) for case in CASES}


def main() -> None:
    """Print the measures, or be one side of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=[], help="of ours, beside int8")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, case = args.side[0], (int(args.side[1]), int(args.side[2]))
        rate = llama_cpp_side(case) if side == "llama.cpp" else transformers_side(side, case)
        print(rate)
        return
    print(json.dumps(measure_all(pairs=args.pairs, formats=args.formats), indent=1))


if __name__ == "__main__":
    main()
