"""Which status a call ends with, and what it says."""

import logging
import math

import grpc
import pytest
from fake_engine import (
    CONTEXT,
    VOCAB,
    FakeEngine,
    byte_tokenizer,
    connected,
    in_loop,
    serving,
)
from google.rpc import error_details_pb2, status_pb2

from tightfit.cluster.gateway.status import truncate
from tightfit.v1 import common_pb2, inference_pb2, inference_pb2_grpc

NAN, INF = math.nan, math.inf
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def chat(*messages):
    return common_pb2.Chat(
        messages=[common_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )


async def failure(gateway, request, method="Generate", **call):
    """How a call fails."""
    async with connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request, **call)
        return caught.value


async def stream_failure(gateway, request, **call):
    """How a stream fails, and the chunks before."""
    chunks = []

    async def read(stream):
        async for chunk in stream:
            chunks.append(chunk)

    async with connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(stub.GenerateStream(request, **call))
        return caught.value, chunks


BAD_SAMPLING = [
    ("max_tokens", 0),
    ("max_tokens", 2**31),
    ("min_tokens", 129),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", NAN),
    ("temperature", INF),
    ("top_p", 0.0),
    ("top_p", -1.0),
    ("top_p", 1.01),
    ("top_p", NAN),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", NAN),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 101.0),
    ("repetition_penalty", NAN),
    ("presence_penalty", 2.1),
    ("presence_penalty", -INF),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", NAN),
    ("n", 17),
    ("logprobs", 21),
    ("stop", ["ok", ""]),
    ("stop", ["x" * 257]),
    ("stop", ["x"] * 17),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [1] * 65),
    ("logit_bias", {VOCAB: 1.0}),
    ("logit_bias", {3: NAN}),
    ("logit_bias", {3: 100.5}),
    ("logit_bias", {3: -INF}),
]


def test_a_sampling_field_out_of_its_range_is_named_with_its_value_and_nothing_runs():
    @in_loop
    async def run():
        async with serving() as gateway:
            for field, value in BAD_SAMPLING:
                sampling = inference_pb2.Sampling(**{field: value})
                request = inference_pb2.GenerateRequest(prompt="a", sampling=sampling)
                error = await failure(gateway, request)
                assert error.code() is INVALID, (field, value)
                assert error.details().startswith(f"sampling.{field}"), (field, error.details())
                if isinstance(value, float):
                    assert f"{value:g}" in error.details()
            assert gateway.engine.requests == []
            refused = gateway.counted("requests_refused_total", status="INVALID_ARGUMENT")
            assert refused == len(BAD_SAMPLING)

    run()


IDS = common_pb2.TokenIds
BAD_REQUESTS = [
    ({}, "prompt: is missing; set one of prompt, token_ids, chat"),
    ({"prompt": ""}, "prompt: is empty"),
    ({"token_ids": IDS()}, "token_ids: is empty"),
    ({"token_ids": IDS(ids=[1, VOCAB])}, f"token_ids.ids: token id {VOCAB}"),
    ({"prompt": "x" * CONTEXT}, f"prompt: has {CONTEXT} tokens"),
    ({"token_ids": IDS(ids=[1] * CONTEXT)}, f"token_ids: has {CONTEXT} tokens"),
    ({"chat": chat(("user", "x" * CONTEXT))}, "chat: has 4"),
    ({"chat": chat()}, "chat.messages: has 0 messages"),
    ({"chat": chat(*[("user", "x")] * 1025)}, "chat.messages: has 1025 messages"),
    ({"chat": chat(("user", "a"), ("", "b"))}, "chat.messages[1].role: is ''"),
    ({"chat": chat(("u" * 33, "a"))}, "chat.messages[0].role"),
    ({"chat": chat(("user>\n<system", "a"))}, "chat.messages[0].role"),
    ({"chat": chat(("tool", "hammer"))}, "chat: the checkpoint's chat template refuses it: no too"),
    ({"prompt": "a", "request_id": "x" * 129}, "request_id:"),
    ({"prompt": "a", "request_id": "a b"}, "request_id:"),
    ({"prompt": "a", "request_id": "ä"}, "request_id:"),
    ({"prompt": "a", "request_id": "a\x00"}, "request_id:"),
    ({"prompt": "a", "priority": 101}, "priority: is 101"),
    ({"prompt": "a", "priority": -101}, "priority: is -101"),
    ({"prompt": "a", "resume_token_ids": [VOCAB]}, "resume_token_ids: token id"),
    ({"prompt": "a", "resume_token_ids": [1] * 129}, "resume_token_ids: has 129 tokens"),
    (
        {
            "prompt": "a",
            "resume_token_ids": [1] * (CONTEXT + 1),
            "sampling": inference_pb2.Sampling(max_tokens=10**6),
        },
        f"resume_token_ids: has {CONTEXT + 1} tokens; the context allows {CONTEXT}",
    ),
    (
        {"prompt": "a", "resume_token_ids": [1], "sampling": inference_pb2.Sampling(n=2)},
        "resume_token_ids: can only",
    ),
]


