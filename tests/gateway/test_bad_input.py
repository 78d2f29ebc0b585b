"""A thousand random and malformed requests on the real engine, beside a stream that must not feel
them."""

import asyncio
import contextlib
import random
from collections import Counter

import grpc
import pytest
from fake_engine import in_loop, until
from gateway.test_junk import METHODS, random_bytes, send_junk, status_of
from real_gateway import CONTEXT, VOCAB, expected, real_gateway

from tightfit.v1 import inference_pb2

NUM_REQUESTS, AT_ONCE = 1000, 20
CODES = grpc.StatusCode
ALLOWED = {
    CODES.OK,
    CODES.INVALID_ARGUMENT,
    CODES.NOT_FOUND,
    CODES.RESOURCE_EXHAUSTED,
    CODES.DEADLINE_EXCEEDED,
    CODES.CANCELLED,
}
WATCHED = [3, 1, 4, 1, 5]
SERVICE = "/tightfit.v1.InferenceService/"
LIMITS = {"max_queued_requests": 48, "max_queued_tokens": 2000, "num_blocks": 120}


def plausible(rng):
    """A request that mostly runs, with fields at and beyond the ends of their ranges."""
    max_tokens = rng.choice([1, 2, 5, 20, CONTEXT, 2**31 - 1])
    choices = {
        "min_tokens": [1, 3, CONTEXT + 50],
        "temperature": [0.7, 1.0, 100.0],
        "top_p": [0.1, 1.0, 1.5],
        "top_k": [1, 2**32 - 1],
        "min_p": [0.0, 1.0],
        "seed": [0, 2**64 - 1],
        "repetition_penalty": [0.5, 100.0, 0.0],
        "presence_penalty": [-2.0, 2.0],
        "n": [1, 2, 4, 17],
        "logprobs": [0, 20, 21],
        "stop": [["e"], ["\u202e", "🐦"], ["x" * 256], [""]],
        "stop_token_ids": [[0], list(range(64)), [VOCAB]],
        "ignore_eos": [True],
        "logit_bias": [{0: -100.0}, {VOCAB - 1: 100.0}, {1: 101.0}],
    }
    fields = {name: rng.choice(v) for name, v in choices.items() if rng.random() < 0.15}
    length = rng.choice([1, 2, 7, 40, CONTEXT - 1, CONTEXT])
    return inference_pb2.GenerateRequest(
        token_ids={"ids": [rng.randrange(VOCAB) for _ in range(length)]},
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, **fields),
        request_id=rng.choice(["", "", "", "same"]),
        resume_token_ids=[9] * rng.choice([0, 0, 0, 1, 2, 200]),
        priority=rng.choice([0, 0, 100, -100, 101]),
    ).SerializeToString()


def bad_or_not(rng):
    """A method and the bytes to send to it."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(["Generate", "GenerateStream"]), plausible(rng)
    method = rng.choice(list(METHODS))
    if kind < 0.48:
        return method, b"\x1a" + b"\xff\xff\xff\x02" + b"x" * (5 * 2**20)  # over the limit of 4 MiB
    if kind < 0.55:
        return method, rng.randbytes(rng.randrange(2000))
    return method, random_bytes(METHODS[method], rng)


async def disturb(channel, rng):
    """One call, whose client may leave early or have little time; its status and details."""
    method, data = bad_or_not(rng)
    patience_s = rng.choice([20.0] * 6 + [0.005, 0.03])
    call = asyncio.create_task(status_of(channel, method, data))
    done, _ = await asyncio.wait([call], timeout=patience_s)
    if done:
        return call.result()
    call.cancel()  # which cancels the call that it waits for
    with contextlib.suppress(asyncio.CancelledError):
        await call
    return CODES.CANCELLED, "by us"


async def watch(stubs):
    """A stream's tokens, its offsets checked."""
    sampling = inference_pb2.Sampling(max_tokens=CONTEXT - len(WATCHED), ignore_eos=True)
    request = inference_pb2.GenerateRequest(
        token_ids={"ids": WATCHED}, sampling=sampling, priority=100
    )
    tokens = []
    async for chunk in stubs.inference.GenerateStream(request):
        assert chunk.token_offset == len(tokens)
        tokens += chunk.token_ids
    return tokens


async def keep_watching(stubs, stop):
    """Streams one after another until told to stop; what each had."""
    answers = []
    while not stop.is_set():
        with contextlib.suppress(grpc.aio.AioRpcError):
            answers.append(await watch(stubs))
    return answers


@pytest.mark.parametrize("seed", [1])
def test_a_thousand_random_requests_get_a_right_status_beside_a_stream_that_is_unchanged(seed):
    @in_loop
    async def run():
        rng = random.Random(seed)
        seen, stop = Counter(), asyncio.Event()
        async with real_gateway(**LIMITS) as (gateway, stubs):
            watching = asyncio.create_task(keep_watching(stubs, stop))
            for _ in range(NUM_REQUESTS // AT_ONCE):
                calls = [disturb(stubs.channel, rng) for _ in range(AT_ONCE)]
                for code, details in await asyncio.gather(*calls):
                    seen[code] += 1
                    assert code in ALLOWED, (code, details)
                    assert len(details.encode()) < 4096
                    if code is CODES.INVALID_ARGUMENT:
                        assert ":" in details  # the field, and what is wrong with it
            stop.set()
            answers = await watching
            whole = expected(WATCHED, CONTEXT - len(WATCHED))
            assert len(answers) >= 3
            assert all(answer == whole for answer in answers)
            assert await until(gateway.is_empty)
            assert gateway.engine.health == "idle"
            assert await watch(stubs) == whole
        assert seen.total() == NUM_REQUESTS
        assert seen[CODES.OK] > 100
        assert seen[CODES.INVALID_ARGUMENT] > 200
        assert seen[CODES.RESOURCE_EXHAUSTED] > 5
        assert seen[CODES.CANCELLED] > 5

    run()


@in_loop
async def test_a_message_over_the_limit_is_refused_on_every_method():
    async with real_gateway() as (_, stubs):
        for method in METHODS:
            code, _ = await status_of(stubs.channel, method, b"\x00" * (4 * 2**20 + 1))
            assert code is CODES.RESOURCE_EXHAUSTED, method
        assert await watch(stubs) == expected(WATCHED, CONTEXT - len(WATCHED))


@in_loop
async def test_junk_on_the_port_leaves_a_running_stream_unchanged():
    rng = random.Random(2)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    junk = [b"GET / HTTP/1.0\r\n\r\n", b"\x00" * 5000, rng.randbytes(20_000)]
    junk += [preface + rng.randbytes(rng.randrange(1, 3000)) for _ in range(20)]
    async with real_gateway(delay_s=0.003) as (gateway, stubs):
        host, _, port = gateway.target.rpartition(":")
        stream = asyncio.create_task(watch(stubs))
        assert await until(lambda: gateway.num_blocks_used > 0)
        await asyncio.gather(*(send_junk(host, int(port), data) for data in junk))
        assert await stream == expected(WATCHED, CONTEXT - len(WATCHED))


@in_loop
async def test_unknown_methods_and_services_are_unimplemented():
    async with real_gateway() as (_, stubs):
        for path in (SERVICE + "Nothing", "/tightfit.v1.Other/Generate", "/x/y"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stubs.channel.unary_unary(path)(b"")
            assert caught.value.code() is CODES.UNIMPLEMENTED
