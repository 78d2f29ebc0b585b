"""What InferenceService answers, over a real socket."""

import pytest
from fake_engine import (
    BOS,
    CONTEXT,
    EOS,
    REPLY,
    FakeEngine,
    byte_tokenizer,
    connected,
    in_loop,
    reply_ids,
    serving,
)

from tightfit.cluster.request import FinishReason
from tightfit.v1 import common_pb2, inference_pb2, inference_pb2_grpc

Sampling = inference_pb2.Sampling


def ask(prompt="Sing", **fields):
    sampling = {k: fields.pop(k) for k in list(fields) if k in Sampling.DESCRIPTOR.fields_by_name}
    if "token_ids" not in fields and "chat" not in fields:
        fields["prompt"] = prompt
    return inference_pb2.GenerateRequest(sampling=Sampling(**sampling), **fields)


async def collect(gateway, request, **call):
    async with connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return [chunk async for chunk in stub.GenerateStream(request, **call)]


async def call(gateway, method, request):
    async with connected(gateway) as channel:
        return await getattr(inference_pb2_grpc.InferenceServiceStub(channel), method)(request)


def tokens_of(chunks, index=0):
    return [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]


def text_of(chunks, index=0):
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@in_loop
async def test_a_stream_has_every_token_once_with_its_offset_and_the_text_of_all():
    async with serving() as gateway:
        chunks = await collect(gateway, ask(max_tokens=100, request_id="mine"))
    assert tokens_of(chunks) == reply_ids()[:100]
    assert text_of(chunks) == bytes(reply_ids()[:100]).decode(errors="replace")
    offset = 0
    for chunk in chunks:
        assert chunk.request_id == "mine"
        assert chunk.token_offset == offset
        offset += len(chunk.token_ids)
    assert [c.finish_reason for c in chunks[:-1]] == [0] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert not any(chunk.HasField("usage") for chunk in chunks[:-1])
    assert chunks[-1].usage == common_pb2.Usage(
        prompt_tokens=4, completion_tokens=100, cached_tokens=2
    )


@in_loop
async def test_characters_are_never_split_between_chunks():
    engine = FakeEngine()
    engine.delay_s = 0.0005
    async with serving(engine) as gateway:
        chunks = await collect(gateway, ask(max_tokens=len(REPLY.encode())))
    assert len(chunks) > 20
    assert "\ufffd" not in text_of(chunks)
    assert text_of(chunks) == REPLY


@in_loop
async def test_the_first_token_travels_alone_and_those_that_gather_behind_it_together():
    engine = FakeEngine()
    engine.burst = 40
    async with serving(engine) as gateway:
        chunks = await collect(gateway, ask(max_tokens=80))
    assert len(chunks[0].token_ids) == 1
    assert max(len(chunk.token_ids) for chunk in chunks) >= 30
    assert tokens_of(chunks) == reply_ids()[:80]


@in_loop
async def test_a_unary_answer_is_the_joined_stream():
    async with serving() as gateway:
        request = ask(max_tokens=50, n=3, logprobs=1, request_id="r")
        chunks = await collect(gateway, request)
        answer = await call(gateway, "Generate", request)
    assert answer.request_id == "r"
    assert [output.index for output in answer.outputs] == [0, 1, 2]
    for output in answer.outputs:
        assert list(output.token_ids) == tokens_of(chunks, output.index)
        assert output.text == text_of(chunks, output.index)
        assert len(output.logprobs) == 50
        assert output.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert answer.usage.completion_tokens == 150


@in_loop
async def test_several_sequences_are_told_apart_by_index():
    async with serving() as gateway:
        chunks = await collect(gateway, ask(max_tokens=30, n=4))
    for index in range(4):
        assert tokens_of(chunks, index) == reply_ids(index)[:30]
        ends = [c.finish_reason for c in chunks if c.index == index and c.finish_reason]
        assert ends == [common_pb2.FINISH_REASON_LENGTH]
    assert chunks[-1].usage.completion_tokens == 120


