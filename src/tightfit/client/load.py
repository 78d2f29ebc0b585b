"""Load generator for a Tightfit service: `tightfit bench serve`.

Closed loop (a fixed number of requests under way) or open loop (Poisson arrivals). Every request
streams; the time to its first token, the times between its tokens and the offsets of its chunks are
what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tightfit.client._async import AsyncClient
from tightfit.client._types import Prompt, TightfitRpcError

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of at least one value.

    >>> percentile([3.0, 1.0, 2.0], 50)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)]


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests arrive, Poisson with `rate` per second."""
    generator, now = random.Random(seed), 0.0
    times = []
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one request met; times in seconds since it was sent."""

    token_s: list[float] = field(default_factory=list)
    """When each token arrived."""
    end_s: float = 0.0
    error: str = ""
    """Status name; empty when it ended well."""
    num_wrong_offsets: int = 0
    """Chunks that did not continue where the one before ended: lost or repeated tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    prompts: Sequence[Prompt]
    """Taken in turn."""
    num_requests: int
    max_tokens: int
    ignore_eos: bool
    concurrency: int = 1
    """Requests under way, in a closed loop."""
    rate: float | None = None
    """Arrivals per second, in an open loop; None: closed loop."""
    seed: int = 0


async def one_request(client: AsyncClient, prompt: Prompt, load: Load) -> Outcome:
    """Stream one request and note when its tokens come."""
    outcome, expected = Outcome(), 0
    started = time.perf_counter()
    try:
        async for chunk in client.stream(
            prompt, max_tokens=load.max_tokens, ignore_eos=load.ignore_eos
        ):
            now = time.perf_counter() - started
            outcome.token_s += [now] * len(chunk.token_ids)
            outcome.num_wrong_offsets += chunk.token_offset != expected
            expected = chunk.token_offset + len(chunk.token_ids)
    except TightfitRpcError as error:
        outcome.error = error.code.name
    outcome.end_s = time.perf_counter() - started
    return outcome


async def run(target: str, load: Load) -> tuple[list[Outcome], float]:
    """Every request's outcome, and how long all took, in seconds."""
    async with AsyncClient(target) as client:
        prompts = [load.prompts[i % len(load.prompts)] for i in range(load.num_requests)]
        started = time.perf_counter()
        if load.rate is not None:
            times = arrivals(load.rate, load.num_requests, load.seed)

            async def arrive(prompt: Prompt, at_s: float) -> Outcome:
                await asyncio.sleep(at_s - (time.perf_counter() - started))
                return await one_request(client, prompt, load)

            pairs = zip(prompts, times, strict=True)
            outcomes = await asyncio.gather(*(arrive(p, at_s) for p, at_s in pairs))
            return list(outcomes), time.perf_counter() - started
        waiting, outcomes = list(reversed(prompts)), []

        async def work() -> None:
            while waiting:
                outcomes.append(await one_request(client, waiting.pop(), load))

        await asyncio.gather(*(work() for _ in range(load.concurrency)))
        return outcomes, time.perf_counter() - started


def summary(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, object]:
    """Figures of a run; times in milliseconds. Percentiles are left out where nothing succeeded."""
    good = [o for o in outcomes if not o.error and o.token_s]
    gaps = [b - a for o in good for a, b in zip(o.token_s, o.token_s[1:], strict=False)]
    num_tokens = sum(len(o.token_s) for o in outcomes)
    result: dict[str, object] = {
        "requests": len(outcomes),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "wrong_offsets": sum(o.num_wrong_offsets for o in outcomes),
        "output_tokens": num_tokens,
        "wall_s": wall_s,
        "output_tokens_per_s": num_tokens / wall_s if wall_s > 0 else 0.0,
    }
    for name, values in (
        ("ttft_ms", [o.token_s[0] for o in good]),
        ("itl_ms", gaps),
        ("e2e_ms", [o.end_s for o in good]),
    ):
        if values:
            figures = {f"p{p}": 1000 * percentile(values, p) for p in PERCENTILES}
            result[name] = {**figures, "mean": 1000 * sum(values) / len(values)}
    return result


def show(result: dict[str, object], console: Console) -> None:
    """The summary as a table."""
    table = Table("", "p50", "p90", "p99", "mean")
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        figures = result.get(name)
        if isinstance(figures, dict):
            table.add_row(name, *(f"{value:.1f}" for value in figures.values()))
    console.print(table)
    for name in ("requests", "errors", "wrong_offsets", "output_tokens", "output_tokens_per_s"):
        value = result[name]
        console.print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tightfit bench serve", description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port of the service")
    parser.add_argument("--requests", type=int, default=32, help="requests measured")
    parser.add_argument("--warmup", type=int, default=2, help="requests before, not measured")
    parser.add_argument("--concurrency", type=int, default=1, help="closed loop: under way at once")
    parser.add_argument("--rate", type=float, help="open loop: Poisson arrivals per second")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line")
    parser.add_argument("--prompt-tokens", type=int, default=20, help="length of random prompts")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens generated per request")
    parser.add_argument("--ignore-eos", action="store_true", help="generate all of max-tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


async def _prompts(args: argparse.Namespace) -> list[Prompt]:
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()]
    async with AsyncClient(args.target) as client:
        vocab_size = (await client.model()).vocab_size
    generator = random.Random(args.seed)
    return [
        [generator.randrange(vocab_size) for _ in range(args.prompt_tokens)]
        for _ in range(max(args.requests, 1))
    ]


async def _main(args: argparse.Namespace) -> int:
    prompts = await _prompts(args)
    if not prompts:
        print(f"{args.prompts} holds no prompt", file=sys.stderr)
        return 1
    load = Load(
        prompts=prompts,
        num_requests=args.requests,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        concurrency=args.concurrency,
        rate=args.rate,
        seed=args.seed,
    )
    for prompt in prompts[: args.warmup]:
        async with AsyncClient(args.target) as client:
            await one_request(client, prompt, load)
    result = summary(*await run(args.target, load))
    if args.json:
        print(json.dumps(result))
    else:
        show(result, Console())
    return 1 if result["errors"] or result["wrong_offsets"] else 0


def main(argv: Sequence[str]) -> int:
    """Run the load that `argv` describes; 0 when every request ended well, with no token lost.

    Raises:
        SystemExit: usage.
    """
    args = _parser().parse_args(argv)
    if min(args.requests, args.concurrency, args.prompt_tokens, args.max_tokens) < 1:
        _parser().error("requests, concurrency, prompt-tokens and max-tokens must be at least 1")
    if args.rate is not None and args.rate <= 0:
        _parser().error("rate must be above 0")
    try:
        return asyncio.run(_main(args))
    except TightfitRpcError as error:
        print(f"tightfit bench serve: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
