"""How calls end on the real engine when they cannot go on, and that nothing is left of them."""

import asyncio
import contextlib
import time

import grpc
import pytest
from fake_engine import in_loop, until
from real_gateway import CONTEXT, NUM_BLOCKS, VOCAB, expected, real_gateway

from tightfit.v1 import cluster_pb2, inference_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PROMPT = [7, 8, 9]
CALL_LIMIT_S = 10.0


def ask(prompt=PROMPT, *, request_id="", model="", resume=(), priority=0, **sampling):
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        token_ids={"ids": prompt},
        sampling=inference_pb2.Sampling(**{"max_tokens": 100, "ignore_eos": True, **sampling}),
        resume_token_ids=resume,
        priority=priority,
    )


async def error_of(call):
    """How a call fails; its details fit a header."""
    ending = read(call) if hasattr(call, "__aiter__") else call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ending
    assert len(caught.value.details().encode()) < 4096
    return caught.value


async def read(stream):
    return [token async for chunk in stream for token in chunk.token_ids]


TOO_LONG = [5] * CONTEXT
BAD = [
    (ask(prompt=[]), "token_ids"),
    (ask(prompt=[VOCAB]), "token_ids.ids"),
    (ask(prompt=TOO_LONG), "token_ids"),
    (ask(priority=101), "priority"),
    (ask(request_id="a b"), "request_id"),
    (ask(resume=[VOCAB]), "resume_token_ids"),
    (ask(resume=[1] * 101), "resume_token_ids"),
    (ask(prompt=[5] * 100, resume=[1] * 61), "resume_token_ids"),
    (ask(resume=[1], n=2), "resume_token_ids"),
    (ask(max_tokens=0), "sampling.max_tokens"),
    (ask(min_tokens=101), "sampling.min_tokens"),
    (ask(temperature=float("nan")), "sampling.temperature"),
    (ask(top_p=0.0), "sampling.top_p"),
    (ask(min_p=1.5), "sampling.min_p"),
    (ask(repetition_penalty=0.0), "sampling.repetition_penalty"),
    (ask(presence_penalty=3.0), "sampling.presence_penalty"),
    (ask(frequency_penalty=-3.0), "sampling.frequency_penalty"),
    (ask(n=17), "sampling.n"),
    (ask(logprobs=21), "sampling.logprobs"),
    (ask(stop=[""]), "sampling.stop[0]"),
    (ask(stop=["x"] * 17), "sampling.stop"),
    (ask(stop_token_ids=[VOCAB]), "sampling.stop_token_ids"),
    (ask(logit_bias={VOCAB: 1.0}), "sampling.logit_bias"),
    (ask(logit_bias={3: float("inf")}), "sampling.logit_bias[3]"),
]