@in_loop
async def test_what_is_not_asked_for_has_the_documented_default():
    async with serving() as gateway:
        await collect(gateway, ask())
        await collect(gateway, ask(seed=0, top_p=0.5, max_tokens=1, repetition_penalty=1.1))
        first, second = gateway.engine.requests
    assert first.sampling.max_tokens == 128
    assert first.sampling.temperature == 0
    assert first.sampling.top_p == 1
    assert first.sampling.repetition_penalty == 1
    assert first.sampling.n == 1
    assert first.sampling.logprobs is None
    assert first.request_id
    assert first.deadline_s is None
    assert (second.sampling.seed, second.sampling.top_p) == (0, 0.5)
    assert first.request_id != second.request_id


@in_loop
async def test_every_field_of_the_request_reaches_the_engine():
    request = ask(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.25, top_k=7, min_p=0.125,
        seed=2**64 - 1, repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2,
        stop=["a", "bc"], stop_token_ids=[3, 4], ignore_eos=True, logprobs=0, n=1,
        logit_bias={5: -100, 2: 1.5}, priority=-7, resume_token_ids=[1, 2], request_id="x",
    )  # fmt: skip
    async with serving() as gateway:
        await collect(gateway, request, timeout=30)
        (got,) = gateway.engine.requests
    sampling = got.sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.seed) == (0.125, 2**64 - 1)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1)
    assert sampling.frequency_penalty == 2
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "bc"), (3, 4))
    assert (sampling.ignore_eos, sampling.logprobs, sampling.n) == (True, 0, 1)
    assert sampling.logit_bias == ((2, 1.5), (5, -100))
    assert (got.priority, got.resume_token_ids, got.request_id) == (-7, (1, 2), "x")
    assert got.prompt_token_ids == tuple(b"Sing")
    assert got.deadline_s is not None


@in_loop
async def test_logprobs_come_with_every_token_and_as_many_top_ones_as_asked():
    async with serving() as gateway:
        chunks = await collect(gateway, ask(max_tokens=12, logprobs=3))
        bare = await collect(gateway, ask(max_tokens=12))
    positions = [position for chunk in chunks for position in chunk.logprobs]
    assert [p.token.token_id for p in positions] == reply_ids()[:12]
    for position in positions:
        assert position.token.logprob == -0.5
        assert [(top.token_id, top.logprob) for top in position.top] == [
            (0, -0.5), (1, -1.5), (2, -2.5),
        ]  # fmt: skip
    assert not any(chunk.logprobs for chunk in bare)


@pytest.mark.parametrize("burst", [1, 50])
@pytest.mark.parametrize("stop", ["singt im", "🐦", "h — s", "V"])
def test_text_ends_before_a_stop_string_however_its_tokens_come(stop, burst):
    @in_loop
    async def run():
        engine = FakeEngine()
        engine.burst, engine.delay_s = burst, 0.0002
        async with serving(engine) as gateway:
            chunks = await collect(gateway, ask(max_tokens=100, stop=["never", stop]))
            assert text_of(chunks) == REPLY[: REPLY.index(stop)]
            whole = (REPLY[: REPLY.index(stop)] + stop).encode()
            assert tokens_of(chunks) == list(whole)
            assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_STOP_SEQUENCE
            assert chunks[-1].usage.completion_tokens == len(whole)
            if burst == 1:  # else the engine may have ended before
                assert [f[2] for f in engine.finished] == [FinishReason.STOP_SEQUENCE]

    run()


@in_loop
async def test_one_sequence_may_stop_while_the_others_go_on():
    engine = FakeEngine()
    engine.burst = 50  # both end in one batch
    async with serving(engine) as gateway:
        chunks = await collect(gateway, ask(max_tokens=9, n=2, stop=["Ein"]))
    assert text_of(chunks, 0) == ""
    assert tokens_of(chunks, 0) == list(b"Ein")
    assert len(tokens_of(chunks, 1)) == 9
    ends = {c.index: c.finish_reason for c in chunks if c.finish_reason}
    assert ends == {
        0: common_pb2.FINISH_REASON_STOP_SEQUENCE,
        1: common_pb2.FINISH_REASON_LENGTH,
    }
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@in_loop
async def test_text_held_back_for_a_stop_string_that_never_comes_is_in_the_last_chunk():
    async with serving() as gateway:
        chunks = await collect(gateway, ask(max_tokens=6, stop=["Vögelchen"]))
    assert text_of(chunks) == "Ein V\ufffd"  # and half a character
    assert chunks[-1].text.endswith("V\ufffd")


