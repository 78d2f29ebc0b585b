"""What clients lose when a stage is killed: the pause in their streams, beside starting the service
anew.

`python bench/recovery.py [--rounds 5]`. SmolLM2-135M in int8 on three stages, 8 streams. In each
round one stage, by lot, gets SIGKILL while they run; the pause is the longest that any stream
waited between two tokens. The other side is what was left to an operator before: start the whole
service. Rounds take turns with starts. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tightfit.client import AsyncClient

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

STREAMS, TOKENS, KILL_AFTER = 8, 200, 60
FLAGS = ("--format", "int8", "--stages", "3", "--threads-per-stage", "1")


class Round(NamedTuple):
    """One kill."""

    stage: int
    pause_s: float
    """The longest between two tokens of a stream."""
    usual_pause_s: float
    """The same before the kill."""


async def read(client: AsyncClient, prompt: list[int], times_s: list[float]) -> None:
    """A stream, to its end; notes when each token came.

    Raises:
        SystemExit: one is missing, or came twice.
    """
    async for chunk in client.stream(prompt, max_tokens=TOKENS, ignore_eos=True):
        if chunk.token_ids and chunk.token_offset != len(times_s):
            raise SystemExit(f"a gap in a stream: {chunk.token_offset} after {len(times_s)}")
        times_s += [time.perf_counter()] * len(chunk.token_ids)
    if len(times_s) != TOKENS:
        raise SystemExit(f"a stream ended after {len(times_s)} of {TOKENS} tokens")


async def one_round(target: str, stage: int) -> Round:
    """Streams, all met by a stage's loss."""
    async with AsyncClient(target, timeout_s=harness.REQUEST_LIMIT_S) as client:
        pids = [each.pid for each in (await client.status()).stages]
        times: list[list[float]] = [[] for _ in range(STREAMS)]
        readers = [
            asyncio.create_task(read(client, prompt, mine))
            for prompt, mine in zip(harness.prompts(STREAMS), times, strict=True)
        ]
        while min(map(len, times)) < KILL_AFTER:
            await asyncio.sleep(0.005)
        killed_s = time.perf_counter()
        os.kill(pids[stage], signal.SIGKILL)
        await asyncio.gather(*readers)
    num_before = [sum(t < killed_s for t in mine) for mine in times]
    before = [mine[:count] for mine, count in zip(times, num_before, strict=True)]
    after = [mine[count - 1 :] for mine, count in zip(times, num_before, strict=True)]
    return Round(stage, longest(after), longest(before))


def longest(times: list[list[float]]) -> float:
    """Pause between two tokens of one stream, in seconds."""
    return max(after - before for mine in times for before, after in pairwise(mine))


def measure(rounds: int) -> dict[str, Any]:
    """Kills and starts in turns."""
    generator = random.Random(1)
    kills: list[Round] = []
    starts_s = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        with harness.Service(*FLAGS) as service:
            starts_s.append(time.perf_counter() - began_s)
            kills.append(asyncio.run(one_round(service.target, generator.randrange(3))))
    pauses = [kill.pause_s for kill in kills]
    return {
        "machine": harness.machine(),
        "load_average": harness.load_average(),
        "pause_s": {"median": statistics.median(pauses), "each": pauses},
        "usual_longest_pause_s": statistics.median(kill.usual_pause_s for kill in kills),
        "start_s": {"median": statistics.median(starts_s), "each": starts_s},
        "pause_over_start": statistics.median(
            pause / start for pause, start in zip(pauses, starts_s, strict=True)
        ),
        "stages_killed": [kill.stage for kill in kills],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().rounds), indent=2))


if __name__ == "__main__":
    main()
