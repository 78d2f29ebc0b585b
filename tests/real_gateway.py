"""A gateway on the real engine, scheduler and pipeline; only the stages are modelled."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from doubles import FakeChain, ModelStages, extend
from fake_engine import TEMPLATE
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tightfit.cluster.deployment_status import ModelInfo
from tightfit.cluster.engine import Engine
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.gateway.watch import Tracer
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.pipeline import Pipeline
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.supervisor import FIRST_EPOCH
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.v1 import cluster_pb2_grpc, inference_pb2_grpc
from tightfit.workers.api import SampledToken, SamplingSpec

BOS, EOS = 0, 1
VOCAB = 400
CONTEXT = 160
BLOCK_SIZE = 4
NUM_BLOCKS = 400
LIMIT_S = 40.0
"""Of a test; a lost event would keep its client waiting for good."""
WORDS = (
    "Ein Vöglein 🐦 singt im Wald, und das Reh — scheu — lauscht; 静夜思 床前明月光，疑是地上霜。 "
    "The quick brown fox does not jump over anything… ქართული ภาษาไทย "
)


@functools.cache
def bpe_tokenizer() -> Tokenizer:
    """Byte-level BPE that knows every token id; many tokens are parts of characters."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([WORDS * 3], trainer)
    assert fast.get_vocab_size() == VOCAB
    return Tokenizer(
        fast,
        chat_template=TEMPLATE,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=frozenset({EOS}),
    )


def draw(digest: bytes, spec: SamplingSpec) -> int:
    """A token that depends on context, seed (unless greedy) and bans, and on nothing else."""
    if spec.temperature:
        digest = extend(digest, spec.seed % 2**32)
    token = int.from_bytes(digest[:4], "big") % VOCAB
    while token in spec.banned_token_ids:
        token = (token + 1) % VOCAB
    return token


def logprob_of(token: int) -> float:
    """What the modelled stages say of a token; exact in single precision."""
    return -(token + 1) / 64


def expected(
    prompt: Sequence[int], count: int, *, banned: Sequence[int] = (), num_banned: int = 0
) -> list[int]:
    """Greedy tokens after a prompt; `banned` is not drawn among the first `num_banned`."""
    tokens = list(prompt)
    digest = b""
    for token in tokens:
        digest = extend(digest, token)
    for i in range(count):
        spec = SamplingSpec(banned_token_ids=list(banned) if i < num_banned else [])
        tokens.append(draw(digest, spec))
        digest = extend(digest, tokens[-1])
    return tokens[len(prompt) :]


class SampledStages(ModelStages):
    """Modelled stages that follow temperature, seed, bans and logprobs."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__(num_blocks=num_blocks, block_size=BLOCK_SIZE, vocab_size=VOCAB)

    def sampled(self, sequence_id: int, digest: bytes, spec: SamplingSpec) -> SampledToken:
        token = draw(digest, spec)
        wanted = spec.num_logprobs
        return SampledToken(
            sequence_id=sequence_id,
            token_id=token,
            logprob=None if wanted is None else logprob_of(token),
            top_logprobs=[(i, logprob_of(i)) for i in range(wanted or 0)],
        )


class RealGateway:
    """Everything from the socket to the pipeline, and modelled stages behind it.

    Args:
        delay_s: a stage's time for a micro-batch.
        tracer: where traces go.
        num_traced_steps: of each request.
        limits: fields of SchedulerConfig.
    """

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        tracer: Tracer | None = None,
        num_traced_steps: int = 0,
        **limits: Any,
    ) -> None:
        config = {
            "num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_batch_tokens": 64,
            "max_batch_sequences": 16, "max_context_tokens": CONTEXT, "num_stages": 2,
            "eos_token_ids": frozenset({EOS}), "vocab_size": VOCAB,
        }  # fmt: skip
        self.scheduler = Scheduler(SchedulerConfig(**{**config, **limits}))
        self.chain = FakeChain(SampledStages(), delay_s=delay_s)
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        self.tokenizer = bpe_tokenizer()
        model = ModelInfo(
            name="tiny", family="llama", num_layers=4, vocab_size=VOCAB,
            max_context_tokens=self.scheduler.config.max_context, weight_format="fp32",
            eos_token_ids=frozenset({EOS}), num_stages=2,
        )  # fmt: skip
        pipeline = Pipeline(self.chain, max_in_flight=2)
        pipeline.begin_epoch(FIRST_EPOCH)
        self.engine = Engine(
            self.scheduler,
            pipeline,
            model=model,
            metrics=metrics,
            num_traced_steps=num_traced_steps,
        )
        self._pipeline = pipeline
        self.server = GatewayServer(self.engine, self.tokenizer, metrics, tracer=tracer)
        self.target = ""

    @property
    def epoch(self) -> int:
        """That the pipeline is in."""
        return self._pipeline.epoch

    @property
    def num_blocks_used(self) -> int:
        """KV blocks that some sequence owns."""
        return self.engine.status().counts.num_blocks_used

    def is_empty(self) -> bool:
        """No request, and no block owned by one."""
        return not self.engine.num_unfinished and not self.num_blocks_used

    def counted(self, name: str, **labels: str) -> float:
        """A metric's value now; 0 if it was never counted."""
        return self.registry.get_sample_value(f"tightfit_{name}", labels) or 0.0


class Stubs:
    """The services on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


@asynccontextmanager
async def real_gateway(**settings: Any) -> AsyncIterator[tuple[RealGateway, Stubs]]:
    """A gateway in this event loop, and a client of it. At the end no block may be owned and every
    invariant of the scheduler must hold."""
    gateway = RealGateway(**settings)
    gateway.target = f"127.0.0.1:{await gateway.server.start()}"
    try:
        async with (
            asyncio.timeout(LIMIT_S),
            grpc.aio.insecure_channel(gateway.target) as channel,
        ):
            yield gateway, Stubs(channel)
    finally:
        await gateway.server.stop()
        gateway.chain.resume()
        gateway.engine.stop()
    gateway.scheduler.check_integrity()
    assert gateway.is_empty()
