"""Clients that leave, come too late, or stop reading."""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from fake_engine import (
    CONTEXT,
    FakeEngine,
    connected,
    in_loop,
    reply_ids,
    serving,
    until,
)

from tightfit.cluster.request import FinishReason
from tightfit.v1 import inference_pb2, inference_pb2_grpc

SOON_S = 0.5


def ask(request_id="r", max_tokens=300, **sampling):
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt="Sing",
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, **sampling),
    )


def slow_engine(delay_s=0.01):
    engine = FakeEngine()
    engine.delay_s = delay_s
    return engine


@in_loop
async def test_cancelling_a_stream_ends_its_request_at_once():
    async with serving(slow_engine()) as gateway, connected(gateway) as channel:
        stream = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(ask())
        await anext(aiter(stream))
        left_s = time.monotonic()
        stream.cancel()
        assert await until(lambda: "r" in gateway.engine.cancelled)
        reason, when_s = gateway.engine.cancelled["r"]
        assert reason is FinishReason.CANCELLED
        assert when_s - left_s < SOON_S
        assert gateway.engine.num_unfinished == 0
        assert await until(
            lambda: gateway.counted("requests_total", finished_reason="cancelled") == 1
        )


@in_loop
async def test_cancelling_before_the_first_token_ends_the_request_too():
    engine = slow_engine()
    engine.stalled = True
    async with serving(engine) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [
            stub.GenerateStream(ask("stream")),
            stub.Generate(ask("unary")),
            stub.Score(inference_pb2.ScoreRequest(prompt="ab", request_id="score")),
        ]
        assert await until(lambda: engine.num_unfinished == 3)
        for call in calls:
            call.cancel()
        assert await until(lambda: set(engine.cancelled) == {"stream", "unary", "score"})


@in_loop
async def test_a_client_whose_connection_breaks_is_noticed():
    async with serving(slow_engine()) as gateway:
        async with connected(gateway) as channel:
            stream = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(ask())
            await anext(aiter(stream))
        assert await until(lambda: "r" in gateway.engine.cancelled)


@pytest.mark.parametrize(
    ("deadline_s", "held_s"),
    [
        pytest.param(0.3, 0.0, id="as it is"),
        pytest.param(1.001, 0.0, id="which gRPC writes as 1.01 s"),
        pytest.param(0.3, 0.05, id="of a request that was long on its way"),
    ],
)
@in_loop
async def test_a_deadline_ends_the_call_and_the_request(deadline_s, held_s):
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(slow_engine()))
        way = SlowWay(gateway.target)
        target = await stack.enter_async_context(way.open())
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request_id, make in [
            ("unary", lambda: stub.Generate(ask("unary"), timeout=deadline_s)),
            ("stream", lambda: drain(stub.GenerateStream(ask("stream"), timeout=deadline_s))),
        ]:
            way.close_for(held_s)
            started_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await make()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await until(lambda request_id=request_id: request_id in gateway.engine.cancelled)
            reason, when_s = gateway.engine.cancelled[request_id]
            assert reason is FinishReason.DEADLINE
            assert deadline_s / 2 < when_s - started_s < deadline_s + SOON_S
        assert await until(
            lambda: gateway.counted("requests_total", finished_reason="deadline") == 2
        )
        for request in gateway.engine.requests:
            assert request.deadline_s is not None


@in_loop
async def test_who_leaves_with_half_of_the_time_left_was_not_late():
    async with serving(slow_engine()) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request_id, deadline_s in [("short", 2.0), ("long", 3600.0)]:
            stream = stub.GenerateStream(ask(request_id), timeout=deadline_s)
            await anext(aiter(stream))
            stream.cancel()
            assert await until(lambda request_id=request_id: request_id in gateway.engine.cancelled)
            assert gateway.engine.cancelled[request_id][0] is FinishReason.CANCELLED


class SlowWay:
    """A way to a server that can be closed for a while."""

    def __init__(self, server):
        self.server = server
        self.opens_s = 0.0

    def close_for(self, seconds):
        self.opens_s = time.monotonic() + seconds

    async def connection(self, reader, writer):
        there, back = await asyncio.open_connection(*self.server.split(":"))
        await asyncio.gather(self.forward(reader, back), self.forward(there, writer))

    async def forward(self, reader, writer):
        while data := await reader.read(65536):
            await asyncio.sleep(self.opens_s - time.monotonic())
            writer.write(data)
        writer.close()

    @asynccontextmanager
    async def open(self):
        listening = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        async with listening:
            yield "{}:{}".format(*listening.sockets[0].getsockname())


async def drain(stream):
    async for _ in stream:
        pass


@in_loop
async def test_a_request_that_has_ended_is_not_cancelled_afterwards():
    async with serving() as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await drain(stub.GenerateStream(ask(max_tokens=4)))
        await stub.Generate(ask(max_tokens=4))
        await asyncio.sleep(0.05)
    assert gateway.engine.cancelled == {}


@in_loop
async def test_a_client_that_stops_reading_holds_up_nobody_and_loses_nothing():
    """Its chunks are large, so that they fill what the connection buffers."""
    engine = FakeEngine()
    engine.delay_s = 0.0005
    options = (("grpc.http2.lookahead_bytes", 2048), ("grpc.http2.bdp_probe", 0))
    async with serving(engine) as gateway:
        async with grpc.aio.insecure_channel(gateway.target, options=options) as lazy:
            request = ask("lazy", max_tokens=390, logprobs=20, n=8)
            stream = inference_pb2_grpc.InferenceServiceStub(lazy).GenerateStream(request)
            reader = aiter(stream)
            tokens = {index: [] for index in range(8)}
            first = await anext(reader)
            tokens[first.index] += first.token_ids
            async with connected(gateway) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                started_s = time.monotonic()
                for i in range(10):
                    answer = await stub.Generate(ask(f"quick{i}", max_tokens=20))
                    assert list(answer.outputs[0].token_ids) == reply_ids()[:20]
                assert time.monotonic() - started_s < 10
            assert await until(lambda: "lazy" not in gateway.engine._streams, limit_s=30)
            async for chunk in reader:
                assert chunk.token_offset == len(tokens[chunk.index])
                tokens[chunk.index] += chunk.token_ids
        assert tokens == {index: reply_ids(index, 390) for index in range(8)}
        assert 1000 < engine.max_waiting <= 8 * 390  # it did stop reading, and waits at most so


@in_loop
async def test_a_client_that_stops_reading_and_then_leaves_ends_its_request():
    engine = FakeEngine()
    engine.burst = CONTEXT
    async with serving(engine) as gateway, connected(gateway) as channel:
        engine.stalled = False
        stream = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            ask(max_tokens=390, logprobs=20, n=16)
        )
        await anext(aiter(stream))
        stream.cancel()
        assert await until(lambda: gateway.engine.num_unfinished == 0)
        # Its generator is closed as well, not only its call.
        assert await until(
            lambda: (
                sum(
                    gateway.counted("requests_total", finished_reason=reason)
                    for reason in ("cancelled", "length")
                )
                == 1
            )
        )
