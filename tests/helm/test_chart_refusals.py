"""Values that make no sense are refused before anything is installed: by path, with the reason."""

import subprocess
import sys

import pytest
from chart import BASE, MAJORS, ROOT, nested, over, run_helm

BY_SCHEMA = {
    "serve.stages": (0, "stages"),
    "serve.stage": (1, "stage"),
    "serve.format": ("int9", "format"),
    "serve.listen": ("0.0.0.0:1", "listen"),
    "serve.log_format": ("xml", "log_format"),
    "serve.log_level": ("loud", "log_level"),
    "serve.trace_share": (1.1, "trace_share"),
    "serve.max_queued_tokens": (1.5, "max_queued_tokens"),
    "plan.inventory": ("x", "inventory"),
    "prepare.quantize.format": ("fp8", "format"),
    "pools.Big": ({"devices": {"type": "l4"}}, "Big"),
    "pools.big.devices.count": (0, "count"),
    "pools.big.devices.type": ("", "type"),
    "pools.big.nodes": (-1, "nodes"),
    "pools.big.device": ("l4", "device"),
    "pools.big.resources": ({"limits": {"cpu": "much"}}, "cpu"),
    "pools.big.tolerations": ([{"effect": "Sometimes"}], "effect"),
    "image.tag": ("latest", "tag"),
    "image.digest": ("sha256:1", "digest"),
    "image.repository": ("registry.example/a:latest", "repository"),
    "gateway.replicas": ("two", "replicas"),
    "gateway.port": (70000, "port"),
    "gateway.resources": ({"limits": None}, "limits"),
    "gateway.strategy.type": ("Both", "type"),
    "gateway.extraEnv": ([{"name": "A", "secret": "x"}], "secret"),
    "gateway.autoscaling.kind": ("vpa", "kind"),
    "gateway.grpcRoute.hostnames": (["a..b"], "hostnames"),
    "gateway.grpcRoute.parentRefs": ([{"name": "g", "namespace": "A"}], "namespace"),
    "gateway.ingress.host": ("a b", "host"),
    "podSecurity.userId": (0, "userId"),
    "podSecurity.privileged": (True, "privileged"),
    "models.mountPath": ("models", "mountPath"),
    "models.accessModes": ([], "accessModes"),
    "ray.version": ("2.60", "version"),
    "plan.reserve": ("loose", "reserve"),
    "deviceTypes.odd": ({"memory": "8GiB"}, "gb_per_s"),
    "monitoring.serviceMonitor.interval": ("often", "interval"),
    "fullnameOverride": ("a" * 41, "fullnameOverride"),
    "networkPolicy.collectors": ([{"name": "collector"}], "collectors"),
    "unknown": (1, "unknown"),
}
"""By path: a value, and the part of the path that the message names."""

BY_TEMPLATE = {
    "image.repository": ("", "build the image with Dockerfile"),
    "serve.model": ("", "a directory under /models, or a hub name"),
    "pools": (None, "name one pool of nodes at least"),
    "ray.auth.existingSecret": ("", "whoever reaches Ray can run code on it"),
    "gateway.tls.existingSecret": ("", "or set gateway.insecure behind a proxy"),
    "gateway.auth.existingSecret": ("", "or set gateway.insecure behind a proxy"),
    "gateway.replicas": (2, "2 × serve.stages, 4, is more than the 4 device(s) of all pools"),
    "gateway.autoscaling.maxReplicas": (2, "2 × serve.stages, 4, is more than the 4 device(s)"),
    "gateway.autoscaling.minReplicas": (2, "2 is more than maxReplicas, 1"),
    "gateway.autoscaling.prometheusAddress": ("", "missing; KEDA asks it"),
    "gateway.ingress.host": ("", "missing"),
    "gateway.grpcRoute.parentRefs": ([], "missing"),
    "gateway.startupSeconds": (4499, "4499 is less than serve.placement_timeout_s and"),
    "gateway.metricsPort": (50051, "two of them are the same"),
    "serve.trace_endpoint": ("collector:4317", "is not http://host:port or https://host:port"),
    "gateway.modelVolume": ({}, "there is no other volume"),
    "pools.big.modelVolume": ({}, "there is no other volume"),
    "prepare.quantize.model": (None, "missing; what is to be quantised"),
    "prepare.quantize.out": ("/elsewhere/x", "/elsewhere/x; a directory under models.mountPath"),
    "planCheck.model": (None, "cannot be read before the chart's own claim is there"),
}
"""By path: a value that does not go with the others, and the reason that is given."""
TOGETHER = {
    "serve.model": {},
    "gateway.autoscaling.maxReplicas": {"enabled": True},
    "gateway.autoscaling.minReplicas": {"enabled": True},
    "gateway.autoscaling.prometheusAddress": {"enabled": True, "kind": "keda"},
    "gateway.ingress.host": {"enabled": True},
    "gateway.grpcRoute.parentRefs": {"enabled": True},
}
"""What else has to be set beside it, for the value to be wrong."""
NO_CLAIM = {"models": {"create": False}}
PREPARE = {"prepare": {"enabled": True}}


