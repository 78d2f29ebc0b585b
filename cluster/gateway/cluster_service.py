"""ClusterService: what operators ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tightfit.cluster.engine import Engine
from tightfit.cluster.gateway import convert
from tightfit.cluster.gateway.status import Context, unary
from tightfit.v1 import cluster_pb2, cluster_pb2_grpc


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """See protos/tightfit/v1/cluster.proto.

    Args:
        engine: what is asked; asking the stages takes milliseconds, so it is done off the event
            loop.
        on_drain: called when draining is asked for.
    """

    def __init__(self, engine: Engine, on_drain: Callable[[], None]) -> None:
        self._engine, self._on_drain = engine, on_drain

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.GetStatusResponse:
        """Stages, memory and load now."""

        async def work() -> cluster_pb2.GetStatusResponse:
            return convert.status_response(await asyncio.to_thread(self._engine.status))

        return await unary(context, work)

    async def GetPlan(
        self, request: cluster_pb2.GetPlanRequest, context: Context
    ) -> cluster_pb2.GetPlanResponse:
        """Which layers are where."""

        async def work() -> cluster_pb2.GetPlanResponse:
            return convert.plan_response(await asyncio.to_thread(self._engine.status))

        return await unary(context, work)

    async def Drain(
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.DrainResponse:
        """No new requests from now on."""

        async def work() -> cluster_pb2.DrainResponse:
            self._on_drain()
            return cluster_pb2.DrainResponse(unfinished_requests=self._engine.num_unfinished)

        return await unary(context, work)
