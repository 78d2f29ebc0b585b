"""What the service says of each request: in its log, and in its metrics."""

import logging
import random
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
import pytest
from fake_engine import CONTEXT, FakeEngine, connected, in_loop, serving, until
from prometheus_client import generate_latest

from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security.store import TokenStore
from tightfit.cluster.security.tokens import Token, digest, encode, new_secret
from tightfit.v1 import inference_pb2, inference_pb2_grpc
from tightfit.workers.logs import TextFormatter

SECRET = "Wer-reitet-so-spaet"


@contextmanager
def logged(level=logging.DEBUG):
    """Records of the service's own loggers, and their lines as text."""

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)
            lines.append(TextFormatter({}).format(record))

    records, lines = [], []
    logger, handler = logging.getLogger("tightfit"), Keep()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield records, lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def wanted(**fields):
    sampling = inference_pb2.Sampling(max_tokens=5, ignore_eos=True)
    return inference_pb2.GenerateRequest(**{"prompt": SECRET, "sampling": sampling, **fields})


@in_loop
async def test_a_finished_request_has_one_line_with_its_counts_and_times():
    with logged() as (records, lines):
        async with serving() as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            async for _ in stub.GenerateStream(wanted(request_id="r-1")):
                pass
            await stub.Score(inference_pb2.ScoreRequest(request_id="s-1", prompt="abcd"))
    finished = [r for r in records if r.name == "tightfit.request"]
    assert [r.getMessage() for r in finished] == ["finished", "finished"]
    first, second = finished
    assert (first.request_id, first.method) == ("r-1", "GenerateStream")
    assert (first.finish_reason, first.generated_tokens) == ("length", 5)
    assert (first.prompt_tokens, first.cached_tokens) == (len(SECRET), 2)
    assert 0 < first.ttft_s <= first.duration_s < 5
    assert (second.request_id, second.method, second.prompt_tokens) == ("s-1", "Score", 4)
    assert not hasattr(second, "ttft_s")  # nothing was generated
    assert "request_id=r-1 method=GenerateStream finish_reason=length" in "".join(lines)


@in_loop
async def test_a_request_that_lived_through_recoveries_says_through_how_many():
    engine = FakeEngine()
    with logged() as (records, _):
        async with serving(engine) as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Generate(wanted())
            for ask, message in (
                (stub.Generate, wanted()),
                (stub.Score, inference_pb2.ScoreRequest(prompt="abcd")),
            ):
                engine.stalled = True
                call = ask(message)
                assert await until(lambda: engine.num_unfinished == 1)
                for _ in range(2):
                    engine.lose("stage 1's process ended")
                    engine.recover()
                engine.stalled = False
                await call
    finished = [r for r in records if r.name == "tightfit.request"]
    assert [getattr(r, "recoveries", None) for r in finished] == [None, 2, 2]


@in_loop
async def test_every_line_that_concerns_a_request_has_its_id():
    engine = FakeEngine()
    engine.crash = RuntimeError("broken")
    with logged() as (_, lines):
        async with serving(engine) as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for name in ("r-1", "r-2"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Generate(wanted(request_id=name))
            engine.crash, engine.overloaded = None, 1.0
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(wanted(request_id="r-3"))
    incidents = [line for line in lines if "incident" in line]
    assert len(incidents) == 2
    assert "request_id=r-1" in incidents[0]
    assert "request_id=r-2" in incidents[1]
    assert "refused method=Generate status=RESOURCE_EXHAUSTED" in lines[-1].replace(
        "request_id=r-3 ", ""
    )
    assert "request_id=r-3" in lines[-1]


@in_loop
async def test_with_tokens_the_lines_say_whose_token_came_and_never_the_token(tmp_path):
    file, secret = tmp_path / "tokens.json", new_secret()
    file.write_bytes(
        encode([Token(name="alice", sha256=digest(secret), created=datetime.now(UTC))])
    )
    security = GatewaySecurity(tokens=TokenStore(file))
    metadata = (("authorization", f"Bearer {secret}"),)
    with logged() as (records, lines):
        async with serving(security=security) as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Generate(wanted(), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(wanted(model="other"), metadata=metadata)
    told = [record for record in records if record.name == "tightfit.request"]
    assert [(r.getMessage(), r.client) for r in told] == [
        ("finished", "alice"),
        ("refused", "alice"),
    ]
    assert not any(secret in line for line in lines)


@in_loop
async def test_nothing_of_a_prompt_or_an_answer_is_ever_logged():
    message = inference_pb2.GenerateRequest().chat.messages.add(role="tool", content=SECRET)
    engine = FakeEngine()
    engine.reply = lambda index: list(SECRET.encode()) * 30
    with logged() as (_, lines):
        async with serving(engine) as gateway, connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            answer = await stub.Generate(wanted())
            assert answer.outputs[0].text == SECRET[:5]
            await stub.Score(inference_pb2.ScoreRequest(prompt=SECRET))
            for bad in (
                wanted(prompt=SECRET * CONTEXT),
                wanted(model=SECRET),
                wanted(chat={"messages": [message]}),  # the template quotes it in its refusal
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Generate(bad)
            engine.error = "gone"
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(wanted())
    assert len([line for line in lines if "refused" in line]) == 3
    assert len([line for line in lines if "finished" in line]) == 3
    assert not any(SECRET in line or SECRET[:5] in line for line in lines)


@in_loop
async def test_no_request_whatever_it_is_adds_a_series_to_the_metrics():
    choose = random.Random(7)
    async with serving() as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        def num_series():
            lines = generate_latest(gateway.registry).decode().splitlines()
            return len([line for line in lines if not line.startswith("#")])

        before = num_series()
        assert before > 200
        codes = set()
        for i in range(60):
            gateway.engine.overloaded = 1.0 if i % 7 == 0 else None
            gateway.engine.error = "gone" if i % 5 == 0 else ""
            request = wanted(
                request_id=f"id-{choose.random()}",
                model=choose.choice(["", "fake", f"m{i}"]),
                priority=choose.choice([0, 100, 101]),
                sampling=inference_pb2.Sampling(
                    max_tokens=choose.choice([1, 30]), n=choose.choice([1, 3, 99]),
                    stop=[choose.choice(["x", "Vö"])],
                ),
            )  # fmt: skip
            try:
                await stub.Generate(request, timeout=choose.choice([None, 1e-4]))
                codes.add(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
        assert len(codes) >= 4  # and DEADLINE_EXCEEDED, if one so short passes in time
        assert num_series() == before
