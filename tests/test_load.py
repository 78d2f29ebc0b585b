import asyncio

import pytest
from doubles import FakeChain, ModelStages, expected_output
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tightfit.client import AsyncClient
from tightfit.client.load import Load, Outcome, arrivals, percentile, run, summary
from tightfit.cluster.deployment_status import ModelInfo
from tightfit.cluster.engine import Engine
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.pipeline import Pipeline
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.tokenizer import Tokenizer

VOCAB = 256


def test_percentiles_are_of_the_nearest_rank():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99)] == [50.0, 90.0, 99.0]
    assert percentile([7.0], 99) == 7.0


def test_arrivals_are_poisson_and_repeat_with_their_seed():
    times = arrivals(10.0, 5000, seed=1)
    assert times == arrivals(10.0, 5000, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.1)


def test_a_summary_counts_tokens_errors_and_wrong_offsets():
    outcomes = [
        Outcome(token_s=[0.1, 0.2, 0.4], end_s=0.5),
        Outcome(error="UNAVAILABLE", end_s=0.1),
        Outcome(token_s=[0.3], end_s=0.3, num_wrong_offsets=1),
    ]
    result = summary(outcomes, wall_s=2.0)
    assert result["errors"] == {"UNAVAILABLE": 1}
    assert result["wrong_offsets"] == 1
    assert result["output_tokens_per_s"] == 2.0
    assert result["ttft_ms"]["p50"] == pytest.approx(100)
    assert result["itl_ms"]["p99"] == pytest.approx(200)


async def serve(work):
    """A gateway on modelled stages, while `work(target)` runs."""
    stages = ModelStages(num_blocks=64, block_size=16, vocab_size=VOCAB)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_context_tokens=256))
    pipeline = Pipeline(FakeChain(stages), max_in_flight=1)
    pipeline.begin_epoch(1)
    metrics = Metrics(CollectorRegistry(), num_stages=1)
    model = ModelInfo(
        name="double", family="llama", num_layers=1, vocab_size=VOCAB, max_context_tokens=256,
        weight_format="fp32", eos_token_ids=frozenset(), num_stages=1,
    )  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    engine = Engine(scheduler, pipeline, model=model, metrics=metrics)
    gateway = GatewayServer(engine, Tokenizer(fast), metrics)
    port = await gateway.start("127.0.0.1", 0)
    try:
        return await work(f"127.0.0.1:{port}")
    finally:
        engine.stop()
        await gateway.stop()


@pytest.mark.parametrize("rate", [None, 200.0])
def test_a_load_gets_every_token_of_every_request(rate):
    load = Load(
        prompts=[[i, 7] for i in range(20)], num_requests=20, max_tokens=10, ignore_eos=True,
        concurrency=4, rate=rate,
    )  # fmt: skip
    outcomes, wall_s = asyncio.run(serve(lambda target: run(target, load)))
    result = summary(outcomes, wall_s)
    assert result["errors"] == {}
    assert result["wrong_offsets"] == 0
    assert result["output_tokens"] == 200


def test_text_token_ids_and_usage_arrive_over_grpc():
    async def work(target):
        async with AsyncClient(target, timeout_s=20) as client:
            whole = await client.generate([5, 6], max_tokens=12)
            chunks = [chunk async for chunk in client.stream([5, 6], max_tokens=12)]
            resumed = await client.generate_n(
                [5, 6], max_tokens=12, resume_token_ids=whole.token_ids[:5]
            )
            return whole, chunks, resumed[0]

    whole, chunks, resumed = asyncio.run(serve(work))
    expected = expected_output([5, 6], 12, VOCAB)
    assert list(whole.token_ids) == expected
    assert [t for chunk in chunks for t in chunk.token_ids] == expected
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].usage.completion_tokens == 12
    assert list(resumed.token_ids) == expected[5:]
