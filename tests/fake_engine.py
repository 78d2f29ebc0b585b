"""What the gateway serves in tests: an engine that "generates" from a script, and its tokenizer."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import asynccontextmanager, contextmanager
from threading import Event, Thread

import grpc
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from tightfit.cluster.deployment_status import DeploymentStatus, ModelInfo
from tightfit.cluster.errors import InvalidRequestError, OverloadedError, UnavailableError
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.request import FinishReason, Recovery, TokenEvent
from tightfit.cluster.scheduling.config import SchedulerCounts
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.workers.api import StageMemory, StageStatus

BOS, EOS = 256, 257
VOCAB = 260
"""Bytes, two special tokens, and two ids that the tokenizer does not know."""
CONTEXT = 400
REPLY = "Ein Vöglein 🐦 singt im Wald, und das Reh — scheu — lauscht. "
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ raise_exception('no tools: ' + message.content) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE, *, adds_bos: bool = False) -> Tokenizer:
    """One token per byte of UTF-8, in the order of the bytes: ids are the bytes themselves."""
    alphabet = _byte_alphabet()
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if adds_bos:
        fast.post_processor = TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", BOS)])
    return Tokenizer(
        fast,
        chat_template=chat_template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=frozenset({EOS}),
    )


def _byte_alphabet() -> list[str]:
    """Byte → the character that byte-level BPE writes for it (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def reply_ids(index: int = 0, length: int = CONTEXT) -> list[int]:
    """What sequence `index` of any request generates: `REPLY` over and over, each index beginning
    elsewhere."""
    text = REPLY.encode()
    start = 3 * index
    return [text[(start + i) % len(text)] for i in range(length)]


class FakeStream:
    """As `tightfit.cluster.engine.RequestStream`."""

    def __init__(self, engine, request):
        self.engine, self.request = engine, request
        self.queue = asyncio.Queue()
        self.unfinished = request.sampling.n
        self.ended = [False] * request.sampling.n
        self.steps, self.recoveries, self.loss = [], [], None

    def push(self, event):
        self.queue.put_nowait(event)

    @property
    def has_waiting(self):
        return not self.queue.empty()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.unfinished == 0:
            raise StopAsyncIteration
        event = await self.queue.get()
        if event.finish_reason is not None:
            self.unfinished -= 1
        return event

    def cancel(self, reason=FinishReason.CANCELLED):
        self.engine.end(self.request.request_id, reason)

    def finish(self, index, reason):
        self.engine.end_sequence(self, index, reason)


class FakeEngine:
    """As `tightfit.cluster.engine.Engine`, with knobs.

    Attributes:
        delay_s: between tokens; 0 hands out each as soon as the event loop turns.
        burst: tokens handed out at once.
        reply: (index) → token ids.
        stalled: no tokens come until it is cleared.
        recovering: why the pipeline is lost; no tokens come until `recover`.
        error: set: every request ends with ERROR and this after `error_after` tokens.
        overloaded: set: submit refuses, with this many seconds until another try.
        crash: set: submit raises it, as a bug would.
    """

    def __init__(self):
        self.model_info = ModelInfo(
            name="fake", family="llama", num_layers=4, vocab_size=VOCAB,
            max_context_tokens=CONTEXT, weight_format="int8", eos_token_ids=frozenset({EOS}),
            num_stages=2,
        )  # fmt: skip
        self.delay_s, self.burst = 0.0, 1
        self.reply = reply_ids
        self.stalled = False
        self.recovering, self.lost_s = "", 0.0
        self.num_recoveries = 0
        self.error, self.error_after = "", 3
        self.overloaded = None
        self.crash = None
        self.failure = ""
        self.is_draining = False
        self.requests = []
        self.cancelled = {}
        """Request id → (reason, when), of those that were cancelled while they ran."""
        self.finished = []
        """(request id, index, reason) of `finish` calls."""
        self.max_waiting = 0
        self._streams = {}
        self._tasks = {}

    def start(self):
        pass

    def submit(self, request):
        if self.crash is not None:
            raise self.crash
        if self.failure:
            raise UnavailableError(self.failure)
        if self.is_draining:
            raise UnavailableError("the service is shutting down and takes no new requests")
        if self.overloaded is not None:
            raise OverloadedError("1024 sequences are waiting", retry_after_s=self.overloaded)
        if request.request_id in self._streams:
            raise InvalidRequestError("request_id", f"{request.request_id!r} is in use")
        self.requests.append(request)
        stream = self._streams[request.request_id] = FakeStream(self, request)
        work = self._score(stream) if request.score_only else self._generate(stream)
        self._tasks[request.request_id] = asyncio.create_task(work)
        return stream

    async def _generate(self, stream):
        request = stream.request
        resumed = len(request.resume_token_ids)
        room = CONTEXT - len(request.prompt_token_ids)
        last = min(request.sampling.max_tokens, room) - 1
        for offset in range(resumed, last + 1):
            while self.stalled or self.recovering:
                await asyncio.sleep(0.005)
            if offset % self.burst == 0:
                await asyncio.sleep(self.delay_s)
            for index in range(request.sampling.n):
                if stream.ended[index]:
                    continue
                if self.error and offset == self.error_after:
                    self._push(stream, index, offset, reason=FinishReason.ERROR)
                    continue
                token = self.reply(index)[offset]
                is_end = token == EOS and not request.sampling.ignore_eos
                is_end = is_end or token in request.sampling.stop_token_ids
                reason = FinishReason.LENGTH if offset == last else None
                self._push(stream, index, offset, token, FinishReason.STOP if is_end else reason)
            self.max_waiting = max(self.max_waiting, stream.queue.qsize())
            if all(stream.ended):
                break
        if resumed > last:
            self._push(stream, 0, resumed, reason=FinishReason.LENGTH)
        self._forget(stream)

    def _push(self, stream, index, offset, token=None, reason=None):
        wanted = stream.request.sampling.logprobs
        stream.ended[index] = reason is not None
        stream.push(
            TokenEvent(
                request_id=stream.request.request_id,
                index=index,
                token_offset=offset,
                token_id=token,
                logprob=-0.5 if wanted is not None and token is not None else None,
                top_logprobs=tuple((i, -0.5 - i) for i in range(wanted or 0)),
                finish_reason=reason,
                num_cached_tokens=2,
                error=self.error if reason is FinishReason.ERROR else "",
            )
        )

    async def _score(self, stream):
        while self.stalled or self.recovering:
            await asyncio.sleep(0.005)
        await asyncio.sleep(self.delay_s)
        ids = stream.request.prompt_token_ids
        reason = FinishReason.ERROR if self.error else FinishReason.STOP
        stream.push(
            TokenEvent(
                request_id=stream.request.request_id,
                index=0,
                token_offset=0,
                finish_reason=reason,
                scores=tuple(-token / 8 for token in ids[1:]),
                error=self.error,
            )
        )
        self._forget(stream)

    def _forget(self, stream):
        self._streams.pop(stream.request.request_id, None)
        self._tasks.pop(stream.request.request_id, None)

    def end(self, request_id, reason):
        stream = self._streams.get(request_id)
        if stream is None:
            return
        self._tasks[request_id].cancel()
        self._forget(stream)
        self.cancelled[request_id] = (reason, time.monotonic())

    def end_sequence(self, stream, index, reason):
        if stream.ended[index]:
            return
        self.finished.append((stream.request.request_id, index, reason))
        stream.ended[index] = True
        stream.push(
            TokenEvent(
                request_id=stream.request.request_id,
                index=index,
                token_offset=0,
                finish_reason=reason,
            )
        )

    def lose(self, reason):
        self.recovering, self.lost_s = reason, time.monotonic()

    def recover(self, num_replayed_tokens=0):
        self.num_recoveries += 1
        recovery = Recovery(
            epoch=1 + self.num_recoveries,
            reason=self.recovering,
            lost_s=self.lost_s,
            resumed_s=time.monotonic(),
            num_replayed_tokens=num_replayed_tokens,
        )
        for stream in self._streams.values():
            stream.recoveries.append(recovery)
        self.recovering = ""

    def drain(self):
        self.is_draining = True

    @property
    def num_unfinished(self):
        return len(self._streams)

    @property
    def needs_restart(self):
        return self.health in ("failed", "stalled")

    @property
    def health(self):
        if self.failure:
            return "failed"
        if self.recovering:
            return "recovering"
        if self.stalled:
            return "stalled"
        if self.is_draining:
            return "draining"
        return "ok" if self._streams else "idle"

    def status(self):
        memory = StageMemory(
            predicted_weight_bytes=100, weight_bytes=101, kv_cache_bytes=50, workspace_bytes=7,
            rss_anon_bytes=200, budget_bytes=None, num_kv_blocks=25,
        )  # fmt: skip
        stages = tuple(
            StageStatus(
                stage_index=i, first_layer=2 * i, end_layer=2 * i + 2, format="int8",
                kv_format="bf16", device="cpu", node_id=f"n{i}", pid=10 + i, epoch=1, steps=3,
                busy_s=1.0, uptime_s=4.0, memory=memory,
            )
            for i in range(2)
        )  # fmt: skip
        counts = SchedulerCounts(
            num_running=self.num_unfinished, num_waiting=1, num_queued_tokens=9, num_blocks=25,
            num_blocks_used=5, num_blocks_cached=1, num_preemptions=2, num_prompt_tokens=3,
            num_generated_tokens=4, num_cached_tokens=1,
        )  # fmt: skip
        return DeploymentStatus(
            model=self.model_info, health=self.health, reason=self.failure or self.recovering,
            epoch=1 + self.num_recoveries, num_in_flight=1, counts=counts, stages=stages,
            num_recoveries=self.num_recoveries,
        )  # fmt: skip


class Gateway:
    """A running gateway on a fake engine."""

    def __init__(self, engine, tokenizer, security=None, tracer=None):
        self.engine = engine
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        self.server = GatewayServer(engine, tokenizer, metrics, security, tracer=tracer)
        self.target = ""

    def counted(self, name, **labels):
        """A metric's value now; 0 if it was never counted."""
        return self.registry.get_sample_value(f"tightfit_{name}", labels) or 0.0


@asynccontextmanager
async def serving(engine=None, tokenizer=None, security=None, tracer=None):
    """A gateway in this event loop."""
    gateway = Gateway(engine or FakeEngine(), tokenizer or byte_tokenizer(), security, tracer)
    port = await gateway.server.start()
    gateway.target = f"127.0.0.1:{port}"
    try:
        yield gateway
    finally:
        gateway.engine.stalled, gateway.engine.recovering = False, ""
        await gateway.server.stop()


@asynccontextmanager
async def connected(gateway):
    """A channel to it."""
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        yield channel


@contextmanager
def serving_in_thread(engine=None, tokenizer=None, security=None):
    """A gateway in an event loop of its own, for blocking clients."""
    ready, stop = Event(), None
    box = {}

    async def run():
        nonlocal stop
        stop = asyncio.Event()
        async with serving(engine, tokenizer, security) as gateway:
            box["gateway"], box["loop"] = gateway, asyncio.get_running_loop()
            ready.set()
            await stop.wait()

    thread = Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(20)
        yield box["gateway"]
    finally:
        if stop is not None and "loop" in box:
            box["loop"].call_soon_threadsafe(stop.set)
        thread.join(20)


async def until(condition, limit_s=5.0):
    """Wait in the event loop until `condition()` is true; False at the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


def in_loop(test):
    """Run an `async def` test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run
