"""Bearer tokens on real calls: who is answered, who is not, and how much."""

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from fake_engine import FakeEngine, in_loop, reply_ids, serving, until
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security import store as store_module
from tightfit.cluster.security.audit import AuditLog
from tightfit.cluster.security.store import TokenStore
from tightfit.cluster.security.tokens import Token, digest, encode
from tightfit.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

CODES = grpc.StatusCode
NOW = datetime.now(UTC)
ANN, OPS, OLD, SLOW = "tft_ann", "tft_ops", "tft_old", "tft_slow"
METHODS = {
    f"/tightfit.v1.{service}/{method}"
    for service, methods in {
        "InferenceService": "Generate GenerateStream Score Tokenize Detokenize GetModel",
        "ClusterService": "GetStatus GetPlan Drain",
    }.items()
    for method in methods.split()
}


def entry(name, secret, **fields):
    return Token(name=name, sha256=digest(secret), created=NOW, **fields)


@pytest.fixture(autouse=True)
def files_are_looked_at_on_each_call(monkeypatch):
    monkeypatch.setattr(store_module, "CHECK_S", 0.0)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_bytes(
        encode(
            [
                entry("ann", ANN),
                entry("ops", OPS, role="admin"),
                entry("old", OLD, expires=NOW - timedelta(seconds=1)),
                entry("slow", SLOW, max_concurrent=1, max_tokens_per_minute=60),
            ]
        )
    )
    return path


@asynccontextmanager
async def guarded(tokens, engine=None):
    """A gateway that asks for tokens and notes admin calls, and a channel to it."""
    audit = AuditLog(str(tokens.parent / "audit.jsonl"))
    security = GatewaySecurity(tokens=TokenStore(tokens), audit=audit)
    async with (
        serving(engine, security=security) as gateway,
        grpc.aio.insecure_channel(gateway.target) as channel,
    ):
        yield gateway, channel


def bearer(secret):
    return (("authorization", f"Bearer {secret}"),)


