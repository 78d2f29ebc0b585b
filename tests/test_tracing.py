"""Traces of requests, as a collector gets them."""

import asyncio
import subprocess
import sys
import time
from itertools import pairwise

import grpc
import pytest
from fake_engine import FakeEngine, connected, in_loop, serving, until
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp_receiver import Receiver
from real_gateway import SampledStages, real_gateway
from served import wait_for

from tightfit.client import AsyncClient, Client
from tightfit.cluster.config import serve_config
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.tracing import Tracing, otlp_exporter
from tightfit.v1 import inference_pb2, inference_pb2_grpc

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def wanted(tokens=6, **fields):
    sampling = inference_pb2.Sampling(max_tokens=tokens, ignore_eos=True)
    return inference_pb2.GenerateRequest(prompt="Im Wald", sampling=sampling, **fields)


class Traced:
    """Traces kept in memory."""

    def __init__(self, **settings):
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter, model="tiny", version="1", **settings)

    def spans(self):
        """All that were made; no more can be."""
        self.tracing.close()
        return self._exporter.get_finished_spans()


def names(span):
    return [event.name for event in span.events]


@in_loop
async def test_a_request_is_one_span_with_its_way_through_queue_prefill_and_decode():
    traced = Traced()
    before_ns = time.time_ns()
    async with real_gateway(tracer=traced.tracing, delay_s=0.005) as (_, stubs):
        stream = stubs.inference.GenerateStream(wanted(request_id="r-1"))
        await anext(aiter(stream))
        first_token_ns = time.time_ns()
        async for _ in stream:
            pass
    (span,) = traced.spans()
    assert span.name == "tightfit.v1.InferenceService/GenerateStream"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert names(span) == ["queue", "prefill", "decode"]
    moments = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert moments == sorted(moments)
    assert before_ns < moments[0]
    assert moments[-1] < time.time_ns()
    assert span.events[2].timestamp < first_token_ns
    attributes = dict(span.attributes)
    assert attributes["tightfit.request_id"] == "r-1"
    assert attributes["gen_ai.usage.output_tokens"] == 6
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "Wald" not in str(span.to_json())


@in_loop
async def test_the_callers_traceparent_is_the_parent_and_decides():
    traced = Traced(share=0.0)
    async with real_gateway(tracer=traced.tracing) as (_, stubs):
        for flags in ("01", "00"):
            header = ("traceparent", f"00-{TRACE}-{PARENT}-{flags}")
            await stubs.inference.Generate(wanted(), metadata=(header,))
        await stubs.inference.Generate(wanted(), metadata=(("traceparent", "nonsense"),))
        await stubs.inference.Generate(wanted())
    (span,) = traced.spans()
    assert format(span.context.trace_id, "032x") == TRACE
    assert format(span.parent.span_id, "016x") == PARENT


@in_loop
async def test_the_python_clients_send_a_traceparent_that_they_are_given():
    traced = Traced(share=0.0)
    header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    async with real_gateway(tracer=traced.tracing) as (gateway, _):
        async with AsyncClient(gateway.target, metadata=[header]) as client:
            await client.generate("Im Wald", max_tokens=3)
        async with AsyncClient(gateway.target) as client:
            await client.generate("Im Wald", max_tokens=3)

        def ask():
            with Client(gateway.target, metadata=[header]) as client:
                client.generate("Im Wald", max_tokens=3)

        await asyncio.to_thread(ask)
    spans = traced.spans()
    assert [format(span.context.trace_id, "032x") for span in spans] == [TRACE, TRACE]


@in_loop
async def test_a_failed_request_has_an_error_and_one_that_never_ran_no_prefill():
    traced = Traced()
    async with real_gateway(tracer=traced.tracing) as (gateway, stubs):
        gateway.chain.paused = True
        with pytest.raises(grpc.aio.AioRpcError):
            await stubs.inference.Generate(wanted(request_id="late"), timeout=0.2)
        gateway.chain.fail_with = "broken"
        gateway.chain.resume()
        with pytest.raises(grpc.aio.AioRpcError):
            await stubs.inference.Generate(wanted(request_id="broken"))
    ended = {span.attributes["tightfit.request_id"]: span for span in traced.spans()}
    assert ended["late"].status.status_code is StatusCode.ERROR
    assert ended["late"].status.description == "deadline"
    assert ended["broken"].status.description == "error"
    assert "decode" not in names(ended["broken"])


@in_loop
async def test_a_request_that_lost_its_blocks_says_when_it_went_on():
    traced = Traced()
    async with real_gateway(tracer=traced.tracing, num_blocks=24) as (gateway, stubs):
        gateway.chain.paused = True  # until all three are there: one by one they would have room
        calls = [stubs.inference.Generate(wanted(60, request_id=str(i))) for i in range(3)]
        assert await until(lambda: gateway.engine.num_unfinished == 3)
        gateway.chain.resume()
        for call in calls:
            await call
        preempted = gateway.counted("num_preemptions_total")
    recomputed = [name for span in traced.spans() for name in names(span) if name == "recomputed"]
    assert preempted >= 1
    assert 1 <= len(recomputed) <= preempted