@in_loop
async def test_an_end_token_is_returned_but_is_no_text():
    engine = FakeEngine()
    engine.reply = lambda index: [*b"ab", EOS, *b"cdef"]
    async with serving(engine) as gateway:
        ended = await collect(gateway, ask(max_tokens=6))
        ignored = await collect(gateway, ask(max_tokens=6, ignore_eos=True))
        stopped = await collect(gateway, ask(max_tokens=6, stop_token_ids=[ord("b")]))
    assert (tokens_of(ended), text_of(ended)) == ([*b"ab", EOS], "ab")
    assert ended[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert (tokens_of(ignored), text_of(ignored)) == ([*b"ab", EOS, *b"cde"], "abcde")
    assert (tokens_of(stopped), text_of(stopped)) == ([*b"ab"], "a")


@pytest.mark.parametrize("cut", [1, 5, 6, 13, 15, 40])
def test_a_resumed_stream_continues_the_text_and_the_offsets(cut):
    """A cut at 5 splits "ö", one at 13 or 15 the bird."""

    @in_loop
    async def run():
        async with serving() as gateway:
            whole = await collect(gateway, ask(max_tokens=60, stop=["scheu —"]))
            engine = FakeEngine()
        engine.delay_s = 0.0005
        async with serving(engine) as gateway:
            first = await collect(gateway, ask(max_tokens=cut, stop=["scheu —"]))
            # As a client has it that lost its connection: without the end's held-back text.
            seen = "".join(chunk.text for chunk in first[:-1])
            had = tokens_of(first[:-1])
            rest = await collect(
                gateway, ask(max_tokens=60, stop=["scheu —"], resume_token_ids=had)
            )
        assert rest[0].token_offset == len(had)
        assert had + tokens_of(rest) == tokens_of(whole)
        assert seen + text_of(rest) == text_of(whole)
        assert rest[-1].usage.completion_tokens == len(tokens_of(rest))

    run()


@in_loop
async def test_resuming_what_had_ended_tells_the_end_and_nothing_else():
    async with serving() as gateway:
        at_stop = await collect(gateway, ask(stop=["Ein"], resume_token_ids=list(b"Ein")))
        at_length = await collect(gateway, ask(max_tokens=3, resume_token_ids=list(b"Ein")))
        assert len(gateway.engine.requests) == 1
    (chunk,) = at_stop
    assert (chunk.text, list(chunk.token_ids), chunk.token_offset) == ("", [], 3)
    assert chunk.finish_reason == common_pb2.FINISH_REASON_STOP_SEQUENCE
    (chunk,) = at_length
    assert (chunk.text, list(chunk.token_ids), chunk.token_offset) == ("", [], 3)
    assert chunk.finish_reason == common_pb2.FINISH_REASON_LENGTH


@in_loop
async def test_a_conversation_is_rendered_by_the_checkpoints_template():
    chat = common_pb2.Chat(
        messages=[
            common_pb2.ChatMessage(role="system", content="Be brief."),
            common_pb2.ChatMessage(role="user", content="Grüße"),
        ]
    )
    async with serving() as gateway:
        await collect(gateway, ask(chat=chat, max_tokens=1))
        (request,) = gateway.engine.requests
        tokens = await call(gateway, "Tokenize", inference_pb2.TokenizeRequest(chat=chat))
    expected = "<system>Be brief.\n<user>Grüße\n<assistant>"
    assert bytes(request.prompt_token_ids).decode() == expected
    assert tuple(tokens.token_ids) == request.prompt_token_ids


@in_loop
async def test_a_text_begins_with_what_the_model_expects_and_a_conversation_as_its_template_says():
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="a")])
    async with serving(tokenizer=byte_tokenizer(adds_bos=True)) as gateway:
        await collect(gateway, ask("ab", max_tokens=1))
        await collect(gateway, ask(chat=chat, max_tokens=1))
        text, conversation = [request.prompt_token_ids for request in gateway.engine.requests]
    assert text == (BOS, *b"ab")
    assert conversation == tuple(b"<user>a\n<assistant>")