async def status_of(call):
    """Status and details that a unary call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return CODES.OK, ""


def generate(channel, secret, *, max_tokens=5, prompt="ab"):
    request = inference_pb2.GenerateRequest(
        prompt=prompt, sampling=inference_pb2.Sampling(max_tokens=max_tokens)
    )
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    return stub.Generate(request, metadata=bearer(secret))


def stream(channel, secret, *, max_tokens):
    request = inference_pb2.GenerateRequest(
        prompt="ab", sampling=inference_pb2.Sampling(max_tokens=max_tokens)
    )
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    return stub.GenerateStream(request, metadata=bearer(secret))


# -- who -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer(""),
        bearer("tft_nobody"),
        bearer(digest(ANN)),
        bearer(OLD),
        (("authorization", ANN),),
        (("authorization", f"Basic {ANN}"),),
        (*bearer(ANN), *bearer(OPS)),
        bearer("x" * 5000),
    ],
    ids=lambda metadata: str(metadata)[:40],
)
@in_loop
async def test_without_a_token_in_force_every_method_is_refused(tokens, metadata):
    async with guarded(tokens) as (gateway, channel):
        for method in [*sorted(METHODS), "/no.such.Service/Method"]:
            call = channel.unary_unary(method)(b"\xff\xff nonsense", metadata=metadata)
            code, details = await status_of(call)
            assert code is CODES.UNAUTHENTICATED, method
            assert ANN not in details
        calls = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(calls))
        assert caught.value.code() is CODES.UNAUTHENTICATED
        assert gateway.engine.requests == []
        assert gateway.counted("requests_refused_total", status="UNAUTHENTICATED") == 11
        assert await status_of(generate(channel, ANN)) == (CODES.OK, "")


@in_loop
async def test_health_needs_no_token_and_reflection_does(tokens):
    async with guarded(tokens) as (_, channel):
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        calls = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=bearer(ANN)
        )
        names = {s.name for s in (await anext(aiter(calls))).list_services_response.service}
        assert "tightfit.v1.InferenceService" in names


@in_loop
async def test_every_method_is_answered_with_a_token_and_only_admins_drain(tokens):
    async with guarded(tokens) as (gateway, channel):
        assert (await generate(channel, ANN)).outputs[0].token_ids == reply_ids()[:5]
        chunks = [chunk async for chunk in stream(channel, ANN, max_tokens=7)]
        assert [t for chunk in chunks for t in chunk.token_ids] == reply_ids()[:7]
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        assert (
            await cluster.GetStatus(cluster_pb2.GetStatusRequest(), metadata=bearer(ANN))
        ).model == "fake"
        drain = cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer(ANN))
        code, details = await status_of(drain)
        assert (code, details) == (
            CODES.PERMISSION_DENIED, "Drain needs a token with the role admin",
        )  # fmt: skip
        assert not gateway.server.drain_requested.is_set()
        await cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer(OPS))
        assert gateway.server.drain_requested.is_set()


@in_loop
async def test_nonsense_with_a_token_is_an_invalid_argument_as_ever(tokens):
    async with guarded(tokens) as (_, channel):
        for method in sorted(METHODS - {"/tightfit.v1.ClusterService/Drain"}):
            call = channel.unary_unary(method)(b"\xff\xff nonsense", metadata=bearer(ANN))
            assert (await status_of(call))[0] is CODES.INVALID_ARGUMENT


@in_loop
async def test_a_revoked_token_is_refused_and_ends_the_streams_that_it_runs(tokens):
    engine = FakeEngine()
    engine.delay_s = 0.005
    async with guarded(tokens, engine) as (_, channel):
        theirs, others = (
            aiter(stream(channel, ANN, max_tokens=300)), aiter(stream(channel, OPS, max_tokens=60))
        )  # fmt: skip
        await anext(theirs)
        received = list((await anext(others)).token_ids)
        tokens.write_bytes(encode([entry("ops", OPS), entry("ann", "tft_another")]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [chunk async for chunk in theirs]
        assert caught.value.code() is CODES.UNAUTHENTICATED
        assert await until(lambda: engine.num_unfinished == 1)
        async for chunk in others:
            received += chunk.token_ids
        assert received == reply_ids()[:60]
        assert (await status_of(generate(channel, ANN)))[0] is CODES.UNAUTHENTICATED
        assert (await status_of(generate(channel, "tft_another")))[0] is CODES.OK


# -- how much --------------------------------------------------------------------------------


@in_loop
async def test_calls_at_once_are_limited_per_token_and_end_with_the_call(tokens):
    engine = FakeEngine()
    engine.stalled = True
    async with guarded(tokens, engine) as (gateway, channel):
        running = stream(channel, SLOW, max_tokens=5)
        assert await until(lambda: engine.num_unfinished == 1)
        code, details = await status_of(generate(channel, SLOW))
        assert code is CODES.RESOURCE_EXHAUSTED
        assert details == "token 'slow' has 1 calls under way; 1 are allowed at once"
        assert gateway.counted("requests_refused_total", status="RESOURCE_EXHAUSTED") == 1
        other = generate(channel, ANN)
        assert await until(lambda: engine.num_unfinished == 2)
        running.cancel()
        assert await until(lambda: engine.num_unfinished == 1)
        engine.stalled = False
        await other
        assert (await status_of(generate(channel, SLOW)))[0] is CODES.OK


@in_loop
async def test_calls_beyond_the_limit_end_with_it_however_they_end(tokens):
    """A call that fails, or whose client leaves, gives its place back."""
    async with guarded(tokens) as (gateway, channel):
        for attribute, value in (("crash", RuntimeError("a bug")), ("failure", "gone")):
            setattr(gateway.engine, attribute, value)
            for _ in range(3):
                code, _details = await status_of(generate(channel, SLOW))
                assert code in (CODES.INTERNAL, CODES.UNAVAILABLE)
            setattr(gateway.engine, attribute, None if attribute == "crash" else "")
        for _ in range(3):
            assert (await status_of(generate(channel, SLOW, prompt="")))[0] is (
                CODES.INVALID_ARGUMENT
            )
        assert (await status_of(generate(channel, SLOW)))[0] is CODES.OK


@in_loop
async def test_tokens_per_minute_count_prompt_and_output_and_say_when_there_are_more(tokens):
    async with guarded(tokens) as (_, channel):
        assert (await status_of(generate(channel, SLOW, prompt="a" * 50, max_tokens=40)))[0] is (
            CODES.OK
        )
        call = generate(channel, SLOW)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is CODES.RESOURCE_EXHAUSTED
        assert "has used its 60 tokens per minute" in caught.value.details()
        trailers = dict(caught.value.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        info = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        # 90 were taken of 60: 31 seconds until one is left.
        assert 29 < info.retry_delay.seconds <= 31
        assert (await status_of(generate(channel, ANN)))[0] is CODES.OK
        model = inference_pb2_grpc.InferenceServiceStub(channel).GetModel(
            inference_pb2.GetModelRequest(), metadata=bearer(SLOW)
        )
        assert (await status_of(model))[0] is CODES.OK


@in_loop
async def test_a_prompt_counts_even_if_its_client_leaves_at_once(tokens):
    engine = FakeEngine()
    engine.stalled = True
    async with guarded(tokens, engine) as (_, channel):
        call = generate(channel, SLOW, prompt="a" * 90)
        assert await until(lambda: engine.num_unfinished == 1)
        call.cancel()
        assert await until(lambda: engine.num_unfinished == 0)
        engine.stalled = False
        code, details = await status_of(generate(channel, SLOW))
        assert code is CODES.RESOURCE_EXHAUSTED, details


@in_loop
async def test_a_limit_is_raised_without_a_restart(tokens):
    async with guarded(tokens) as (_, channel):
        await generate(channel, SLOW, max_tokens=100)
        assert (await status_of(generate(channel, SLOW)))[0] is CODES.RESOURCE_EXHAUSTED
        tokens.write_bytes(encode([entry("slow", SLOW)]))
        assert (await status_of(generate(channel, SLOW)))[0] is CODES.OK


# -- the audit log ---------------------------------------------------------------------------


@in_loop
async def test_the_audit_log_says_who_asked_what_from_where_with_which_result(tokens):
    async with guarded(tokens) as (_, channel):
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        await cluster.GetStatus(cluster_pb2.GetStatusRequest(), metadata=bearer(ANN))
        await status_of(cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer(ANN)))
        await status_of(cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer("tft_no")))
        await status_of(
            channel.unary_unary("/tightfit.v1.ClusterService/GetPlan")(
                b"\xff\xff", metadata=bearer(OPS)
            )
        )
        await generate(channel, ANN, prompt="a secret prompt")
        await cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer(OPS))
        file = tokens.parent / "audit.jsonl"
        assert await until(lambda: len(file.read_text().splitlines()) == 5)
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["method"], line["caller"], line["result"]) for line in lines] == [
        ("GetStatus", "ann", "OK"),
        ("Drain", "ann", "PERMISSION_DENIED"),
        ("Drain", None, "UNAUTHENTICATED"),
        ("GetPlan", "ops", "INVALID_ARGUMENT"),
        ("Drain", "ops", "OK"),
    ]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert all(
        abs(datetime.fromisoformat(line["time"]) - NOW) < timedelta(hours=1) for line in lines
    )
    assert "tft_" not in text
    assert "secret prompt" not in text
    assert file.stat().st_mode & 0o777 == 0o600


@in_loop
async def test_an_audit_log_that_was_moved_away_is_opened_anew(tokens):
    async with guarded(tokens) as (_, channel):
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        file = tokens.parent / "audit.jsonl"
        for name in ("first", "second"):
            await cluster.GetStatus(cluster_pb2.GetStatusRequest(), metadata=bearer(OPS))
            assert await until(lambda: file.exists() and file.read_text().count("\n") == 1)
            file.rename(tokens.parent / name)
    assert json.loads((tokens.parent / "second").read_text())["caller"] == "ops"


@in_loop
async def test_an_audit_log_that_cannot_be_written_does_not_stop_a_drain(tokens, caplog):
    async with guarded(tokens) as (gateway, channel):
        (tokens.parent / "audit.jsonl").unlink()
        (tokens.parent / "audit.jsonl").mkdir()
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        await cluster.Drain(cluster_pb2.DrainRequest(), metadata=bearer(OPS))
        assert gateway.server.drain_requested.is_set()
        assert await until(lambda: "the audit log cannot be written" in caplog.text)


@in_loop
async def test_calls_at_once_each_have_their_own_caller(tokens):
    """Who called is a matter of each call, also where many are under way in one event loop."""
    async with guarded(tokens) as (_, channel):
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        calls = [
            status_of(
                cluster.GetStatus(
                    cluster_pb2.GetStatusRequest(), metadata=bearer(OPS if i % 2 else ANN)
                )
            )
            for i in range(60)
        ]
        assert all(code is CODES.OK for code, _ in await asyncio.gather(*calls))
        file = tokens.parent / "audit.jsonl"
        assert await until(lambda: file.read_text().count("\n") == 60)
        callers = [json.loads(line)["caller"] for line in file.read_text().splitlines()]
    assert (callers.count("ann"), callers.count("ops")) == (30, 30)
