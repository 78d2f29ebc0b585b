"""Load generator for a Tightfit service: `tightfit bench serve`.

Closed loop (a fixed number of requests under way) or open loop (Poisson arrivals). Every request
streams; the time to its first token, the times between its tokens and the offsets of its chunks are
what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tightfit.client._async import AsyncClient
from tightfit.client._security import ConnectOptions, connect_options
from tightfit.client._types import Chunk, Prompt, TightfitRpcError

PERCENTILES = (50, 90, 99)
DEFAULT_REQUESTS = 32
DEFAULT_TIMEOUT_S = 600.0
OK, FAILED, INTERRUPTED = 0, 1, 130


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of at least one value.

    >>> percentile([3.0, 1.0, 2.0], 50)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)]


def _arrivals(rate: float, seed: int) -> Iterator[float]:
    generator = random.Random(seed)
    yield from itertools.accumulate(generator.expovariate(rate) for _ in itertools.count())


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests arrive, Poisson with `rate` per second."""
    return list(itertools.islice(_arrivals(rate, seed), count))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one request met; times in seconds since it was sent (open loop: since it was due)."""

    token_s: list[float] = field(default_factory=list)
    """When each token arrived; the tokens of one chunk arrive together."""
    end_s: float = 0.0
    error: str = ""
    """Status name; empty when it ended well."""
    num_wrong_offsets: int = 0
    """Chunks that did not continue where the one before ended: lost or repeated tokens."""
    num_lost: int = 0
    """Tokens that the offsets, or the final count of the service, say were never received."""
    num_repeated: int = 0
    """Tokens received at an offset that had come before."""
    num_expected: int = 0
    """Tokens that should have come so far: the end of the furthest chunk."""

    def note(self, chunk: Chunk, now_s: float) -> None:
        """Count a chunk that arrived at `now_s`."""
        count, end = len(chunk.token_ids), chunk.token_offset + len(chunk.token_ids)
        self.token_s += [now_s] * count
        self.num_wrong_offsets += chunk.token_offset != self.num_expected
        self.num_lost += max(0, chunk.token_offset - self.num_expected)
        self.num_repeated += min(count, max(0, self.num_expected - chunk.token_offset))
        self.num_expected = max(self.num_expected, end)
        if chunk.usage is not None and chunk.usage.completion_tokens > self.num_expected:
            self.num_wrong_offsets += 1
            self.num_lost += chunk.usage.completion_tokens - self.num_expected
            self.num_expected = chunk.usage.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    prompts: Sequence[Prompt]
    """Taken in turn, from the first again after the last."""
    num_requests: int | None
    """Requests to send; None: as many as `duration_s` allows."""
    max_tokens: int
    ignore_eos: bool
    concurrency: int = 1
    """Requests under way, in a closed loop."""
    rate: float | None = None
    """Arrivals per second, in an open loop; None: closed loop."""
    seed: int = 0
    """Of the arrivals."""
    duration_s: float | None = None
    """No request is sent later than this; those under way are waited for. None: no limit."""
    timeout_s: float | None = None
    """Deadline of each request."""

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("a load without end: give num_requests, duration_s, or both")


async def one_request(
    client: AsyncClient, prompt: Prompt, load: Load, *, due_s: float | None = None
) -> Outcome:
    """Stream one request and note when its tokens come.

    Args:
        due_s: `time.perf_counter()` when it should have been sent; its times count from there, so
            that a client which falls behind does not hide it. None: now.
    """
    outcome = Outcome()
    started = time.perf_counter() if due_s is None else due_s
    try:
        async for chunk in client.stream(
            prompt, max_tokens=load.max_tokens, ignore_eos=load.ignore_eos
        ):
            outcome.note(chunk, time.perf_counter() - started)
    except TightfitRpcError as error:
        outcome.error = error.code.name
    outcome.end_s = time.perf_counter() - started
    return outcome


async def run(
    target: str, load: Load, options: ConnectOptions | None = None
) -> tuple[list[Outcome], float]:
    """Every request's outcome, and how long all took, in seconds.

    Args:
        options: certificates and token, as `AsyncClient` takes them.
    """
    endless = itertools.cycle(load.prompts)
    prompts = endless if load.num_requests is None else itertools.islice(endless, load.num_requests)
    async with AsyncClient(target, timeout_s=load.timeout_s, **(options or {})) as client:
        started = time.perf_counter()
        outcomes = await (
            _closed_loop(client, load, prompts, started)
            if load.rate is None
            else _open_loop(client, load, prompts, started, load.rate)
        )
        return outcomes, time.perf_counter() - started


async def _closed_loop(
    client: AsyncClient, load: Load, prompts: Iterator[Prompt], started: float
) -> list[Outcome]:
    outcomes: list[Outcome] = []

    async def work() -> None:
        while load.duration_s is None or time.perf_counter() - started < load.duration_s:
            prompt = next(prompts, None)
            if prompt is None:
                return
            outcomes.append(await one_request(client, prompt, load))

    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    return outcomes


async def _open_loop(
    client: AsyncClient, load: Load, prompts: Iterator[Prompt], started: float, rate: float
) -> list[Outcome]:
    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for prompt, at_s in zip(prompts, _arrivals(rate, load.seed), strict=False):
            if load.duration_s is not None and at_s > load.duration_s:
                break
            await asyncio.sleep(started + at_s - time.perf_counter())
            request = one_request(client, prompt, load, due_s=started + at_s)
            tasks.append(group.create_task(request))
    return [task.result() for task in tasks]


def summary(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, object]:
    """Figures of a run; times in milliseconds. Percentiles are left out where nothing succeeded."""
    good = [o for o in outcomes if not o.error and o.token_s]
    gaps = [b - a for o in good for a, b in zip(o.token_s, o.token_s[1:], strict=False)]
    num_tokens = sum(len(o.token_s) for o in outcomes)
    result: dict[str, object] = {
        "requests": len(outcomes),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "wrong_offsets": sum(o.num_wrong_offsets for o in outcomes),
        "lost_tokens": sum(o.num_lost for o in outcomes),
        "repeated_tokens": sum(o.num_repeated for o in outcomes),
        "output_tokens": num_tokens,
        "wall_s": wall_s,
        "requests_per_s": len(outcomes) / wall_s if wall_s > 0 else 0.0,
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
    """The summary as a table, and what has no percentiles below it."""
    table = Table("", *(f"p{p}" for p in PERCENTILES), "mean")
    for name, value in result.items():
        if isinstance(value, dict) and name != "errors":
            table.add_row(name, *(f"{figure:.1f}" for figure in value.values()))
    console.print(table)
    for name, value in result.items():
        if name == "errors":
            console.print(f"errors: {value or 'none'}")
        elif not isinstance(value, dict):
            console.print(
                f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tightfit bench serve",
        description="Put load on a running service and measure what its clients see.",
    )
    add = parser.add_argument
    add("--target", default="127.0.0.1:50051", help="host:port of the service")
    add("--requests", type=int, metavar="N", help="requests measured; default: 32, or --duration")
    add("--duration", type=float, metavar="SECONDS", help="send no request later than this")
    add("--warmup", type=int, default=2, metavar="N", help="requests before, not measured")
    add("--concurrency", type=int, default=1, metavar="N", help="closed loop: under way at once")
    add("--rate", type=float, metavar="X", help="open loop: Poisson arrivals per second")
    add("--seed", type=int, default=0, help="of random prompts and arrivals")
    add("--prompts", type=Path, metavar="FILE", help="one prompt per line; empty lines are skipped")
    add("--prompt-tokens", type=int, default=20, metavar="N", help="length of random prompts")
    add("--max-tokens", type=int, default=64, metavar="N", help="tokens generated per request")
    add("--ignore-eos", action="store_true", help="generate all of max-tokens")
    add("--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, help="deadline of each request")
    add("--json", action="store_true", help="print JSON")
    _add_security(parser)
    return parser


def _add_security(parser: argparse.ArgumentParser) -> None:
    """The flags of `tightfit generate`, see there."""
    add = parser.add_argument_group("security").add_argument
    add("--tls", action="store_true", help="encrypt; trust public authorities, or --tls-ca")
    add("--tls-ca", metavar="FILE", help="authorities of the service's certificate, in PEM")
    add("--tls-cert", metavar="FILE", help="this client's certificate chain, in PEM")
    add("--tls-key", metavar="FILE", help="its private key, in PEM")
    add("--token-file", metavar="FILE", help="bearer token; default: the variable TIGHTFIT_TOKEN")
    add("--insecure-token", action="store_true", help="send it unencrypted to other machines too")


def _checked(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.requests is None and args.duration is None:
        args.requests = DEFAULT_REQUESTS
    for name in ("requests", "concurrency", "prompt_tokens", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("rate", "duration", "timeout_s"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    if args.warmup < 0:
        parser.error(f"--warmup must be at least 0, not {args.warmup}")
    try:
        args.options = connect_options(
            args.target,
            tls=args.tls,
            ca=args.tls_ca,
            cert=args.tls_cert,
            key=args.tls_key,
            token_file=args.token_file,
            insecure_token=args.insecure_token,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompts {args.prompts}: {error}")
        args.lines = [line for line in lines if line.strip()]
        if not args.lines:
            parser.error(f"--prompts {args.prompts} holds no prompt")
    return args


async def _prompts(args: argparse.Namespace) -> list[Prompt]:
    """Prompts for the warm-up, then for the run; random ones all differ, so that no measured
    request finds the warm-up's in the prefix cache."""
    if args.prompts is not None:
        return list(args.lines)
    async with AsyncClient(args.target, timeout_s=args.timeout_s, **args.options) as client:
        vocab_size = (await client.model()).vocab_size
    generator = random.Random(args.seed)
    count = args.warmup + (args.requests or 1000)
    return [
        [generator.randrange(vocab_size) for _ in range(args.prompt_tokens)] for _ in range(count)
    ]


async def _main(args: argparse.Namespace) -> int:
    options: ConnectOptions = args.options
    prompts = await _prompts(args)
    load = Load(
        prompts=prompts[args.warmup % len(prompts) :] + prompts[: args.warmup % len(prompts)],
        num_requests=args.requests,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        concurrency=args.concurrency,
        rate=args.rate,
        seed=args.seed,
        duration_s=args.duration,
        timeout_s=args.timeout_s,
    )
    if args.warmup:
        before = replace(
            load, prompts=prompts, num_requests=args.warmup, rate=None, duration_s=None
        )
        await run(args.target, before, options)
    result = summary(*await run(args.target, load, options))
    if args.json:
        print(json.dumps(result))
    else:
        show(result, Console())
    return FAILED if result["errors"] or result["wrong_offsets"] else OK


def main(argv: Sequence[str]) -> int:
    """Run the load that `argv` describes; 0 when every request ended well, with no token lost.

    Raises:
        SystemExit: usage.
    """
    args = _checked(argv)
    try:
        return asyncio.run(_main(args))
    except TightfitRpcError as error:
        print(f"tightfit bench serve: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