@in_loop
async def test_token_ids_are_used_as_they_are():
    async with serving() as gateway:
        ids = common_pb2.TokenIds(ids=[BOS, 0, 259])
        await collect(gateway, ask(token_ids=ids, max_tokens=1))
        (request,) = gateway.engine.requests
    assert request.prompt_token_ids == (BOS, 0, 259)


@in_loop
async def test_output_is_cut_to_the_context():
    async with serving() as gateway:
        chunks = await collect(gateway, ask("x" * (CONTEXT - 5), max_tokens=100))
    assert len(tokens_of(chunks)) == 5


@in_loop
async def test_score_answers_with_one_value_less_than_tokens():
    async with serving() as gateway:
        request = inference_pb2.ScoreRequest(prompt="abcd", request_id="s", priority=3)
        answer = await call(gateway, "Score", request)
        (got,) = gateway.engine.requests
        ids = common_pb2.TokenIds(ids=[7] * CONTEXT)
        full = await call(gateway, "Score", inference_pb2.ScoreRequest(token_ids=ids))
    assert answer.request_id == "s"
    assert list(answer.token_ids) == list(b"abcd")
    assert list(answer.logprobs) == [-b / 8 for b in b"bcd"]
    assert got.score_only
    assert (got.priority, got.sampling.max_tokens) == (3, 0)
    assert len(full.logprobs) == CONTEXT - 1


@in_loop
async def test_tokens_and_text_are_each_others_inverse():
    async with serving() as gateway:
        tokens = await call(gateway, "Tokenize", inference_pb2.TokenizeRequest(prompt=REPLY))
        request = inference_pb2.DetokenizeRequest(token_ids=[BOS, *tokens.token_ids, 259])
        text = await call(gateway, "Detokenize", request)
        empty = await call(gateway, "Detokenize", inference_pb2.DetokenizeRequest())
    assert list(tokens.token_ids) == list(REPLY.encode())
    assert text.text == REPLY
    assert empty.text == ""


@in_loop
async def test_get_model_tells_what_is_served():
    async with serving() as gateway:
        answer = await call(gateway, "GetModel", inference_pb2.GetModelRequest())
    assert answer == inference_pb2.GetModelResponse(
        name="fake", family="llama", num_layers=4, vocab_size=260, max_context_tokens=CONTEXT,
        weight_format="int8", num_stages=2, eos_token_ids=[EOS], has_chat_template=True,
    )  # fmt: skip


@in_loop
async def test_a_checkpoint_without_a_template_says_so():
    async with serving(tokenizer=byte_tokenizer(chat_template=None)) as gateway:
        answer = await call(gateway, "GetModel", inference_pb2.GetModelRequest())
    assert not answer.has_chat_template


@in_loop
async def test_requests_are_counted_by_how_they_end():
    async with serving() as gateway:
        await collect(gateway, ask(max_tokens=5))
        await collect(gateway, ask(max_tokens=5, n=2, stop=["E"]))
        await call(gateway, "Score", inference_pb2.ScoreRequest(prompt="ab"))
        ended = {
            reason: gateway.counted("requests_total", finished_reason=reason)
            for reason in ("length", "stop", "stop_sequence", "cancelled", "error")
        }
        assert ended == {"length": 2, "stop": 1, "stop_sequence": 0, "cancelled": 0, "error": 0}
        assert gateway.counted("time_to_first_token_seconds_count") == 3
        assert gateway.counted("inter_token_latency_seconds_count") == 8
