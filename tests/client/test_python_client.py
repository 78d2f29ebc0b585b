"""The public Python client against a gateway on a real socket."""

import subprocess
import sys
from contextlib import aclosing

import grpc
import pytest
from fake_engine import (
    EOS,
    REPLY,
    FakeEngine,
    in_loop,
    reply_ids,
    serving,
    serving_in_thread,
    until,
)

from tightfit.client import AsyncClient, Client, Model, TightfitRpcError, Usage


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def gateway(engine):
    with serving_in_thread(engine) as gateway:
        yield gateway


@pytest.fixture
def client(gateway):
    with Client(gateway.target, timeout_s=20) as client:
        yield client


def test_a_generation_has_text_tokens_reason_and_usage(client):
    answer = client.generate("Sing", max_tokens=10, logprobs=2, request_id="mine")
    assert answer.text == "Ein Vögle"
    assert list(answer.token_ids) == reply_ids()[:10]
    assert answer.finish_reason == "length"
    assert answer.request_id == "mine"
    assert answer.usage == Usage(prompt_tokens=4, completion_tokens=10, cached_tokens=2)
    assert [position.token_id for position in answer.logprobs] == list(answer.token_ids)
    assert answer.logprobs[0].top == ((0, -0.5), (1, -1.5))


def test_several_sequences_come_by_index(client):
    answers = client.generate_n("Sing", max_tokens=8, n=3)
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert [list(answer.token_ids) for answer in answers] == [reply_ids(i)[:8] for i in range(3)]


def test_chunks_joined_are_the_text(client):
    chunks = list(client.stream("Sing", max_tokens=len(REPLY.encode())))
    assert "".join(chunk.text for chunk in chunks) == REPLY
    assert chunks[0].token_offset == 0
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].usage is not None


def test_text_tokens_and_conversations_are_prompts(client, engine):
    client.generate("ab", max_tokens=1)
    client.generate([1, 2], max_tokens=1)
    client.generate((3, 4), max_tokens=1)
    client.generate([{"role": "user", "content": "ab"}], max_tokens=1)
    prompts = [request.prompt_token_ids for request in engine.requests]
    assert prompts[:3] == [tuple(b"ab"), (1, 2), (3, 4)]
    assert bytes(prompts[3]) == b"<user>ab\n<assistant>"


def test_options_reach_the_engine(client, engine):
    client.generate("a", max_tokens=3, stop=["zz"], logit_bias={5: 1.5}, priority=7, seed=3,
                    resume_token_ids=[1])  # fmt: skip
    (request,) = engine.requests
    assert request.sampling.stop == ("zz",)
    assert request.sampling.logit_bias == ((5, 1.5),)
    assert (request.sampling.seed, request.priority) == (3, 7)
    assert request.resume_token_ids == (1,)


def test_an_interrupted_stream_can_be_resumed(client):
    whole = client.generate("a", max_tokens=40)
    text, tokens = "", []
    for chunk in client.stream("a", max_tokens=40):
        text += chunk.text
        tokens += chunk.token_ids
        if len(tokens) >= 5:
            break
    for chunk in client.stream("a", max_tokens=40, resume_token_ids=tokens):
        assert chunk.token_offset == len(tokens)
        text += chunk.text
        tokens += chunk.token_ids
    assert (text, tuple(tokens)) == (whole.text, whole.token_ids)


def test_scores_tokens_text_and_model(client, engine):
    scores = client.score("abc", request_id="s", priority=2)
    assert (scores.token_ids, scores.logprobs) == (tuple(b"abc"), (-98 / 8, -99 / 8))
    assert engine.requests[0].priority == 2
    assert client.tokenize("ab") == (97, 98)
    assert bytes(client.tokenize([{"role": "user", "content": "x"}])) == b"<user>x\n<assistant>"
    assert client.detokenize([97, EOS, 98]) == "ab"
    assert client.model() == Model(
        name="fake", family="llama", num_layers=4, vocab_size=260, max_context_tokens=400,
        weight_format="int8", num_stages=2, eos_token_ids=(EOS,), has_chat_template=True,
    )  # fmt: skip
    assert [stage.index for stage in client.status().stages] == [0, 1]


