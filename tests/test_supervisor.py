"""A lost pipeline comes back: what requests, clients and operators notice of it. The stages are
modelled; tests/integration/test_recovery.py kills real ones."""

import asyncio
import random
import threading
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from doubles import request
from fake_engine import in_loop, until
from real_gateway import BLOCK_SIZE, NUM_BLOCKS, RealGateway, SampledStages, expected, real_gateway

from tightfit.cluster import engine
from tightfit.cluster.errors import PlacementError, UnavailableError
from tightfit.cluster.request import FinishReason
from tightfit.cluster.supervisor import FIRST_EPOCH, Supervisor
from tightfit.v1 import inference_pb2


class Repair:
    """Fresh stages, as soon as it is allowed."""

    def __init__(self, gateway):
        self._gateway = gateway
        self.epochs = []
        self.failures = []
        """Each is raised once, before the repair succeeds."""
        self.num_blocks = NUM_BLOCKS
        self.may_end = threading.Event()
        self.may_end.set()
        self.begun = threading.Event()
        self.supervisor = Supervisor(first_pause_s=0.01)

    def __call__(self, epoch):
        self.epochs.append(epoch)
        self.begun.set()
        while not self.may_end.wait(0.01):
            self.supervisor.check()
        if self.failures:
            raise self.failures.pop(0)
        self._gateway.chain.replace(SampledStages(num_blocks=self.num_blocks))
        return self.num_blocks

    def lose(self, reason="stage 1's process ended"):
        """What is in flight, and all KV, is gone."""
        self.begun.clear()
        self._gateway.chain.replace(None)
        self.supervisor.lost(reason, self._gateway.epoch)


@asynccontextmanager
async def supervised(**settings):
    """A gateway, a client of it, and what repairs the stages behind it."""
    async with real_gateway(**settings) as (gateway, stubs):
        repair = Repair(gateway)
        repair.supervisor.start(gateway.engine, repair)
        try:
            yield gateway, stubs, repair
        finally:
            repair.may_end.set()
            repair.supervisor.close()


async def read(stream):
    """Tokens of each sequence of a stream, whose offsets leave no gap."""
    tokens = {}
    async for chunk in stream:
        mine = tokens.setdefault(chunk.index, [])
        if chunk.token_ids:
            assert chunk.token_offset == len(mine)
        mine += chunk.token_ids
    return tokens


def ask(prompt, **sampling):
    return inference_pb2.GenerateRequest(
        token_ids={"ids": prompt},
        sampling=inference_pb2.Sampling(**{"max_tokens": 100, "ignore_eos": True, **sampling}),
    )


@in_loop
async def test_streams_go_on_with_the_same_tokens_however_often_the_stages_are_lost():
    generator = random.Random(3)
    async with supervised(delay_s=0.002) as (gateway, stubs, repair):
        prompts = [[2 + i] * (1 + 7 * i) for i in range(8)]
        calls = [stubs.inference.GenerateStream(ask(p, n=1 + i % 2)) for i, p in enumerate(prompts)]
        readers = [asyncio.create_task(read(call)) for call in calls]
        for count in range(1, 6):
            await asyncio.sleep(generator.uniform(0.01, 0.1))
            repair.lose()
            assert await until(lambda count=count: gateway.engine.status().num_recoveries == count)
        for i, reader in enumerate(readers):
            assert await reader == dict.fromkeys(range(1 + i % 2), expected(prompts[i], 100))
        assert repair.epochs == [FIRST_EPOCH + count for count in range(1, 6)]
        status = gateway.engine.status()
        assert (status.epoch, status.health, status.reason) == (FIRST_EPOCH + 5, "idle", "")
        assert gateway.counted("recoveries_total") == 5
        assert gateway.counted("replayed_tokens_total") > sum(map(len, prompts))
        assert gateway.counted("recovery_seconds_count") == 5