def wrong(path):
    value, _ = BY_TEMPLATE[path]
    beside = nested(path.rpartition(".")[0], TOGETHER[path]) if TOGETHER.get(path) else {}
    if path.endswith("modelVolume"):
        beside = NO_CLAIM
    if path.startswith("prepare."):
        beside = PREPARE
    if path == "planCheck.model":
        return over(BASE, nested("serve.model", "/models/x"))
    if path == "pools":
        return {key: entry for key, entry in BASE.items() if key != "pools"}
    return over(BASE, beside, nested(path, value) if value is not None else {})


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("path", BY_SCHEMA)
def test_what_is_no_value_of_a_setting_is_refused_by_path(path, major, tmp_path):
    value, named = BY_SCHEMA[path]
    done = run_helm(major, "template", over(BASE, nested(path, value)), tmp_path)
    assert done.returncode != 0
    assert "schema" in done.stderr
    assert named in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("path", BY_TEMPLATE)
def test_what_does_not_go_together_is_refused_by_path(path, tmp_path):
    done = run_helm(4, "template", wrong(path), tmp_path)
    assert done.returncode != 0
    reasons = dict(line.split(": ", 1) for line in done.stderr.splitlines() if ": " in line)
    named = next(key for key in reasons if path in key.split(", "))
    assert BY_TEMPLATE[path][1] in reasons[named]


@pytest.mark.parametrize(
    "endpoint",
    ["http://collector", "http://:4317", "http://a:0", "http://a:65536", "grpc://a:4317"],
)
def test_a_collector_without_a_place_is_refused_by_path(endpoint, tmp_path):
    values = over(BASE, nested("serve.trace_endpoint", endpoint))
    done = run_helm(4, "template", values, tmp_path)
    assert f'serve.trace_endpoint: "{endpoint}" is not http' in done.stderr


def test_the_base_that_is_spoilt_is_good(tmp_path):
    assert run_helm(4, "template", BASE, tmp_path).returncode == 0


def test_replicas_that_plan_need_a_device_each(tmp_path):
    serve = {key: value for key, value in BASE["serve"].items() if key != "stages"}
    one = {**BASE, "serve": serve}
    four = over(one, nested("gateway.replicas", 4))
    assert run_helm(4, "template", four, tmp_path).returncode == 0
    done = run_helm(4, "template", over(one, nested("gateway.replicas", 5)), tmp_path)
    assert "gateway.replicas: 5 replicas with a device each are more than the 4" in done.stderr


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    done = run_helm(4, "template", {}, tmp_path)
    for path in ("image.repository", "serve.model", "pools", "ray.auth.existingSecret"):
        assert f"\n{path}: " in done.stderr


@pytest.mark.parametrize("tool", ["chart_schema.py", "chart_readme.py"])
def test_the_schema_has_the_commands_settings_and_the_readme_the_values(tool):
    subprocess.run([sys.executable, ROOT / "tools" / tool, "--check"], check=True)
