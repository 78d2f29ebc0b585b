"""Serves a model by a plan on a Ray cluster of labelled nodes, all in this process's network
namespace, and takes nodes away while it generates.

`python moving_script.py MODEL PLAN PROMPT_LENGTH COUNT`: prints a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import ExitStack

import tightfit.cluster.ray_environment as ray_environment

ray_environment.prepare(is_private=True)  # the cluster is this process's, and has its token

from prometheus_client import CollectorRegistry  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tightfit.cluster.arrangement import arrange, arrange_early  # noqa: E402
from tightfit.cluster.config import ServeConfig  # noqa: E402
from tightfit.cluster.deployment import (  # noqa: E402
    make_engine,
    ray_options,
    start_replica,
    supervise,
)
from tightfit.cluster.metrics import Metrics  # noqa: E402
from tightfit.cluster.model import describe_model  # noqa: E402
from tightfit.cluster.nodes import NODE_LABEL, alive_nodes  # noqa: E402
from tightfit.cluster.ray_session import RaySession  # noqa: E402
from tightfit.cluster.request import Request, SamplingParams  # noqa: E402
from tightfit.cluster.supervisor import Supervisor  # noqa: E402
from tightfit.cluster.tokenizer import load_tokenizer  # noqa: E402
from tightfit.cluster.turn import PlanningTurn  # noqa: E402

LIMIT_S = 90.0


async def until(condition) -> None:
    """Return when it is true."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() < started_s + LIMIT_S, "it did not happen"
        await asyncio.sleep(0.05)


class Story:
    """What is done to the nodes, and what the engine makes of it."""

    def __init__(self, cluster, nodes, engine, prompt, count) -> None:
        self._cluster, self._nodes, self._engine = cluster, nodes, engine
        self._prompt, self._count = prompt, count

    def _ask(self, name):
        sampling = SamplingParams(max_tokens=self._count)
        return self._engine.submit(
            Request(request_id=name, prompt_token_ids=self._prompt, sampling=sampling)
        )

    async def _read(self, stream, tokens):
        async for event in stream:
            if event.token_id is not None:
                tokens.append(event.token_id)
            if event.error:
                return event.error
        return ""

    def _add(self, name):
        self._nodes[name] = self._cluster.add_node(num_cpus=2, labels={NODE_LABEL: name})

    def _remove(self, name):
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def _where(self):
        names = {node.ray_id: node.name for node in alive_nodes()}
        return [
            [names[stage.node_id], stage.planned_device, stage.pid]
            for stage in self._engine.status().stages
        ]

    async def _lose(self, name, streams):
        """Takes a node away while one stream after the other is read, until that is noticed."""
        answers, noticed = [], asyncio.Event()

        async def read_on():
            while not noticed.is_set():
                tokens = []
                asked = self._ask(f"{streams}-{len(answers)}")
                answers.append({"error": await self._read(asked, tokens), "tokens": tokens})

        reading = asyncio.create_task(read_on())
        await until(lambda: self._engine.status().counts.num_running)
        await asyncio.to_thread(self._remove, name)
        await until(lambda: self._engine.health in ("recovering", "failed"))
        noticed.set()
        await reading
        return answers

    async def run(self):
        self._engine.start()
        before = self._where()
        moved = await self._lose("b", "first")
        after = self._where()
        lost = await self._lose("c", "second")
        self._add("d")
        await until(lambda: self._engine.health == "idle")
        tokens = []
        again = {"error": await self._read(self._ask("third"), tokens), "tokens": tokens}
        return {
            "before": before, "moved": moved, "after": after, "lost": lost,
            "again": again, "at_last": self._where(),
            "num_recoveries": self._engine.status().num_recoveries,
        }  # fmt: skip


def main(path: str, plan: str, length: int, count: int) -> None:
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with ExitStack() as cleanup:
        cleanup.callback(cluster.shutdown)
        nodes = {
            name: cluster.add_node(num_cpus=2, labels={NODE_LABEL: name}) for name in ("a", "b")
        }
        config = ServeConfig(
            model=path, plan=plan, ray_address=cluster.address, placement_timeout_s=20.0
        )
        model = describe_model(config.model)
        early = arrange_early(config, model)
        session = RaySession(ray_options(early.config))
        cleanup.callback(session.close)
        arrangement = arrange(session, config, model, early, None)
        nodes["c"] = cluster.add_node(num_cpus=2, labels={NODE_LABEL: "c"})
        supervisor, turn = Supervisor(), PlanningTurn("m")
        cleanup.callback(turn.release)
        replica = start_replica(
            session, arrangement, supervisor, cleanup, turn=turn, check=lambda: None
        )
        metrics = Metrics(CollectorRegistry(), num_stages=2)
        engine = make_engine(
            arrangement.placement, model, replica, load_tokenizer(model.path), metrics
        )
        supervise(supervisor, engine, replica, arrangement.config, turn)
        cleanup.callback(engine.stop)
        cleanup.callback(supervisor.close)
        story = Story(cluster, nodes, engine, tuple(range(length)), count)
        found = asyncio.run(story.run())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