@in_loop
async def test_scores_and_sampled_tokens_are_those_of_a_pipeline_that_was_never_lost():
    sampled = ask([5, 6, 7], temperature=1.0, seed=9, n=3, logprobs=2, presence_penalty=0.5)
    score = inference_pb2.ScoreRequest(token_ids={"ids": list(range(2, 150))})
    answers = []
    for losses in (0, 2):
        async with supervised(delay_s=0.002, max_batch_tokens=16) as (gateway, stubs, repair):
            calls = [stubs.inference.Generate(sampled), stubs.inference.Score(score)]
            for _ in range(losses):
                await asyncio.sleep(0.01)
                repair.lose()
                assert await until(lambda: gateway.engine.health != "recovering")
            answers.append([await call for call in calls])
            assert len(repair.epochs) == losses
    for answer, again in zip(*answers, strict=True):
        answer.request_id = again.request_id = ""
        assert answer == again


@in_loop
async def test_while_it_comes_back_requests_wait_and_new_ones_queue():
    async with supervised() as (gateway, stubs, repair):
        repair.may_end.clear()
        gateway.chain.paused = True
        running = asyncio.create_task(read(stubs.inference.GenerateStream(ask([5]))))
        assert await until(lambda: gateway.num_blocks_used > 0)
        repair.lose("stage 0 on n1 has died")
        assert await until(repair.begun.is_set)
        status = gateway.engine.status()
        assert (status.health, status.reason) == ("recovering", "stage 0 on n1 has died")
        assert status.stages == ()
        new = asyncio.create_task(read(stubs.inference.GenerateStream(ask([6]))))
        assert await until(lambda: gateway.engine.num_unfinished == 2)
        gateway.chain.paused = False
        await asyncio.sleep(0.1)
        assert not running.done()
        assert not new.done()
        repair.may_end.set()
        assert await running == {0: expected([5], 100)}
        assert await new == {0: expected([6], 100)}


@in_loop
async def test_who_leaves_or_is_late_while_it_comes_back_leaves_nothing_behind():
    async with supervised() as (gateway, stubs, repair):
        repair.may_end.clear()
        gateway.chain.paused = True
        gone = stubs.inference.GenerateStream(ask([5]))
        late = asyncio.create_task(read(stubs.inference.GenerateStream(ask([6]), timeout=0.3)))
        assert await until(lambda: gateway.engine.num_unfinished == 2)
        repair.lose()
        assert await until(repair.begun.is_set)
        gone.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await until(lambda: gateway.engine.num_unfinished == 0)
        assert gateway.engine.health == "recovering"
        gateway.chain.paused = False
        repair.may_end.set()
        assert await read(stubs.inference.GenerateStream(ask([7]))) == {0: expected([7], 100)}


@in_loop
async def test_when_it_does_not_come_back_every_request_ends_with_the_reason_until_it_does():
    async with supervised() as (gateway, stubs, repair):
        gateway.chain.paused = True
        running = stubs.inference.GenerateStream(ask([5]))
        assert await until(lambda: gateway.num_blocks_used > 0)
        repair.may_end.clear()
        repair.failures = [PlacementError("no node n1"), RuntimeError("what nobody expected")]
        repair.lose("stage 0 has died")
        assert await until(repair.begun.is_set)
        repair.may_end.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(running)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "stage 0 has died. It is not back yet: no node n1"
        assert await until(lambda: gateway.engine.health == "idle")
        assert len(repair.epochs) == 3
        assert repair.epochs == sorted(set(repair.epochs))
        gateway.chain.paused = False
        assert await read(stubs.inference.GenerateStream(ask([7]))) == {0: expected([7], 100)}
        assert gateway.engine.status().reason == ""


