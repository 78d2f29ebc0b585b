"""Every figure that the project gives for this machine, into docs/benchmarks.md.

`make bench`, or `python bench/run.py [--pairs 3] [--output FILE]`. Six minutes or so; SmolLM2-135M,
two threads in all. The figures are printed as JSON, too.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import beside_transformers
import first_token
import harness
import overhead

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def verdict(is_met: bool) -> str:
    """For a table."""
    return "met" if is_met else "**missed**"


def beside_table(cases: dict[str, dict[str, Any]]) -> str:
    """Medians of every side, and the ratios."""
    lines = []
    for name, case in cases.items():
        best = case["median_tokens_per_s"][case["best_of_transformers"]]
        lines += [f"| {name} | tok/s, median | tok/s, each run | ÷ best median of transformers |"]
        lines += ["|---|---|---|---|"]
        for side, median in case["median_tokens_per_s"].items():
            runs = " ".join(f"{run:.0f}" for run in case["runs_tokens_per_s"][side])
            lines.append(f"| {side} | {median:.1f} | {runs} | {median / best:.2f} |")
        ratio, target = case["int8_over_best_transformers"], case["target"]
        lines += [
            "",
            f"int8 over {case['best_of_transformers']}, median of the rounds' ratios: "
            f"**{ratio:.2f}** (target ≥ {target:g}: {verdict(ratio >= target)}).",
            "",
        ]
        if case["busiest_start"] > harness.SETTLE_BUSY:
            lines += [
                f"A side began while {case['busiest_start']:.0%} of the cores were busy with other "
                "work: these figures are hints.",
                "",
            ]
        if case["unsteady"]:
            lines += [
                f"Rounds differ by more than {beside_transformers.STEADY:g} × for "
                f"{', '.join(case['unsteady'])}: the machine had other work, run this again.",
                "",
            ]
    return "\n".join(lines)


def overhead_table(stages: dict[str, dict[str, Any]]) -> str:
    """Per step and stage."""
    lines = ["| per step and stage, ms | p50 | p90 | mean | steps | p50 ≤ 0.5 |", "|" + "---|" * 6]
    for name, figures in stages.items():
        lines.append(
            f"| {name} | {figures['p50_ms']:.2f} | {figures['p90_ms']:.2f} | "
            f"{figures['mean_ms']:.2f} | {figures['steps']} | "
            f"{verdict(figures['p50_ms'] <= figures['target_ms'])} |"
        )
    return "\n".join(lines)


def first_token_table(figures: dict[str, Any]) -> str:
    """One line."""
    return "\n".join(
        [
            "| bare forward, ms | over gRPC, ms | ratio | target |",
            "|---|---|---|---|",
            f"| {figures['bare_forward_ms']:.1f} | {figures['first_token_ms']:.1f} | "
            f"{figures['ratio']:.2f} | ≤ {figures['target']:g}: "
            f"{verdict(figures['ratio'] <= figures['target'])} |",
        ]
    )


def page(figures: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    flags = {case.name: " ".join(case.flags) for case in beside_transformers.CASES}
    return f"""# Benchmarks

Written by `make bench` (`bench/run.py`); do not edit. SmolLM2-135M-Instruct, {harness.THREADS}
threads in all, CPU. Absolute figures are this machine's; the ratios carry over better. The shapes
of the 175B models have [a page of their own](full-width.md).

Machine: {figures["machine"]}.
Load average of the last minute before the run: {figures["load_average"]} (0 is an idle machine;
more, and the figures are hints). The whole run took {figures["wall_s"] / 60:.1f} minutes.

## Beside transformers

`bench/beside_transformers.py`: the same weights (a GGUF in Q4_1, widened to fp32 for transformers
and before our own quantisation), the same prompts of {harness.PROMPT_TOKENS} random token ids,
greedy, no end before the last token; {figures["pairs"]} rounds, in which the sides take turns in
fresh processes, warm-up excluded. Ours is what clients see over gRPC; transformers is `generate` in
its own process, with a static batch.

- 1 stream: 128 new tokens; `tightfit serve … --no-prefix-cache {flags["1 stream"]}`
- 16 streams: 64 new tokens each; `tightfit serve … --no-prefix-cache {flags["16 streams"]}`

{beside_table(figures["beside"])}
## Overhead of a step

`bench/overhead.py`: wall time of a step less its stages' forwards, divided by the stages, at one
stream, from the service's metric `{overhead.METRIC}` (percentiles are
interpolated within its buckets). One stage has {harness.THREADS} threads, two have one each; the
client and the gateway run on the same cores.

{overhead_table(figures["overhead"])}

## First token of an idle service

`bench/first_token.py`: a prompt of {harness.PROMPT_TOKENS} tokens over gRPC, beside the bare
forward and sampling in one process; int8, one stage, {harness.THREADS} threads each, medians of
{figures["first_token"]["pairs"]} pairs;
different tokens in {figures["first_token"]["tokens_differ"]}.

{first_token_table(figures["first_token"])}
"""


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="rounds beside transformers")
    parser.add_argument("--formats", nargs="*", default=[], help="of ours, beside int8")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="Markdown file to write")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)  # so that services are ended then, too
    started = time.monotonic()
    figures: dict[str, Any] = {
        "machine": harness.machine(),
        "load_average": harness.load_average(),
        "pairs": args.pairs,
        "beside": beside_transformers.measure_all(pairs=args.pairs, formats=args.formats),
        "overhead": overhead.measure_all(),
        "first_token": first_token.measure(pairs=30),
    }
    figures["wall_s"] = time.monotonic() - started
    print(json.dumps(figures, indent=1))
    args.output.write_text(page(figures), encoding="utf-8")
    print(f"written: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
