"""Serves a model by a plan on a Ray cluster of labelled nodes, all in this process's network
namespace, and looks around as nodes join and leave.

`python planned_script.py MODEL PLAN PROMPT_LENGTH`: prints a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import ExitStack

import tightfit.cluster.ray_environment as ray_environment

ray_environment.prepare(is_private=True)  # the cluster is this process's, and has its token

import ray  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tightfit.cluster.arrangement import arrange, arrange_early, compare  # noqa: E402
from tightfit.cluster.config import ServeConfig  # noqa: E402
from tightfit.cluster.deployment import make_engine, ray_options, start_replica  # noqa: E402
from tightfit.cluster.errors import PlacementError  # noqa: E402
from tightfit.cluster.metrics import Metrics  # noqa: E402
from tightfit.cluster.model import describe_model  # noqa: E402
from tightfit.cluster.nodes import NODE_LABEL, alive_nodes, slowest_link  # noqa: E402
from tightfit.cluster.ray_session import RaySession  # noqa: E402
from tightfit.cluster.request import Request, SamplingParams  # noqa: E402
from tightfit.cluster.supervisor import Supervisor  # noqa: E402
from tightfit.cluster.surroundings import Surroundings  # noqa: E402
from tightfit.cluster.tokenizer import load_tokenizer  # noqa: E402
from tightfit.cluster.turn import PlanningTurn  # noqa: E402


async def generate(engine, prompt):
    engine.start()
    request = Request(
        request_id="a", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=16)
    )
    return [event.token_id async for event in engine.submit(request)]


def main(path: str, plan: str, length: int) -> None:
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with ExitStack() as cleanup:
        cleanup.callback(cluster.shutdown)
        nodes = {
            name: cluster.add_node(num_cpus=2, labels={NODE_LABEL: name}) for name in ("a", "b")
        }
        config = ServeConfig(model=path, plan=plan, ray_address=cluster.address)
        model = describe_model(config.model)
        early = arrange_early(config, model)
        session = RaySession(ray_options(early.config))
        cleanup.callback(session.close)
        arrangement = arrange(session, config, model, early, None)
        with ExitStack() as serving:
            replica = start_replica(
                session, arrangement, Supervisor(), serving, turn=PlanningTurn("m"),
                check=lambda: None,
            )  # fmt: skip
            metrics = Metrics(CollectorRegistry(), num_stages=2)
            engine = make_engine(
                arrangement.placement, model, replica, load_tokenizer(model.path), metrics
            )
            serving.callback(engine.stop)
            tokens = asyncio.run(generate(engine, range(length)))
            names = {node.ray_id: node.name for node in alive_nodes()}
            on = [names[status.node_id] for status in replica.statuses]
            lines = compare(arrangement, replica.statuses)
            around = Surroundings(arrangement.placement.plan, (), arrangement.places)
            link = slowest_link(alive_nodes())
            before = [device.device_id for device in around.inventory().devices]
            cluster.add_node(num_cpus=2, labels={NODE_LABEL: "c"})
            after = [device.device_id for device in around.inventory().devices]
            again = [device.device_id for device in around.inventory().devices]
        cluster.remove_node(nodes["b"], allow_graceful=False)
        deadline = time.monotonic() + 60
        while any(node.name == "b" for node in alive_nodes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        try:
            arrange(session, config, model, early, None)
            refusal = ""
        except PlacementError as error:
            refusal = str(error)
        left = [a for a in ray.util.list_named_actors(all_namespaces=True)]
    print(
        json.dumps(
            {
                "tokens": tokens, "on": on, "compare": lines, "before": before, "after": after,
                "again": again,
                "link": [link.source, link.target, link.latency_s, link.bytes_per_s],
                "refusal": refusal, "left": left,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