@pytest.mark.parametrize("end", ["length", "cancelled"])
@in_loop
async def test_a_request_that_lived_through_recoveries_has_each_loss_and_return_in_its_span(end):
    traced, engine = Traced(), FakeEngine()
    engine.delay_s = 0.005
    async with serving(engine, tracer=traced.tracing) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(wanted(300))
        chunks = aiter(call)
        await anext(chunks)
        for reason, num_tokens in (("stage 1's process ended", 12), ("stage 0 is gone", 34)):
            engine.lose(reason)
            await asyncio.sleep(0.05)
            engine.recover(num_replayed_tokens=num_tokens)
            await asyncio.sleep(0.01)
        engine.delay_s = 0.0 if end == "length" else 1.0
        if end == "cancelled":
            call.cancel()
            assert await until(lambda: engine.num_unfinished == 0)
        else:
            async for _ in chunks:
                pass
    (span,) = traced.spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == (end,)
    assert names(span)[-4:] == ["lost", "recovered", "lost", "recovered"]
    lost, recovered, lost_again, recovered_again = span.events[-4:]
    assert dict(lost.attributes) == {
        "tightfit.reason": "stage 1's process ended", "tightfit.next_epoch": 2,
    }  # fmt: skip
    assert dict(recovered.attributes) == {"tightfit.epoch": 2, "tightfit.replayed_tokens": 12}
    assert lost_again.attributes["tightfit.reason"] == "stage 0 is gone"
    assert recovered_again.attributes["tightfit.replayed_tokens"] == 34
    assert recovered.timestamp - lost.timestamp >= 50_000_000
    assert span.start_time < lost.timestamp
    assert recovered_again.timestamp < span.end_time


@in_loop
async def test_the_trace_of_a_recovery_says_the_same_as_its_metrics():
    traced = Traced()
    async with real_gateway(tracer=traced.tracing, delay_s=0.005) as (gateway, stubs):
        chunks = aiter(stubs.inference.GenerateStream(wanted(40)))
        await anext(chunks)
        gateway.chain.replace(None)
        gateway.engine.suspend("stage 1 is gone")
        assert await asyncio.to_thread(gateway.engine.wait_parked, 20)
        gateway.chain.replace(SampledStages())
        gateway.engine.resume(gateway.epoch + 1)
        async for _ in chunks:
            pass
        num_replayed = gateway.counted("replayed_tokens_total")
        took_s = gateway.counted("recovery_seconds_sum")
    (span,) = traced.spans()
    assert names(span) == ["queue", "prefill", "decode", "lost", "recovered", "recomputed"]
    _, _, _, lost, recovered, _ = span.events
    assert lost.attributes["tightfit.reason"] == "stage 1 is gone"
    assert recovered.attributes["tightfit.replayed_tokens"] == num_replayed > 0
    assert (recovered.timestamp - lost.timestamp) / 1e9 == pytest.approx(took_s, abs=1e-6)


@in_loop
async def test_a_request_that_a_loss_ends_has_it_in_its_span():
    traced = Traced()
    async with real_gateway(tracer=traced.tracing, delay_s=0.005) as (gateway, stubs):
        running = stubs.inference.GenerateStream(wanted(40))
        chunks = aiter(running)
        await anext(chunks)
        gateway.engine.suspend("stage 1 is gone")
        queued = stubs.inference.GenerateStream(wanted(40))
        assert await until(lambda: gateway.engine.num_unfinished == 2)
        gateway.engine.fail("stage 1 is gone. It is not back yet")
        for call in (chunks, aiter(queued)):
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
    for span in traced.spans():
        (lost,) = (event for event in span.events if event.name == "lost")
        assert dict(lost.attributes) == {"tightfit.reason": "stage 1 is gone"}
        assert span.status.description == "error"
    assert len(traced.spans()) == 2


@in_loop
async def test_steps_get_a_span_for_each_stage_only_when_asked_and_no_more_than_asked():
    for num_steps in (0, 4):
        traced = Traced()
        async with real_gateway(
            tracer=traced.tracing, num_traced_steps=num_steps, max_batch_tokens=16
        ) as (_, stubs):
            chunks = [c async for c in stubs.inference.GenerateStream(wanted(20))]
        assert chunks
        spans = traced.spans()
        (parent,) = (span for span in spans if span.kind is SpanKind.SERVER)
        stages = [span for span in spans if span.kind is not SpanKind.SERVER]
        assert [span.name for span in stages] == ["stage 0"] * num_steps
        assert {span.parent.span_id for span in stages} <= {parent.context.span_id}
        steps = [span.attributes["tightfit.step"] for span in stages]
        assert all(a < b for a, b in pairwise(steps))
        assert all(parent.start_time <= span.start_time < parent.end_time for span in stages)


def test_a_collector_gets_them_over_the_network_as_otlp():
    with Receiver() as receiver:
        tracing = Tracing(otlp_exporter(receiver.address), model="tiny", version="1.2")

        @in_loop
        async def ask():
            async with real_gateway(tracer=tracing) as (_, stubs):
                for _ in range(3):
                    await stubs.inference.Generate(wanted())

        ask()
        tracing.close()
        assert wait_for(lambda: len(receiver.spans) == 3)
        assert {span.name for span in receiver.spans} == {"tightfit.v1.InferenceService/Generate"}
        assert receiver.resources[0]["service.name"] == "tightfit"
        assert receiver.resources[0]["service.version"] == "1.2"


@pytest.mark.slow
def test_a_collector_that_is_away_disturbs_no_request_and_holds_up_no_end():
    tracing = Tracing(otlp_exporter("http://127.0.0.1:9"), model="tiny", version="1")

    @in_loop
    async def ask():
        async with real_gateway(tracer=tracing) as (_, stubs):
            for _ in range(3):
                assert (await stubs.inference.Generate(wanted())).outputs[0].token_ids

    ask()
    started_s = time.monotonic()
    tracing.close()
    assert time.monotonic() - started_s < 8


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "ftp://a:1", "http://a", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="trace_endpoint"):
        serve_config({"serve": {"model": "m", "trace_endpoint": endpoint}})


def test_without_an_endpoint_opentelemetry_is_not_even_imported():
    code = (
        "import sys, tightfit.cluster.deployment;"
        "print([m for m in sys.modules if m.startswith('tightfit.cluster.tracing')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
