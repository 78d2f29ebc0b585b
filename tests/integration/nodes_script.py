"""Serves a model on a Ray cluster of three nodes, none of which has room for two stages, and then
bothers every port that listens.

`python nodes_script.py MODEL PROMPT_LENGTH`: prints a JSON object. Run in a network namespace of
its own: every port there is one of the service's.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import sys
import time
from contextlib import ExitStack, suppress

import tightfit.cluster.ray_environment as ray_environment

ray_environment.prepare(is_private=True)  # the cluster is this process's, and has its token

import msgspec  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import zmq  # noqa: E402
from noise import send_noise  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tightfit.cluster.arrangement import arrange, arrange_early  # noqa: E402
from tightfit.cluster.config import ServeConfig  # noqa: E402
from tightfit.cluster.deployment import make_engine, ray_options, start_replica  # noqa: E402
from tightfit.cluster.metrics import Metrics  # noqa: E402
from tightfit.cluster.model import describe_model  # noqa: E402
from tightfit.cluster.ray_authentication import answers_anyone  # noqa: E402
from tightfit.cluster.ray_session import RaySession  # noqa: E402
from tightfit.cluster.request import Request, SamplingParams  # noqa: E402
from tightfit.cluster.supervisor import Supervisor  # noqa: E402
from tightfit.cluster.tokenizer import load_tokenizer  # noqa: E402
from tightfit.cluster.turn import PlanningTurn  # noqa: E402
from tightfit.workers.api import MicroBatch, SequenceSlice  # noqa: E402
from tightfit.workers.link import StepMessage  # noqa: E402
from tightfit.workers.link_keys import LinkKeys  # noqa: E402


async def generate(engine, prompt):
    request = Request(
        request_id="a", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=16)
    )
    return [event.token_id async for event in engine.submit(request)]


async def before_and_after(engine, prompt, disturb):
    """The answer to a prompt, before and after `disturb`."""
    engine.start()
    before = await generate(engine, prompt)
    await asyncio.to_thread(disturb)
    return before, await generate(engine, prompt)


def listening():
    """Every TCP port that something listens on."""
    found = psutil.net_connections(kind="tcp")
    return sorted({c.laddr.port for c in found if c.status == psutil.CONN_LISTEN})


def inject(endpoints):
    """The next step of the epoch, to each stage, from whoever knows the stage's public key."""
    part = SequenceSlice(sequence_id=9, start_position=0, token_ids=[1], block_table=[0])
    context = zmq.Context()
    for endpoint in endpoints:
        for keys in (None, LinkKeys.new()):
            stranger = context.socket(zmq.PUSH)
            # Collected or destroyed, it forgets what nobody took: else the context waits for ever.
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.setsockopt(zmq.SNDTIMEO, 0)  # ZeroMQ gives a connection up that is refused
            if keys is not None:
                keys.use(stranger, endpoint.public_key)
            stranger.connect(endpoint.tcp)
            with suppress(zmq.Again):
                for step in range(14, 20):
                    message = StepMessage(batch=MicroBatch(epoch=1, step=step, slices=[part]))
                    stranger.send_multipart([msgspec.msgpack.encode(message), b""])
    time.sleep(2)
    context.destroy(linger=0)


def command_lines():
    """Of every process that this one has started."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return "\n".join(lines)


LIMIT_S = 150.0
"""Then it ends, and says where it was."""


def main(path: str, length: int) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with ExitStack() as cleanup:
        cleanup.callback(cluster.shutdown)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        config = ServeConfig(
            model=path, format="fp32", stages=2, ray_address=cluster.address, kv_blocks=64,
            ray_strategy="STRICT_SPREAD",
        )  # fmt: skip
        model = describe_model(config.model)
        early = arrange_early(config, model)
        session = RaySession(ray_options(early.config))
        cleanup.callback(session.close)
        arrangement = arrange(session, config, model, early, None)
        replica = start_replica(
            session, arrangement, Supervisor(), cleanup, turn=PlanningTurn("m"),
            check=lambda: None,
        )  # fmt: skip
        metrics = Metrics(CollectorRegistry(), num_stages=2)
        tokenizer = load_tokenizer(model.path)
        engine = make_engine(arrangement.placement, model, replica, tokenizer, metrics)
        cleanup.callback(engine.stop)
        endpoints = [ray.get(actor.endpoint.remote()) for actor in replica.group._actors]
        endpoints.append(replica.links.endpoint)
        ports = listening()

        num_taken = 0

        def disturb():
            nonlocal num_taken
            inject(endpoints)
            num_taken = send_noise(ports)

        before, after = asyncio.run(before_and_after(engine, range(length), disturb))
        nodes = {status.node_id for status in replica.group.statuses()}
        answer = {
            "tokens": before,
            "tokens_after": after,
            "steps": [status.steps for status in replica.group.statuses()],
            "num_nodes": len(nodes),
            "links": [endpoint.tcp for endpoint in endpoints],
            "ports": ports,
            "connections_taken": num_taken,
            "open_cluster": answers_anyone(ray.get_runtime_context().gcs_address),
            "shown": os.environ["RAY_AUTH_TOKEN"] in command_lines(),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
