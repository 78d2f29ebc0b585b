"""Every method on the real engine: what clients get is what the modelled stages drew."""

import asyncio

import grpc
import pytest
from fake_engine import in_loop, until
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from real_gateway import (
    BLOCK_SIZE,
    CONTEXT,
    EOS,
    VOCAB,
    bpe_tokenizer,
    expected,
    logprob_of,
    real_gateway,
)

from tightfit.v1 import cluster_pb2, common_pb2, inference_pb2

PROMPT = "Ein Vöglein singt"
IDS = bpe_tokenizer().encode(PROMPT)


def ask(prompt=PROMPT, *, resume=(), **sampling):
    sampling = {"max_tokens": 40, "ignore_eos": True, **sampling}
    return inference_pb2.GenerateRequest(
        **({"prompt": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}),
        sampling=inference_pb2.Sampling(**sampling),
        resume_token_ids=resume,
    )


async def collect(stubs, request):
    """A stream's chunks, checked against each other: offsets without gaps, one end, usage last."""
    chunks = [chunk async for chunk in stubs.inference.GenerateStream(request)]
    lengths, ended = {}, set()
    for chunk in chunks:
        assert chunk.index not in ended, "a chunk after the last one"
        start = lengths.get(chunk.index, len(request.resume_token_ids))
        assert chunk.token_offset == start
        lengths[chunk.index] = start + len(chunk.token_ids)
        if chunk.finish_reason:
            ended.add(chunk.index)
    assert len(ended) == max(1, request.sampling.n)
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return chunks


def joined(chunks, index=0):
    """Text and tokens of one sequence of a stream."""
    mine = [chunk for chunk in chunks if chunk.index == index]
    return "".join(c.text for c in mine), [token for c in mine for token in c.token_ids]


def an_end_after(least, most):
    """A prompt whose greedy answer has its first end token as token number least … most."""
    for first in range(2, VOCAB):
        for second in range(2, VOCAB):
            output = expected([first, second], most)
            if EOS in output[least - 1 :] and EOS not in output[: least - 1]:
                return [first, second], output.index(EOS)
    raise AssertionError("no such prompt")


# -- generation --------------------------------------------------------------------------------


@in_loop
async def test_a_stream_and_a_unary_answer_have_the_tokens_that_were_drawn_and_their_text():
    async with real_gateway() as (_, stubs):
        whole = await stubs.inference.Generate(ask())
        chunks = await collect(stubs, ask())
    (output,) = whole.outputs
    assert list(output.token_ids) == expected(IDS, 40)
    assert output.text == bpe_tokenizer().decode(output.token_ids)
    assert output.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert joined(chunks) == (output.text, list(output.token_ids))
    assert chunks[-1].finish_reason == output.finish_reason


@in_loop
async def test_many_streams_at_once_each_get_their_own_tokens():
    prompts = [[2 + i, *range(50, 50 + 3 * i)] for i in range(24)]
    async with real_gateway() as (gateway, stubs):
        calls = (collect(stubs, ask(prompt, max_tokens=30)) for prompt in prompts)
        for prompt, chunks in zip(prompts, await asyncio.gather(*calls), strict=True):
            assert joined(chunks)[1] == expected(prompt, 30)
        assert gateway.counted("requests_total", finished_reason="length") == 24


@in_loop
async def test_answers_stay_the_same_when_kv_blocks_run_out():
    prompts = [[2 + i] * 30 for i in range(8)]
    async with real_gateway(num_blocks=40) as (gateway, stubs):
        gateway.chain.paused = True  # until all are there
        calls = [
            asyncio.create_task(collect(stubs, ask(prompt, max_tokens=60))) for prompt in prompts
        ]
        assert await until(lambda: gateway.engine.num_unfinished == len(calls))
        gateway.chain.resume()
        for prompt, chunks in zip(prompts, await asyncio.gather(*calls), strict=True):
            assert joined(chunks)[1] == expected(prompt, 60)
        assert gateway.engine.status().counts.num_preemptions > 0


