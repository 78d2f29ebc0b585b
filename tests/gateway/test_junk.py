"""A thousand random and malformed requests, and junk on the port, beside a stream."""

import asyncio
import contextlib
import math
import random
from collections import Counter

import grpc
import pytest
from fake_engine import CONTEXT, VOCAB, FakeEngine, connected, in_loop, reply_ids, serving

from tightfit.v1 import common_pb2, inference_pb2, inference_pb2_grpc

SERVICE = "/tightfit.v1.InferenceService/"
METHODS = {
    "Generate": inference_pb2.GenerateRequest,
    "GenerateStream": inference_pb2.GenerateRequest,
    "Score": inference_pb2.ScoreRequest,
    "Tokenize": inference_pb2.TokenizeRequest,
    "Detokenize": inference_pb2.DetokenizeRequest,
    "GetModel": inference_pb2.GetModelRequest,
}
OK, INVALID = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
FLOATS = [0.0, -0.0, 0.5, 1.0, 2.0, -3.0, 99.0, 1e38, -1e38, 1e-45, math.nan, math.inf, -math.inf]
COUNTS = [0, 1, 2, 16, 17, 20, 21, 400, 2**31, 2**32 - 1]


def random_text(rng):
    kinds = [
        "",
        "a",
        "\x00",
        "€🐦\u202e\ud7ff" * rng.randrange(30),
        "x" * rng.choice([1, 255, 256, 257, CONTEXT - 1, CONTEXT, 3000]),
    ]
    return rng.choice(kinds)


def random_message(descriptor, rng, depth=0):
    """Fields of every kind, many of them out of range."""
    fields = {}
    for field in descriptor.fields:
        if rng.random() < 0.6 or (field.containing_oneof and rng.random() < 0.3):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            ids = [rng.choice([1, VOCAB, 2**32 - 1]) for _ in range(rng.randrange(3))]
            fields[field.name] = {i: rng.choice(FLOATS) for i in ids}
            continue
        count = rng.choice([0, 1, 3, 70]) if field.is_repeated else 1
        values = [random_value(field, rng, depth) for _ in range(count)]
        fields[field.name] = values if field.is_repeated else values[0]
    return fields


def random_value(field, rng, depth):
    if field.message_type:
        return random_message(field.message_type, rng, depth + 1)
    if field.cpp_type == field.CPPTYPE_STRING:
        return random_text(rng)
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == field.CPPTYPE_FLOAT:
        return rng.choice(FLOATS)
    return rng.choice([0, -5, 999] if field.cpp_type == field.CPPTYPE_INT32 else COUNTS)


def random_bytes(message, rng):
    """A valid message, one that was damaged, or none at all."""
    data = bytearray(message(**random_message(message.DESCRIPTOR, rng)).SerializeToString())
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 7, 100, 5000]))
    if kind == 1 and data:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 2:
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