@in_loop
async def test_while_attempts_fail_requests_are_refused_and_after_long_a_restart_helps(monkeypatch):
    async with supervised() as (gateway, _, repair):
        repair.failures = [PlacementError("no node n1")] * 100_000
        repair.lose("stage 0 has died")
        assert await until(lambda: gateway.engine.health == "failed")
        with pytest.raises(UnavailableError, match="It is not back yet: no node n1"):
            gateway.engine.submit(request("a", [5]))
        assert not gateway.engine.needs_restart
        monkeypatch.setattr(engine, "RESTART_AFTER_S", 0.0)
        assert gateway.engine.needs_restart
        repair.failures.clear()
        assert await until(lambda: gateway.engine.health == "idle")
        assert not gateway.engine.needs_restart


@in_loop
async def test_a_step_that_a_stage_cannot_compute_is_a_loss_too():
    async with supervised() as (gateway, stubs, repair):
        gateway.chain.fail_with = "stage 1: out of memory"
        assert await read(stubs.inference.GenerateStream(ask([5]))) == {0: expected([5], 100)}
        assert gateway.engine.status().num_recoveries == 1
        assert repair.epochs == [FIRST_EPOCH + 1]


@in_loop
async def test_a_request_that_stages_die_of_is_given_up_and_the_others_are_not():
    async with supervised(max_running_sequences=1) as (gateway, stubs, repair):
        gateway.chain.deadly_token = 13
        deadly = stubs.inference.GenerateStream(ask([13]))
        beside = asyncio.create_task(read(stubs.inference.GenerateStream(ask([5], max_tokens=3))))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(deadly)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "lost 3 times in a row while it computed this request" in caught.value.details()
        assert await beside == {0: expected([5], 3)}
        assert len(repair.epochs) == 3


@in_loop
async def test_news_of_a_loss_that_is_mended_already_is_none():
    async with supervised() as (gateway, stubs, repair):
        repair.lose()
        assert await until(lambda: gateway.engine.status().num_recoveries == 1)
        repair.supervisor.lost("stage 1's process ended", FIRST_EPOCH)
        assert await read(stubs.inference.GenerateStream(ask([5]))) == {0: expected([5], 100)}
        assert len(repair.epochs) == 1


@in_loop
async def test_a_smaller_cache_afterwards_ends_what_it_cannot_hold_and_serves_the_rest():
    async with supervised() as (gateway, stubs, repair):
        gateway.chain.paused = True
        long = stubs.inference.GenerateStream(ask([5] * 50))
        short = asyncio.create_task(read(stubs.inference.GenerateStream(ask([6], max_tokens=20))))
        assert await until(lambda: gateway.engine.num_unfinished == 2)
        repair.num_blocks = 120 // BLOCK_SIZE
        repair.lose()
        gateway.chain.paused = False
        with pytest.raises(grpc.aio.AioRpcError, match="may need 150 tokens of KV cache"):
            await read(long)
        assert await short == {0: expected([6], 20)}
        served = await stubs.inference.GetModel(inference_pb2.GetModelRequest())
        assert served.max_context_tokens == 120
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(stubs.inference.GenerateStream(ask([5] * 130)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@in_loop
async def test_a_loss_before_anybody_watches_is_not_forgotten():
    gateway = RealGateway()
    repair = Repair(gateway)
    repair.lose()
    repair.supervisor.start(gateway.engine, repair)
    gateway.engine.start()
    try:
        assert await until(lambda: gateway.engine.status().num_recoveries == 1)
    finally:
        repair.supervisor.close()
        gateway.engine.stop()


@in_loop
async def test_a_service_that_ends_does_not_wait_for_its_pipeline():
    async with supervised() as (gateway, _, repair):
        repair.may_end.clear()
        stream = gateway.engine.submit(request("a", [5], max_tokens=50, ignore_eos=True))
        repair.lose()
        assert await until(repair.begun.is_set)
        started_s = time.monotonic()
        repair.supervisor.close()
        gateway.engine.stop()
        assert time.monotonic() - started_s < 5
        reasons = [event.finish_reason async for event in stream]
        assert reasons[-1] in (FinishReason.ERROR, FinishReason.LENGTH)
