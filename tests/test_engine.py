"""The engine by itself, where its thread and the event loop meet."""

import threading
from contextlib import asynccontextmanager

import pytest
from doubles import request
from fake_engine import in_loop, until
from real_gateway import RealGateway, expected

from tightfit.cluster.errors import InvalidRequestError, UnavailableError
from tightfit.cluster.request import FinishReason


@asynccontextmanager
async def running_engine(**settings):
    """An engine without a gateway, and the stages that it uses."""
    gateway = RealGateway(**settings)
    gateway.engine.start()
    try:
        yield gateway.engine, gateway
    finally:
        gateway.chain.resume()
        gateway.engine.stop()
        await gateway.server.stop()
    gateway.scheduler.check_integrity()
    assert gateway.num_blocks_used == 0


async def read(stream):
    """Tokens by sequence, and why each ended."""
    tokens, reasons = {}, {}
    async for event in stream:
        if event.token_id is not None:
            tokens.setdefault(event.index, []).append(event.token_id)
        if event.finish_reason is not None:
            reasons[event.index] = event.finish_reason
    return tokens, reasons


@in_loop
async def test_the_end_of_every_sequence_arrives_when_they_end_in_one_step():
    async with running_engine() as (engine, _):
        for n in (1, 2, 9):
            tokens, reasons = await read(engine.submit(request("r", [5, 6], n=n, ignore_eos=True)))
            assert tokens == {i: expected([5, 6], 8) for i in range(n)}
            assert reasons == dict.fromkeys(range(n), FinishReason.LENGTH)
            assert await until(lambda: engine.num_unfinished == 0)


@pytest.mark.parametrize("n", [1, 3])
def test_the_end_of_every_sequence_arrives_when_they_are_cancelled_or_the_engine_fails(n):
    @in_loop
    async def run():
        async with running_engine() as (engine, gateway):
            gateway.chain.paused = True
            first = engine.submit(request("a", [5], n=n))
            second = engine.submit(request("b", [6], n=n))
            first.cancel()
            _, reasons = await read(first)
            assert reasons == dict.fromkeys(range(n), FinishReason.CANCELLED)
            engine.fail("gone")
            _, reasons = await read(second)
            assert reasons == dict.fromkeys(range(n), FinishReason.ERROR)
            with pytest.raises(UnavailableError, match="gone"):
                engine.submit(request("c", [5]))

    run()


@in_loop
async def test_tokens_on_their_way_to_a_cancelled_request_do_not_reach_the_next_of_its_name():
    async with running_engine() as (engine, gateway):
        may_send, is_held = threading.Event(), threading.Event()
        gateway.chain.paused = True
        first = engine.submit(request("again", [5], max_tokens=100, ignore_eos=True))
        assert await until(lambda: gateway.num_blocks_used > 0)
        send = gateway.chain.send

        def held_send(batch):
            is_held.set()
            may_send.wait(10)
            send(batch)

        # The engine's thread now takes a token in, refills, and is held before it hands it out.
        gateway.chain.send = held_send
        gateway.chain.resume()
        assert await until(is_held.is_set)
        first.cancel()
        await read(first)
        try:
            second = engine.submit(request("again", [7], ignore_eos=True))
        finally:
            may_send.set()
        tokens, _ = await read(second)
    assert tokens == {0: expected([7], 8)}


@in_loop
async def test_ending_a_request_that_has_ended_does_not_end_the_next_of_its_name():
    """A client reuses an id as soon as its call is done, and the end of the first call may be
    noticed only after the second has begun."""
    async with running_engine() as (engine, gateway):
        first = engine.submit(request("again", [5], n=2, ignore_eos=True))
        await read(first)
        assert await until(lambda: engine.num_unfinished == 0)
        gateway.chain.paused = True
        second = engine.submit(request("again", [6], ignore_eos=True))
        first.cancel()
        first.finish(0, FinishReason.STOP_SEQUENCE)
        gateway.chain.resume()
        tokens, reasons = await read(second)
        assert reasons == {0: FinishReason.LENGTH}
        assert tokens == {0: expected([6], 8)}


class WhileItFails:
    """A request at the sight of which the engine fails: in the middle of `submit`."""

    def __init__(self, engine, whole):
        self._engine, self._whole = engine, whole

    def __getattr__(self, name):
        self._engine.fail("gone")
        return getattr(self._whole, name)


@in_loop
async def test_a_request_that_comes_while_the_engine_fails_is_refused_and_not_forgotten():
    async with running_engine() as (engine, gateway):
        with pytest.raises(UnavailableError, match="gone"):
            engine.submit(WhileItFails(engine, request("a", [5])))
        assert not gateway.scheduler.has_work
        assert engine.num_unfinished == 0


@in_loop
async def test_a_name_in_use_is_refused_and_its_owner_undisturbed():
    async with running_engine() as (engine, gateway):
        gateway.chain.paused = True
        first = engine.submit(request("one", [5], ignore_eos=True))
        with pytest.raises(InvalidRequestError, match="request_id"):
            engine.submit(request("one", [6]))
        gateway.chain.resume()
        assert (await read(first))[0] == {0: expected([5], 8)}


@in_loop
async def test_stopping_ends_what_runs():
    async with running_engine() as (engine, gateway):
        gateway.chain.paused = True
        stream = engine.submit(request("a", [5], n=2))
        engine.stop()
        _, reasons = await read(stream)
        assert reasons == dict.fromkeys(range(2), FinishReason.ERROR)