async def status_of(channel, method, data):
    """The status of a call with raw bytes, and its details."""
    try:
        if method == "GenerateStream":
            async for _ in channel.unary_stream(SERVICE + method)(data, timeout=20):
                pass
        else:
            await channel.unary_unary(SERVICE + method)(data, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return OK, ""


async def read_tokens(stream):
    return [token async for chunk in stream for token in chunk.token_ids]


@pytest.mark.parametrize("seed", range(5))
def test_random_requests_get_a_right_status_and_a_stream_beside_them_is_unchanged(seed):
    @in_loop
    async def run():
        rng = random.Random(seed)
        engine = FakeEngine()
        async with serving(engine) as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            sampling = inference_pb2.Sampling(max_tokens=390)
            watched = inference_pb2.GenerateRequest(prompt="a", sampling=sampling)
            streams = [asyncio.create_task(read_tokens(stub.GenerateStream(watched)))]
            seen = Counter()
            for _ in range(20):
                calls = []
                for _ in range(10):
                    method = rng.choice(list(METHODS))
                    data = random_bytes(METHODS[method], rng)
                    calls.append(status_of(channel, method, data))
                for code, details in await asyncio.gather(*calls):
                    seen[code] += 1
                    assert code in (OK, INVALID, NOT_FOUND), (code, details)
                    if code is INVALID:
                        assert ":" in details  # the field, and what is wrong with it
                streams.append(asyncio.create_task(read_tokens(stub.GenerateStream(watched))))
            for tokens in await asyncio.gather(*streams):
                assert tokens == reply_ids()[:390]
            assert seen.total() == 200
            assert seen[INVALID] > 50
            assert seen[OK] > 10
            assert engine.num_unfinished == 0

    run()


VALID = {
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": -2.0,
    "frequency_penalty": 2.0,
    "n": 2,
    "logprobs": 20,
    "stop": ["x" * 256],
    "stop_token_ids": [VOCAB - 1],
    "logit_bias": {1: 100.0},
    "top_k": 2**32 - 1,
}


def test_values_at_the_edge_of_their_ranges_are_accepted():
    @in_loop
    async def run():
        async with serving() as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            edges = [VALID, {"max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1}]
            edges += [{"temperature": 100.0}, {"top_p": 1.0}, {"n": 16, "max_tokens": 1}]
            edges += [{"stop": ["x"] * 16}, {"stop_token_ids": [1] * 64}, {"logit_bias": {0: -100}}]
            edges += [{"logit_bias": {i: 1.0 for i in range(VOCAB)}}, {"logprobs": 0}]
            for fields in edges:
                sampling = inference_pb2.Sampling(**fields)
                request = inference_pb2.GenerateRequest(
                    prompt="x" * (CONTEXT - 1), sampling=sampling, priority=100,
                    request_id="!" + "~" * 127,
                )  # fmt: skip
                answer = await stub.Generate(request)
                assert len(answer.outputs) == max(1, sampling.n)

    run()


@in_loop
async def test_a_valid_request_with_unknown_fields_is_answered():
    request = inference_pb2.GenerateRequest(prompt="a", token_ids=None)
    data = request.SerializeToString() + b"\xfa\x3f\x03abc"  # field 1023
    async with serving() as gateway, connected(gateway) as channel:
        assert await status_of(channel, "Generate", data) == (OK, "")


@in_loop
async def test_text_that_is_not_utf8_is_an_invalid_argument():
    async with serving() as gateway, connected(gateway) as channel:
        for method in ("Generate", "GenerateStream", "Score"):
            code, details = await status_of(channel, method, b"\x1a\x02\xc3\x28")
            assert code is INVALID, method
            assert "not a valid message" in details


@in_loop
async def test_unknown_methods_are_unimplemented():
    async with serving() as gateway, connected(gateway) as channel:
        assert (await status_of(channel, "Explode", b""))[0] is grpc.StatusCode.UNIMPLEMENTED


async def send_junk(host, port, junk):
    """Write raw bytes to the port and read until the server hangs up, or for a moment."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(junk)
        with contextlib.suppress(TimeoutError, ConnectionError):
            await writer.drain()
            await asyncio.wait_for(reader.read(), 0.1)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@in_loop
async def test_junk_on_the_port_harms_nobody():
    rng = random.Random(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    junk = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        rng.randbytes(10_000),
        preface,
        preface + rng.randbytes(5000),
        preface + settings + b"\xff\xff\xff\x01\x05\x00\x00\x00\x01",  # a frame of 16 MiB
        preface + settings + rng.randbytes(300),
    ]
    engine = FakeEngine()
    engine.delay_s = 0.003
    async with serving(engine) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        sampling = inference_pb2.Sampling(max_tokens=200)
        request = inference_pb2.GenerateRequest(prompt="a", sampling=sampling)
        stream = asyncio.create_task(read_tokens(stub.GenerateStream(request)))
        host, _, port = gateway.target.rpartition(":")
        await asyncio.gather(*(send_junk(host, int(port), data) for data in junk * 3))
        assert await stream == reply_ids()[:200]
        assert (await stub.GetModel(inference_pb2.GetModelRequest())).name == "fake"


@in_loop
async def test_a_conversation_of_three_megabytes_does_not_hold_up_others():
    """Rendering and encoding run off the event loop."""
    message = common_pb2.ChatMessage(role="user", content="ab " * 1000)
    big = inference_pb2.GenerateRequest(chat=common_pb2.Chat(messages=[message] * 1000))
    async with serving() as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [asyncio.create_task(status_of(channel, "Generate", big.SerializeToString()))]
        answered = 0
        while not all(call.done() for call in calls):
            await stub.GetModel(inference_pb2.GetModelRequest())
            answered += 1
        code, details = await calls[0]
    assert code is INVALID
    assert details.startswith("chat: has 3")
    assert answered > 100