@in_loop
async def test_n_sequences_differ_unless_greedy_and_repeat_with_their_seed():
    drawn = ask(n=3, temperature=1.0, seed=2**64 - 1)
    async with real_gateway() as (_, stubs):
        whole = await stubs.inference.Generate(drawn)
        chunks = await collect(stubs, drawn)
        alone = await stubs.inference.Generate(ask(temperature=1.0, seed=2**64 - 1))
        greedy = await stubs.inference.Generate(ask(n=3))
        unseeded = [await stubs.inference.Generate(ask(temperature=1.0)) for _ in range(2)]
    outputs = [list(output.token_ids) for output in whole.outputs]
    assert len({tuple(output) for output in outputs}) == 3
    assert [output.index for output in whole.outputs] == [0, 1, 2]
    assert [joined(chunks, i)[1] for i in range(3)] == outputs
    assert list(alone.outputs[0].token_ids) == outputs[0]
    assert [list(output.token_ids) for output in greedy.outputs] == [expected(IDS, 40)] * 3
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}])
@pytest.mark.parametrize("cut", [1, 7, 39])
def test_resuming_continues_tokens_and_text_exactly(cut, sampling):
    @in_loop
    async def run():
        async with real_gateway() as (_, stubs):
            text, tokens = joined(await collect(stubs, ask(**sampling)))
            chunks = []
            async for chunk in stubs.inference.GenerateStream(ask(**sampling)):
                chunks.append(chunk)
                if sum(len(c.token_ids) for c in chunks) >= cut:
                    break
            before, held = joined(chunks)
            request = ask(resume=held, **sampling)
            if len(held) < 40:
                rest = await collect(stubs, request)
                after, more = joined(rest)
                assert (before + after, held + more) == (text, tokens)
                assert rest[-1].usage.completion_tokens == len(more)

    run()


@in_loop
async def test_resuming_what_is_already_complete_ends_at_once():
    async with real_gateway() as (_, stubs):
        text, _ = joined(await collect(stubs, ask()))
        (chunk,) = await collect(stubs, ask(resume=expected(IDS, 40)))
        assert (list(chunk.token_ids), chunk.token_offset) == ([], 40)
        # Only what the end itself shows: here a character whose last byte never came.
        assert text.endswith(chunk.text)
        assert chunk.text in ("", "\N{REPLACEMENT CHARACTER}")
        assert chunk.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert chunk.usage.completion_tokens == 0


@in_loop
async def test_text_ends_before_a_stop_string_and_the_blocks_are_free():
    text = bpe_tokenizer().decode(expected(IDS, 100))
    async with real_gateway(delay_s=0.002) as (gateway, stubs):
        for start, length in [(5, 1), (20, 2), (33, 9), (41, 25)]:
            stop = text[start : start + length]
            cut = text[: text.index(stop)]
            request = ask(max_tokens=100, stop=["not there", stop])
            chunks = await collect(stubs, request)
            whole = await stubs.inference.Generate(request)
            assert joined(chunks)[0] == whole.outputs[0].text == cut
            for reason in (chunks[-1].finish_reason, whole.outputs[0].finish_reason):
                assert reason == common_pb2.FINISH_REASON_STOP_SEQUENCE
            assert joined(chunks)[1] == expected(IDS, len(joined(chunks)[1]))
        assert await until(gateway.is_empty)


@in_loop
async def test_an_end_token_ends_and_min_tokens_and_ignore_eos_go_past_it():
    prompt, at = an_end_after(3, 20)
    text = bpe_tokenizer().decode(expected(prompt, at))
    async with real_gateway() as (_, stubs):
        ended = await stubs.inference.Generate(ask(prompt, ignore_eos=False))
        ignored = await stubs.inference.Generate(ask(prompt))
        held_off = ask(prompt, ignore_eos=False, min_tokens=30, max_tokens=30)
        later = await stubs.inference.Generate(held_off)
        own = await stubs.inference.Generate(ask(prompt, stop_token_ids=[EOS]))
    assert ended.outputs[0].finish_reason == common_pb2.FINISH_REASON_STOP
    assert list(ended.outputs[0].token_ids) == expected(prompt, at + 1)
    assert ended.outputs[0].text == own.outputs[0].text == text
    assert own.outputs[0].token_ids == ended.outputs[0].token_ids
    assert list(ignored.outputs[0].token_ids) == expected(prompt, 40)
    assert list(later.outputs[0].token_ids) == expected(prompt, 30, banned=[EOS], num_banned=30)


@pytest.mark.parametrize("count", [None, 0, 3])
def test_log_probabilities_come_with_every_token_as_asked(count):
    @in_loop
    async def run():
        sampling = {} if count is None else {"logprobs": count}
        async with real_gateway() as (_, stubs):
            whole = await stubs.inference.Generate(ask(n=2, **sampling))
            chunks = await collect(stubs, ask(n=2, **sampling))
        for output in whole.outputs:
            found = [(entry.token.token_id, entry.token.logprob) for entry in output.logprobs]
            wanted = [] if count is None else output.token_ids
            assert found == [(token, logprob_of(token)) for token in wanted]
            for entry in output.logprobs:
                top = [(t.token_id, t.logprob) for t in entry.top]
                assert top == [(i, logprob_of(i)) for i in range(count)]
        for chunk in chunks:
            assert len(chunk.logprobs) == (0 if count is None else len(chunk.token_ids))

    run()