def test_a_bad_request_is_refused_with_the_field_at_fault():
    @in_loop
    async def run():
        async with serving() as gateway:
            for fields, expected in BAD_REQUESTS:
                request = inference_pb2.GenerateRequest(**fields)
                error = await failure(gateway, request)
                assert error.code() is INVALID, expected
                assert error.details().startswith(expected), error.details()
                streamed, chunks = await stream_failure(gateway, request)
                assert (streamed.code(), streamed.details()) == (INVALID, error.details())
                assert chunks == []
            assert gateway.engine.requests == []

    run()


@in_loop
async def test_the_other_methods_check_what_they_are_given_too():
    async with serving(tokenizer=byte_tokenizer(chat_template=None)) as gateway:
        for method, request, expected in [
            ("Score", inference_pb2.ScoreRequest(), "prompt: is missing; set one of prompt, tok"),
            ("Score", inference_pb2.ScoreRequest(prompt="x" * 401), "prompt: has 401 tokens"),
            ("Score", inference_pb2.ScoreRequest(prompt="x", priority=500), "priority"),
            ("Tokenize", inference_pb2.TokenizeRequest(), "prompt: is missing"),
            ("Tokenize", inference_pb2.TokenizeRequest(prompt=""), "prompt: is empty"),
            ("Tokenize", inference_pb2.TokenizeRequest(chat=chat(("user", "a"))), "chat: this ch"),
            ("Detokenize", inference_pb2.DetokenizeRequest(token_ids=[2**32 - 1]), "token_ids"),
        ]:
            error = await failure(gateway, request, method)
            assert error.code() is INVALID, method
            assert error.details().startswith(expected), error.details()


@in_loop
async def test_another_model_is_not_found_and_the_served_one_is_named():
    async with serving() as gateway:
        for method, request in [
            ("Generate", inference_pb2.GenerateRequest(model="gpt", prompt="a")),
            ("Score", inference_pb2.ScoreRequest(model="gpt", prompt="a")),
            ("Tokenize", inference_pb2.TokenizeRequest(model="gpt", prompt="a")),
            ("Detokenize", inference_pb2.DetokenizeRequest(model="gpt")),
        ]:
            error = await failure(gateway, request, method)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert "'gpt'" in error.details()
            assert "'fake'" in error.details()
        served = inference_pb2.DetokenizeRequest(model="fake", token_ids=[97])
        async with connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            assert (await stub.Detokenize(served)).text == "a"


@in_loop
async def test_an_overloaded_service_says_when_to_try_again():
    engine = FakeEngine()
    engine.overloaded = 2.5
    async with serving(engine) as gateway:
        error = await failure(gateway, inference_pb2.GenerateRequest(prompt="a"))
        assert gateway.counted("requests_refused_total", status="RESOURCE_EXHAUSTED") == 1
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "1024 sequences are waiting"
    trailers = dict(error.trailing_metadata())
    assert trailers["retry-after-ms"] == "2500"
    rich = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (8, error.details())
    info = error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 2500


