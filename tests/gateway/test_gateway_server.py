"""The server: health, reflection, status, drain, its port."""

import asyncio

import grpc
import pytest
from fake_engine import (
    FakeEngine,
    byte_tokenizer,
    connected,
    in_loop,
    reply_ids,
    serving,
    until,
)
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.metrics import Metrics
from tightfit.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE, CLUSTER = "tightfit.v1.InferenceService", "tightfit.v1.ClusterService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel, service=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


@in_loop
async def test_health_follows_the_engine_and_the_cluster_can_always_be_asked():
    async with serving() as gateway, connected(gateway) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=INFERENCE)
        )
        seen = aiter(watch)
        assert (await anext(seen)).status == SERVING
        assert await health(channel) == await health(channel, INFERENCE) == SERVING
        for attribute, value in [("failure", "gone"), ("stalled", True)]:
            before = getattr(gateway.engine, attribute)
            setattr(gateway.engine, attribute, value)
            assert (await anext(seen)).status == NOT_SERVING
            assert await health(channel) == await health(channel, INFERENCE) == NOT_SERVING
            assert await health(channel, "liveness") == NOT_SERVING  # a restart helps
            assert await health(channel, CLUSTER) == SERVING
            setattr(gateway.engine, attribute, before)
            assert (await anext(seen)).status == SERVING
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_while_it_recovers_it_is_not_ready_but_alive_and_says_why():
    async with serving() as gateway, connected(gateway) as channel:
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        stub = health_pb2_grpc.HealthStub(channel)
        seen = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=INFERENCE)))
        assert (await anext(seen)).status == SERVING
        gateway.engine.lose("stage 1's process ended")
        assert (await anext(seen)).status == NOT_SERVING
        assert await health(channel) == NOT_SERVING
        assert await health(channel, "liveness") == SERVING  # a restart would lose what waits
        assert await health(channel, CLUSTER) == SERVING
        status = await cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert status.health == cluster_pb2.HEALTH_RECOVERING
        assert (status.reason, status.num_recoveries) == ("stage 1's process ended", 0)
        gateway.engine.recover()
        assert (await anext(seen)).status == SERVING
        status = await cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert status.health == cluster_pb2.HEALTH_IDLE
        assert (status.reason, status.num_recoveries, status.epoch) == ("", 1, 2)


@in_loop
async def test_reflection_lists_the_services_and_gives_their_files():
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"),
    ]
    async with serving() as gateway, connected(gateway) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, file, missing = [
            answer async for answer in stub.ServerReflectionInfo(iter(requests))
        ]
    names = {service.name for service in listed.list_services_response.service}
    assert {INFERENCE, CLUSTER, "grpc.health.v1.Health"} <= names
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in file.file_descriptor_response.file_descriptor_proto
    ]
    methods = {m.name for f in files for s in f.service for m in s.method}
    assert {"Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModel"} <= methods
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@in_loop
async def test_status_and_plan_show_the_stages():
    async with serving() as gateway, connected(gateway) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        status = await stub.GetStatus(cluster_pb2.GetStatusRequest())
        plan = await stub.GetPlan(cluster_pb2.GetPlanRequest())
    assert (status.model, status.health) == ("fake", cluster_pb2.HEALTH_IDLE)
    assert [(s.first_layer, s.end_layer, s.node_id) for s in status.stages] == [
        (0, 2, "n0"), (2, 4, "n1"),
    ]  # fmt: skip
    assert status.stages[0].busy_share == 0.25
    memory = status.stages[0].memory
    assert (memory.predicted_weight_bytes, memory.weight_bytes, memory.budget_bytes) == (
        100,
        101,
        0,
    )
    assert (status.load.kv_blocks, status.load.kv_blocks_used) == (25, 5)
    assert [(s.index, s.format, s.weight_bytes) for s in plan.stages] == [
        (0, "int8", 100), (1, "int8", 100),
    ]  # fmt: skip


@in_loop
async def test_draining_refuses_new_requests_and_lets_running_ones_finish():
    engine = FakeEngine()
    engine.delay_s = 0.005
    sampling = inference_pb2.Sampling(max_tokens=60)
    async with serving(engine) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stream = stub.GenerateStream(inference_pb2.GenerateRequest(prompt="a", sampling=sampling))
        tokens = list((await anext(aiter(stream))).token_ids)
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        answer = await cluster.Drain(cluster_pb2.DrainRequest())
        assert answer.unfinished_requests == 1
        assert gateway.server.drain_requested.is_set()
        drained = asyncio.create_task(gateway.server.drain(grace_s=10))
        assert await until(lambda: engine.is_draining)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(inference_pb2.GenerateRequest(prompt="a"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await health(channel) == NOT_SERVING
        assert await health(channel, "liveness") == SERVING
        status = await cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert status.health == cluster_pb2.HEALTH_DRAINING
        async for chunk in stream:
            tokens += chunk.token_ids
        assert tokens == reply_ids()[:60]
        assert await drained is True


@in_loop
async def test_a_drain_gives_up_at_the_end_of_its_grace():
    engine = FakeEngine()
    engine.stalled = True
    async with serving(engine) as gateway, connected(gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(prompt="a"))
        assert await until(lambda: engine.num_unfinished == 1)
        assert await gateway.server.drain(grace_s=0.1) is False
        call.cancel()


@in_loop
async def test_a_port_that_is_taken_is_named():
    async with serving() as gateway:
        port = int(gateway.target.rpartition(":")[2])
        second = GatewayServer(FakeEngine(), byte_tokenizer(), Metrics(CollectorRegistry()))
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await second.start("127.0.0.1", port)
        await second.stop()


@in_loop
async def test_a_broken_chat_template_is_found_before_anything_is_served():
    with pytest.raises(ConfigError, match="chat template is not valid"):
        GatewayServer(FakeEngine(), byte_tokenizer("{% for %}"), Metrics(CollectorRegistry()))
