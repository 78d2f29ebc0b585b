"""Serves a model on a Ray cluster of three nodes, none of which has room for two stages.

`python nodes_script.py MODEL PROMPT_LENGTH`: prints a JSON object. Run in a network namespace.
"""

from __future__ import annotations

import asyncio
import json
import sys

import tightfit.cluster.ray_environment as ray_environment

ray_environment.prepare(is_private=True)  # the cluster is this process's, and has its token

import ray  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tightfit.cluster.arrangement import arrange, arrange_early  # noqa: E402
from tightfit.cluster.config import ServeConfig  # noqa: E402
from tightfit.cluster.deployment import make_engine, ray_options, start_replica  # noqa: E402
from tightfit.cluster.launch import RaySession  # noqa: E402
from tightfit.cluster.metrics import Metrics  # noqa: E402
from tightfit.cluster.model import describe_model  # noqa: E402
from tightfit.cluster.request import Request, SamplingParams  # noqa: E402
from tightfit.cluster.tokenizer import load_tokenizer  # noqa: E402


async def generate(engine, prompt):
    engine.start()
    request = Request(
        request_id="a", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=16)
    )
    return [event.token_id async for event in engine.submit(request)]


def main(path: str, length: int) -> None:
    from contextlib import ExitStack

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with ExitStack() as cleanup:
        cleanup.callback(cluster.shutdown)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        config = ServeConfig(
            model=path, format="fp32", stages=2, ray_address=cluster.address, kv_blocks=64,
            insecure_ray=True,
            ray_strategy="STRICT_SPREAD",
        )  # fmt: skip
        model = describe_model(config.model)
        early = arrange_early(config, model)
        session = RaySession(ray_options(early.config))
        cleanup.callback(session.close)
        arrangement = arrange(session, config, model, early, None)
        replica = start_replica(session, arrangement, print, cleanup, check=lambda: None)
        metrics = Metrics(CollectorRegistry(), num_stages=2)
        tokenizer = load_tokenizer(model.path)
        engine = make_engine(arrangement.placement, model, replica, tokenizer, metrics)
        cleanup.callback(engine.stop)
        tokens = asyncio.run(generate(engine, range(length)))
        nodes = {status.node_id for status in replica.group.statuses()}
        links = [ray.get(actor.endpoint.remote()).tcp for actor in replica.group._actors]
    print(json.dumps({"tokens": tokens, "num_nodes": len(nodes), "links": links}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