@in_loop
async def test_usage_counts_prompt_answer_and_what_the_prefix_cache_had():
    prompt = list(range(20, 20 + 10 * BLOCK_SIZE))
    async with real_gateway() as (_, stubs):
        first = await stubs.inference.Generate(ask(prompt, max_tokens=5))
        again = await stubs.inference.Generate(ask([*prompt, 3], max_tokens=5, n=2))
    usage = first.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (40, 5, 0)
    usage = again.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (41, 10, 40)


@in_loop
async def test_an_answer_is_cut_to_what_the_context_leaves():
    prompt = [5] * (CONTEXT - 3)
    async with real_gateway() as (_, stubs):
        answer = await stubs.inference.Generate(ask(prompt, max_tokens=1000))
    assert list(answer.outputs[0].token_ids) == expected(prompt, 3)
    assert answer.outputs[0].finish_reason == common_pb2.FINISH_REASON_LENGTH


# -- the other methods -------------------------------------------------------------------------


@in_loop
async def test_a_text_longer_than_a_micro_batch_is_scored_whole():
    ids = [2 + (7 * i) % (VOCAB - 2) for i in range(CONTEXT)]
    async with real_gateway(max_batch_tokens=24) as (_, stubs):
        whole, *others = await asyncio.gather(
            stubs.inference.Score(inference_pb2.ScoreRequest(token_ids={"ids": ids})),
            stubs.inference.Score(inference_pb2.ScoreRequest(token_ids={"ids": [9]})),
            stubs.inference.Score(inference_pb2.ScoreRequest(prompt=PROMPT)),
        )
    assert list(whole.token_ids) == ids
    assert list(whole.logprobs) == [-float(token) for token in ids[1:]]
    assert list(others[0].logprobs) == []
    assert list(others[1].token_ids) == IDS
    assert list(others[1].logprobs) == [-float(token) for token in IDS[1:]]


@in_loop
async def test_text_to_tokens_and_back_and_what_is_served():
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="静夜思 🐦")])
    async with real_gateway() as (_, stubs):
        ids = (await stubs.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))).token_ids
        text = await stubs.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))
        model = await stubs.inference.GetModel(inference_pb2.GetModelRequest())
        answer = await stubs.inference.Generate(
            inference_pb2.GenerateRequest(chat=chat, sampling={"max_tokens": 5})
        )
    assert text.text == "<user>静夜思 🐦\n<assistant>"
    assert answer.usage.prompt_tokens == len(ids)
    assert (model.name, model.vocab_size, model.max_context_tokens) == ("tiny", VOCAB, CONTEXT)
    assert list(model.eos_token_ids) == [EOS]


@in_loop
async def test_status_shows_the_load_and_draining_lets_what_runs_finish():
    async with real_gateway(delay_s=0.002) as (gateway, stubs):
        stub = health_pb2_grpc.HealthStub(stubs.channel)
        running = asyncio.create_task(collect(stubs, ask(max_tokens=100)))
        assert await until(lambda: gateway.num_blocks_used > 0)
        status = await stubs.cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert (status.model, status.load.running_sequences) == ("tiny", 1)
        assert 0 < status.load.kv_blocks_used < status.load.kv_blocks
        assert await stubs.cluster.GetPlan(cluster_pb2.GetPlanRequest()) is not None
        before = await stub.Check(health_pb2.HealthCheckRequest())
        drained = await stubs.cluster.Drain(cluster_pb2.DrainRequest())
        assert drained.unfinished_requests == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.inference.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert joined(await running)[1] == expected(IDS, 100)
        assert await gateway.server.drain(grace_s=2)
        after = await stub.Check(health_pb2.HealthCheckRequest())
        status = await stubs.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert before.status == health_pb2.HealthCheckResponse.SERVING
    assert after.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert status.health == cluster_pb2.HEALTH_DRAINING


@in_loop
async def test_a_client_that_knows_only_the_address_can_call_by_reflection():
    name = "tightfit.v1.InferenceService"
    ask_file = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
    async with real_gateway() as (_, stubs):
        reflection = reflection_pb2_grpc.ServerReflectionStub(stubs.channel)
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([ask_file]))]
        data = answers[0].file_descriptor_response.file_descriptor_proto
        files = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in data]
        (method,) = (
            m for f in files for s in f.service for m in s.method if m.name == "Detokenize"
        )
        raw = stubs.channel.unary_unary(f"/{name}/{method.name}")
        answer = inference_pb2.DetokenizeResponse.FromString(await raw(b""))
    assert method.input_type == ".tightfit.v1.DetokenizeRequest"
    assert answer.text == ""
