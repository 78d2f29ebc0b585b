"""Services that plan in one Ray cluster of two nodes, all in this process's network namespace.

`python turns_script.py MODEL`: prints a JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack

import tightfit.cluster.ray_environment as ray_environment

ray_environment.prepare(is_private=True)  # the cluster is this process's, and has its token

from ray.cluster_utils import Cluster  # noqa: E402
from served import Served  # noqa: E402

from tightfit.client import Client  # noqa: E402
from tightfit.cluster.nodes import NODE_LABEL  # noqa: E402

HOLDER = """
import sys, time, ray
from tightfit.cluster.turn import PlanningTurn
ray.init(address=sys.argv[1], log_to_driver=False)
turn = PlanningTurn("another")
turn.take(lambda: None)
print("taken", flush=True)
time.sleep(600)
"""
LIMIT_S = 90.0


class Watched(Served):
    """A service whose standard error is read as it comes."""

    def __init__(self, *args: str) -> None:
        super().__init__(*args, wait=False)
        self.lines: list[str] = []

    def wait_for_line(self, part: str) -> None:
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.lines.append(line)
            if part in line:
                return
        raise AssertionError(f"{part!r} was not said: {''.join(self.lines)}")

    def wait_until_ready(self) -> None:
        self._wait_until_ready()

    def device(self) -> str | None:
        with Client(self.target, timeout_s=60) as client:
            (stage,) = client.status().stages
            return stage.planned_device


def main(path: str) -> None:
    found: dict[str, object] = {}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    with ExitStack() as cleanup:
        cleanup.callback(cluster.shutdown)
        for name in ("a", "b"):
            cluster.add_node(num_cpus=1, labels={NODE_LABEL: name})
        flags = ("--ray-address", cluster.address, "--format", "fp32", "--memory-budget", "300MiB")

        def start(*more: str) -> Watched:
            return cleanup.enter_context(Watched(path, *flags, *more))

        # While another one has the turn nobody plans; it ends with its process, however that ends.
        holder = cleanup.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, cluster.address], stdout=subprocess.PIPE, text=True
            )
        )
        cleanup.callback(holder.kill)
        assert holder.stdout is not None
        holder.stdout.readline()
        services = [start(), start()]
        for service in services:
            service.wait_for_line("waiting until another on ")
        holder.kill()
        for service in services:
            service.wait_until_ready()
        found["devices"] = sorted(str(service.device()) for service in services)

        # Every node is held now.
        refused = start("--placement-timeout-s", "1")
        _, errors = refused.process.communicate(timeout=LIMIT_S)
        found["refused"] = [refused.process.returncode, errors]

        # One that waits for room gets that of a service which was killed.
        late = start("--placement-timeout-s", "80")
        late.wait_for_line("waiting up to 80 s for room")
        freed = services[0].device()
        services[0].process.kill()
        late.wait_until_ready()
        found["late_has_the_freed"] = late.device() == freed
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