def test_draining_is_asked_for(client, gateway):
    assert client.drain() == 0
    assert gateway.engine.is_draining


def test_leaving_a_stream_early_cancels_the_request(client, engine):
    engine.delay_s = 0.01
    for _ in client.stream("a", max_tokens=300, request_id="r"):
        break
    limit = 500
    while "r" not in engine.cancelled and limit:
        limit -= 1
        client.model()
    assert "r" in engine.cancelled


@pytest.mark.parametrize("streams", [False, True])
def test_a_failure_has_its_status_its_reason_and_when_to_try_again(client, engine, streams):
    def ask():
        return list(client.stream("a")) if streams else client.generate("a")

    engine.overloaded = 1.5
    with pytest.raises(TightfitRpcError, match="RESOURCE_EXHAUSTED: 1024 sequences") as caught:
        ask()
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details == "1024 sequences are waiting"
    assert caught.value.retry_after_s == 1.5
    engine.overloaded = None
    engine.failure = "stage 1 is gone"
    with pytest.raises(TightfitRpcError, match="UNAVAILABLE: stage 1 is gone") as caught:
        ask()
    assert caught.value.retry_after_s is None


def test_a_deadline_is_kept(gateway, engine):
    engine.stalled = True
    with (
        Client(gateway.target, timeout_s=0.1) as client,
        pytest.raises(TightfitRpcError, match="DEADLINE_EXCEEDED"),
    ):
        client.generate("a")


def test_a_service_that_is_not_there_is_unavailable():
    with (
        Client("127.0.0.1:1", timeout_s=5) as client,
        pytest.raises(TightfitRpcError, match="UNAVAILABLE"),
    ):
        client.model()


@in_loop
async def test_the_asyncio_client_does_the_same():
    engine = FakeEngine()
    async with serving(engine) as gateway, AsyncClient(gateway.target, timeout_s=20) as client:
        answer = await client.generate("a", max_tokens=12, request_id="r", priority=1)
        assert list(answer.token_ids) == reply_ids()[:12]
        assert (engine.requests[0].priority, engine.requests[0].request_id) == (1, "r")
        assert len(await client.generate_n("a", n=2, max_tokens=2)) == 2
        chunks = [chunk async for chunk in client.stream("a", max_tokens=12)]
        assert "".join(chunk.text for chunk in chunks) == answer.text
        assert (await client.score("ab", request_id="s")).logprobs == (-98 / 8,)
        assert await client.tokenize("ab") == (97, 98)
        assert await client.detokenize([97]) == "a"
        assert (await client.model()).name == "fake"
        assert (await client.status()).model == "fake"
        with pytest.raises(TightfitRpcError, match=r"INVALID_ARGUMENT: sampling\.top_p"):
            await client.generate("a", top_p=2.0)
        with pytest.raises(TightfitRpcError, match="NOT_FOUND"):
            await anext(client.stream("a", model="other"))
        assert await client.drain() == 0


@in_loop
async def test_closing_an_asyncio_stream_cancels_the_request():
    engine = FakeEngine()
    engine.delay_s = 0.01
    async with serving(engine) as gateway, AsyncClient(gateway.target) as client:
        async with aclosing(client.stream("a", max_tokens=300, request_id="r")) as chunks:
            await anext(chunks)
        assert await until(lambda: "r" in engine.cancelled)


def test_the_client_needs_neither_torch_nor_ray_nor_the_service():
    code = (
        "import sys, tightfit.client;"
        "names = ('torch', 'ray', 'transformers', 'zmq', 'tightfit.cluster', 'tightfit.workers');"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