@in_loop
async def test_a_failed_engine_and_a_draining_one_are_unavailable_with_the_reason():
    async with serving() as gateway:
        gateway.engine.failure = "stage 1 on n2 has died"
        error = await failure(gateway, inference_pb2.GenerateRequest(prompt="a"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "stage 1 on n2 has died"
        gateway.engine.failure = ""
        gateway.engine.drain()
        error, _ = await stream_failure(gateway, inference_pb2.GenerateRequest(prompt="a"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in error.details()


@in_loop
async def test_a_request_that_fails_under_way_ends_unavailable_after_the_tokens_it_had():
    engine = FakeEngine()
    engine.error, engine.delay_s = "stage 0 is lost", 0.002
    async with serving(engine) as gateway:
        error, chunks = await stream_failure(gateway, inference_pb2.GenerateRequest(prompt="a"))
        score = await failure(gateway, inference_pb2.ScoreRequest(prompt="ab"), "Score")
        assert gateway.counted("requests_total", finished_reason="error") == 2
    assert error.code() is score.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == score.details() == "stage 0 is lost"
    assert [token for chunk in chunks for token in chunk.token_ids] == list(b"Ein")


@in_loop
async def test_a_bug_is_internal_and_shows_the_client_a_number_but_no_traceback(caplog):
    caplog.set_level(logging.ERROR)
    engine = FakeEngine()
    engine.crash = KeyError("secret")
    async with serving(engine) as gateway:
        error = await failure(gateway, inference_pb2.GenerateRequest(prompt="a"))
        engine.crash = None
        async with connected(gateway) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Generate(inference_pb2.GenerateRequest(prompt="a"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    incident = error.details().split()[-1]
    (record,) = [r for r in caplog.records if incident in r.getMessage()]
    assert "secret" in str(record.exc_info[1])


@in_loop
async def test_an_id_that_is_in_use_is_refused_and_its_owner_undisturbed():
    engine = FakeEngine()
    engine.delay_s = 0.005
    request = inference_pb2.GenerateRequest(
        prompt="a", request_id="one", sampling=inference_pb2.Sampling(max_tokens=20)
    )
    async with serving(engine) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stream = stub.GenerateStream(request)
        await anext(aiter(stream))
        error = await failure(gateway, request)
        assert error.code() is INVALID
        assert error.details().startswith("request_id")
        assert sum([len(chunk.token_ids) async for chunk in stream]) == 19


@in_loop
async def test_a_message_over_4_mib_is_resource_exhausted():
    async with serving() as gateway:
        request = inference_pb2.GenerateRequest(prompt="x" * (4 * 2**20 + 10))
        error = await failure(gateway, request)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


def test_a_huge_reason_still_arrives_cut_to_what_a_header_may_hold():
    @in_loop
    async def run():
        async with serving() as gateway:
            for filler in ("x", "€", "%", "\n", "🐦"):
                request = inference_pb2.GenerateRequest(chat=chat(("tool", filler * 100_000)))
                error = await failure(gateway, request)
                assert error.code() is INVALID, filler
                assert error.details().endswith(filler + "…")
                assert 400 < len(error.details().encode()) < 4096

    run()


@pytest.mark.parametrize("text", ["", "short", "x" * 4095, "€" * 455])
def test_what_fits_is_not_cut(text):
    assert truncate(text) == text


@pytest.mark.parametrize("text", ["x" * 4096, "€" * 456, "a" + "🐦" * 9999])
def test_what_does_not_fit_is_cut_between_characters(text):
    cut = truncate(text)
    assert cut.endswith("…")
    assert text.startswith(cut[:-1])
    assert 4095 - 12 <= sum(1 if c.isascii() else 3 * len(c.encode()) for c in cut) <= 4095