def test_what_can_never_run_is_refused_by_field_and_leaves_nothing_in_the_scheduler():
    @in_loop
    async def run():
        async with real_gateway() as (gateway, stubs):
            for request, field in BAD:
                error = await error_of(stubs.inference.Generate(request))
                assert error.code() is INVALID, field
                assert error.details().startswith(f"{field}:"), error.details()
                streamed = await error_of(stubs.inference.GenerateStream(request))
                assert (streamed.code(), streamed.details()) == (INVALID, error.details())
            error = await error_of(stubs.inference.Generate(ask(model="other")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert gateway.is_empty()
            assert not gateway.scheduler.has_work

    run()


@in_loop
async def test_a_full_queue_says_when_to_try_again_and_takes_requests_when_it_has_emptied():
    limits = {"max_running_sequences": 1, "max_queued_requests": 2}
    async with real_gateway(**limits) as (gateway, stubs):
        gateway.chain.paused = True
        running = asyncio.create_task(read(stubs.inference.GenerateStream(ask())))
        assert await until(lambda: gateway.num_blocks_used > 0)
        waiting = [asyncio.create_task(read(stubs.inference.GenerateStream(ask()))) for _ in "ab"]
        assert await until(lambda: gateway.engine.status().counts.num_waiting == 2)
        error = await error_of(stubs.inference.Generate(ask()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["retry-after-ms"]) >= 1
        gateway.chain.resume()
        for answer in await asyncio.gather(running, *waiting):
            assert answer == expected(PROMPT, 100)
        assert await read(stubs.inference.GenerateStream(ask())) == expected(PROMPT, 100)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", ["stream", "unary", "score", "connection"])
def test_a_client_that_leaves_frees_its_blocks(kind, n):
    @in_loop
    async def run():
        async with real_gateway(delay_s=0.01) as (gateway, stubs):
            request = ask(n=n)
            async with grpc.aio.insecure_channel(gateway.target) as channel:
                leaver = type(stubs)(channel).inference
                if kind == "unary":
                    call = leaver.Generate(request)
                elif kind == "score":
                    gateway.chain.paused = True
                    call = leaver.Score(inference_pb2.ScoreRequest(token_ids={"ids": [5] * 100}))
                else:
                    call = leaver.GenerateStream(request)
                    await anext(aiter(call))
                assert await until(lambda: gateway.num_blocks_used > 0)
                if kind != "connection":
                    call.cancel()
                    assert await until(gateway.is_empty, limit_s=1)
            assert await until(gateway.is_empty, limit_s=1)
            gateway.chain.resume()
            after = stubs.inference.GenerateStream(ask(max_tokens=20))
            assert await read(after) == expected(PROMPT, 20)

    run()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("kind", ["Generate", "GenerateStream"])
def test_a_deadline_that_passes_frees_the_blocks_even_when_the_stages_are_stuck(kind, paused):
    @in_loop
    async def run():
        async with real_gateway(delay_s=0.02) as (gateway, stubs):
            gateway.chain.paused = paused
            started_s = time.monotonic()
            error = await error_of(getattr(stubs.inference, kind)(ask(n=2), timeout=0.3))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await until(gateway.is_empty, limit_s=1)
            assert 0.25 < time.monotonic() - started_s < 2
            assert await until(
                lambda: gateway.counted("requests_total", finished_reason="deadline") == 1
            )

    run()


@in_loop
async def test_a_deadline_that_passes_in_the_queue_ends_the_request_there():
    async with real_gateway(max_running_sequences=1) as (gateway, stubs):
        gateway.chain.paused = True
        running = asyncio.create_task(read(stubs.inference.GenerateStream(ask())))
        assert await until(lambda: gateway.num_blocks_used > 0)
        error = await error_of(stubs.inference.Generate(ask(), timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await until(lambda: gateway.engine.status().counts.num_waiting == 0, limit_s=1)
        gateway.chain.resume()
        assert await running == expected(PROMPT, 100)


@pytest.mark.parametrize("by_a_stage", [False, True])
def test_a_failed_pipeline_ends_every_request_unavailable_and_refuses_new_ones(by_a_stage):
    @in_loop
    async def run():
        async with real_gateway(delay_s=0.01) as (gateway, stubs):
            calls = [stubs.inference.GenerateStream(ask(n=n)) for n in (1, 3)]
            calls += [stubs.inference.Generate(ask(n=2))]
            await asyncio.gather(*(anext(aiter(call)) for call in calls[:2]))
            assert await until(lambda: gateway.engine.num_unfinished == 3)
            if by_a_stage:
                gateway.chain.fail_with = "stage 1: logits are NaN"
            else:
                gateway.engine.fail("stage 1: logits are NaN")
            for error in await asyncio.gather(*map(error_of, calls)):
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert error.details() == "stage 1: logits are NaN"
            assert await until(gateway.is_empty)
            error = await error_of(stubs.inference.Generate(ask()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            status = await stubs.cluster.GetStatus(cluster_pb2.GetStatusRequest())
            assert status.health == cluster_pb2.HEALTH_FAILED
            assert status.reason == "stage 1: logits are NaN"

    run()


@in_loop
async def test_several_sequences_that_end_in_one_step_all_reach_the_client():
    async with real_gateway() as (_, stubs):
        for n in (2, 5, 16):
            request = ask(n=n, max_tokens=7)
            answer = await stubs.inference.Generate(request, timeout=CALL_LIMIT_S)
            assert [list(o.token_ids) for o in answer.outputs] == [expected(PROMPT, 7)] * n
            tokens = await read(stubs.inference.GenerateStream(request, timeout=CALL_LIMIT_S))
            assert len(tokens) == 7 * n


@in_loop
async def test_an_id_can_be_used_again_at_once_after_its_request_was_cancelled():
    """As by a client that reconnects: tokens of the first request must not reach the second."""
    async with real_gateway() as (_, stubs):
        for i in range(20):
            call = stubs.inference.GenerateStream(ask([7, 8, 9], request_id="again", n=8))
            await anext(aiter(call))
            call.cancel()
            prompt, deadline = [20 + i], time.monotonic() + 5
            code, tokens = INVALID, []
            while code is INVALID and time.monotonic() < deadline:  # still in use
                second = ask(prompt, request_id="again", max_tokens=10)
                answer = stubs.inference.GenerateStream(second, timeout=CALL_LIMIT_S)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    tokens = await read(answer)
                code = await answer.code()
            assert code is grpc.StatusCode.OK
            assert tokens == expected(prompt, 10)


@in_loop
async def test_a_client_that_stops_reading_holds_up_nobody_and_its_blocks_are_freed_at_the_end():
    options = (("grpc.http2.lookahead_bytes", 2048), ("grpc.http2.bdp_probe", 0))
    async with real_gateway() as (gateway, stubs):
        async with grpc.aio.insecure_channel(gateway.target, options=options) as channel:
            request = ask(n=8, max_tokens=150, logprobs=20, temperature=1.0)
            lazy = aiter(type(stubs)(channel).inference.GenerateStream(request))
            count = len((await anext(lazy)).token_ids)
            for _ in range(10):
                stream = stubs.inference.GenerateStream(ask(max_tokens=30), timeout=CALL_LIMIT_S)
                assert await read(stream) == expected(PROMPT, 30)
            assert await until(gateway.is_empty)
            async with asyncio.timeout(CALL_LIMIT_S):
                count += sum([len(chunk.token_ids) async for chunk in lazy])
        assert count == 8 * 150


@in_loop
async def test_a_burst_that_comes_and_goes_at_random_leaves_every_block_free():
    async with real_gateway(num_blocks=60, delay_s=0.001) as (gateway, stubs):
        calls = [
            stubs.inference.GenerateStream(
                ask([2 + i] * (1 + i), n=1 + i % 3, max_tokens=60),
                timeout=0.05 * (1 + i % 4) if i % 4 else None,
            )
            for i in range(40)
        ]
        for i, call in enumerate(calls):
            if i % 5 == 0:
                call.cancel()
            await asyncio.sleep(0.003)
        stays = [i for i in range(40) if i % 4 == 0 and i % 5]
        async with asyncio.timeout(30):
            for i in stays:
                tokens = {}
                async for chunk in calls[i]:
                    tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
                assert tokens == {k: expected([2 + i] * (1 + i), 60) for k in range(1 + i % 3)}
        assert await until(gateway.is_empty)
        assert gateway.engine.status().counts.num_blocks < NUM_BLOCKS
