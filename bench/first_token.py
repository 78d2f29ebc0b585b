"""First token of an idle service over gRPC, beside the bare forward in this process.

`python bench/first_token.py [--pairs 30]`. int8, one stage, the same threads, prompts of the same
length. The two take turns and each is idle while the other runs. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import aclosing
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

from tightfit.client import AsyncClient

PAUSE_S = 0.2
"""Between measures: the threads of the one before have stopped spinning by then."""
WARM_UPS = 3
TARGET = 1.5
TIES = 0.1
"""Share of prompts, of random tokens, at which the two may choose another token."""


class BareModel:
    """The whole model as one shard, with nothing around it."""

    def __init__(self) -> None:
        import torch

        from tightfit.workers.api import StageSpec
        from tightfit.workers.checkpoint import open_checkpoint
        from tightfit.workers.decoder_config import decoder_config
        from tightfit.workers.shard import ShardModel

        torch.set_num_threads(harness.THREADS)
        checkpoint = open_checkpoint(str(harness.gguf()))
        config = decoder_config(checkpoint.config)
        spec = StageSpec(
            model_path=str(harness.gguf()), stage_index=0, num_stages=1, first_layer=0,
            end_layer=config.num_layers, format="int8", num_threads=harness.THREADS,
        )  # fmt: skip
        self._model = ShardModel.load(checkpoint, config, spec)
        checkpoint.close()
        self._model.allocate_kv(8)
        self._block_size = spec.block_size

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        """The greedy token after a prompt, and the seconds that it took."""
        import torch

        from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice
        from tightfit.workers.stage import finish_step

        num_blocks = -(-len(prompt) // self._block_size)
        part = SequenceSlice(
            sequence_id=0, start_position=0, token_ids=prompt,
            block_table=list(range(num_blocks)), sampling=SamplingSpec(),
        )  # fmt: skip
        batch = MicroBatch(epoch=1, step=0, slices=[part])
        started = time.perf_counter()
        with torch.inference_mode():
            tokens, _ = finish_step(self._model, batch, self._model.forward(batch, None))
        return tokens[0].token_id, time.perf_counter() - started


async def over_grpc(client: AsyncClient, prompt: list[int]) -> tuple[int, float]:
    """The first token that a stream brings, and the seconds until it came."""
    started = time.perf_counter()
    async with aclosing(client.stream(prompt, max_tokens=1, ignore_eos=True)) as chunks:
        async for chunk in chunks:
            if chunk.token_ids:
                return chunk.token_ids[0], time.perf_counter() - started
    raise SystemExit("a stream ended without a token")


async def _pairs(target: str, model: BareModel, count: int) -> tuple[list[float], list[float], int]:
    bare: list[float] = []
    grpc: list[float] = []
    num_different = 0
    async with AsyncClient(target, timeout_s=harness.REQUEST_LIMIT_S) as client:
        for i, prompt in enumerate(harness.prompts(count + WARM_UPS, seed=2)):
            tokens = {}
            for side in ("bare", "grpc") if i % 2 else ("grpc", "bare"):
                await asyncio.sleep(PAUSE_S)
                if side == "bare":
                    tokens[side], bare_s = model.first_token(prompt)
                else:
                    tokens[side], grpc_s = await over_grpc(client, prompt)
            if i >= WARM_UPS:
                bare.append(bare_s)
                grpc.append(grpc_s)
                num_different += tokens["bare"] != tokens["grpc"]
    return bare, grpc, num_different


def measure(*, pairs: int) -> dict[str, object]:
    """Medians in milliseconds, and the median of the pairs' ratios."""
    model = BareModel()
    flags = ("--stages", "1", "--threads-per-stage", str(harness.THREADS), "--format", "int8")
    with harness.Service(*flags) as service:
        harness.settle()
        bare, grpc, num_different = asyncio.run(_pairs(service.target, model, pairs))
    # Both choose their ops by what they measured at load: where two tokens are as good as equal,
    # one more pass through the other op can turn the order. More than that is a wrong answer.
    if num_different > TIES * pairs:
        raise SystemExit(f"{num_different} of {pairs} first tokens differ from the bare forward's")
    return {
        "pairs": pairs,
        "bare_forward_ms": 1000 * statistics.median(bare),
        "first_token_ms": 1000 * statistics.median(grpc),
        "ratio": statistics.median(a / b for a, b in zip(grpc, bare, strict=True)),
        "tokens_differ": num_different,
        "target": TARGET,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    print(json.dumps(measure(pairs=parser.parse_args().pairs), indent=1))
