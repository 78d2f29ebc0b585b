"""Prompts, answers and tokens appear in no log, whatever happens to a call."""

import logging
from datetime import UTC, datetime

import grpc
import pytest
from fake_engine import REPLY, FakeEngine, connected, in_loop, serving

from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security.store import TokenStore
from tightfit.cluster.security.tokens import Token, digest, encode
from tightfit.v1 import inference_pb2, inference_pb2_grpc

PROMPT, TOKEN, OTHER = "the prompt of Ann", "tft_token_of_ann", "tft_mistyped_token"


@pytest.fixture
def security(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_bytes(encode([Token(name="ann", sha256=digest(TOKEN), created=datetime.now(UTC))]))
    return GatewaySecurity(tokens=TokenStore(path))


def requests():
    """Good ones, and some that fail at every place where they can."""
    sampling = inference_pb2.Sampling(max_tokens=20)
    too_hot = inference_pb2.Sampling(temperature=1000)
    chat = {"messages": [{"role": "tool", "content": PROMPT}]}
    yield inference_pb2.GenerateRequest(prompt=PROMPT, sampling=sampling)
    yield inference_pb2.GenerateRequest(prompt=PROMPT, sampling=too_hot)
    yield inference_pb2.GenerateRequest(prompt=PROMPT, model=PROMPT)
    yield inference_pb2.GenerateRequest(prompt=PROMPT * 100, sampling=sampling)
    yield inference_pb2.GenerateRequest(prompt=PROMPT, request_id="x " * 9)
    yield inference_pb2.GenerateRequest(chat=chat)


@in_loop
async def test_no_log_has_a_prompt_an_answer_or_a_token(security, caplog):
    caplog.set_level(logging.DEBUG)
    engine, details, num_answered = FakeEngine(), [], 0
    async with serving(engine, security=security) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for state in ({}, {"crash": RuntimeError("a bug")}, {"error": "lost"}, {"failure": "x"}):
            for name, value in state.items():
                setattr(engine, name, value)
            for request in requests():
                for secret in (TOKEN, OTHER):
                    metadata = (("authorization", f"Bearer {secret}"),)
                    try:
                        await stub.Generate(request, metadata=metadata)
                        num_answered += 1
                    except grpc.aio.AioRpcError as error:
                        details.append(error.details())
            for name in state:
                setattr(engine, name, None if name == "crash" else "")
        garbage = channel.unary_unary("/tightfit.v1.InferenceService/Generate")
        with pytest.raises(grpc.aio.AioRpcError):
            await garbage(
                b"\xff" + PROMPT.encode(), metadata=(("authorization", f"Bearer {TOKEN}"),)
            )
    assert num_answered == 1
    assert len(details) == 47
    assert not [text for text in details if TOKEN in text or OTHER in text]
    assert "incident" in caplog.text  # something was logged at all
    for secret in (PROMPT, TOKEN, OTHER, REPLY[:12]):
        assert secret not in caplog.text
