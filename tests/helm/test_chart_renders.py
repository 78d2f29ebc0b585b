"""The chart in many combinations of its values: what comes out is what an API server takes."""

import shutil

import chart_schemas
import jsonschema
import pytest
import yaml
from chart import BASE, CHART, EVERYTHING, MAJORS, ROOT, find, nested, over, parse, render, run_helm

CI = CHART / "ci"
CPU = {
    "deviceTypes": yaml.safe_load((CI / "cpu.yaml").read_text())["deviceTypes"],
    "pools": {"big": {"nodes": 2, "devices": {"type": "share", "count": 2}}},
}
INSECURE = {
    "gateway": {"insecure": True, "tls": {"existingSecret": ""}, "auth": {"existingSecret": ""}}
}
VALUES = {
    "as it is": {},
    "everything": EVERYTHING,
    "CPUs": CPU,
    "two pools": {"pools": {"small": {"nodes": 3, "devices": {"type": "l4"}}}},
    "own GPU resource": {"pools": {"big": {"gpuResource": "amd.com/gpu"}}},
    "own resources": {"pools": {"big": {"resources": {"limits": {"cpu": 7, "memory": "99Gi"}}}}},
    "host path": {"pools": {"big": {"modelVolume": {"hostPath": {"path": "/mnt/models"}}}}},
    "runtime class": {"pools": {"big": {"runtimeClassName": "nvidia", "shmSize": "2Gi"}}},
    "no plaintext": INSECURE,
    "behind a proxy": over(INSECURE, nested("gateway.auth.existingSecret", "tokens")),
    "mTLS": {"gateway": {"tls": {"clientCA": True}}, "test": {"clientSecret": "client"}},
    "mTLS alone": {"gateway": {"tls": {"clientCA": True}, "auth": {"existingSecret": ""}}},
    "test token": nested("test.existingSecret", "token"),
    "digest": nested("image.digest", "sha256:" + "a" * 64),
    "pull secret": nested("image.pullSecrets", [{"name": "pull"}]),
    "existing claim": {"models": {"existingClaim": "m"}, "serve": {"model": "/models/bloom"}},
    "no claim": {
        "models": {"create": False},
        "gateway": {"modelVolume": {"nfs": {"server": "nfs", "path": "/"}}},
        "pools": {"big": {"modelVolume": {"nfs": {"server": "nfs", "path": "/"}}}},
    },
    "claim that goes": nested("models.keep", False),
    "storage class": {"models": {"storageClassName": "fast", "accessModes": ["ReadOnlyMany"]}},
    "prepare": {
        "prepare": {"enabled": True, "quantize": {"model": "a/b", "out": "/models/c"}},
        "serve": {"model": "/models/c"},
        "planCheck": {"model": "bloom-176b"},
    },
    "hub token": {"hub": {"existingSecret": "hub", "endpoint": "https://hub.example.org"}},
    "no plan check": nested("planCheck.enabled", False),
    "plan settings": {"plan": {"sequences": 8, "formats": "int4,int8", "mixed": True}},
    "no replica": nested("gateway.replicas", 0),
    "HPA": nested("gateway.autoscaling", {"enabled": True, "maxReplicas": 1}),
    "KEDA": nested(
        "gateway.autoscaling",
        {"enabled": True, "kind": "keda", "prometheusAddress": "http://p:9090", "metric": "a:b"},
    ),
    "recreate": nested("gateway.strategy", {"type": "Recreate", "rollingUpdate": None}),
    "load balancer": nested("gateway.service", {"type": "LoadBalancer", "headless": False}),
    "ingress": nested("gateway.ingress", {"enabled": True, "host": "a.example", "tlsSecret": "t"}),
    "ingress in plain": over(INSECURE, nested("gateway.ingress", {"enabled": True, "host": "a.b"})),
    "route": nested("gateway.grpcRoute", {"enabled": True, "parentRefs": [{"name": "g"}]}),
    "no network policy": nested("networkPolicy.enabled", False),
    "open egress": nested("networkPolicy.restrictEgress", False),
    "clients": nested("networkPolicy.clients", [{"podSelector": {"matchLabels": {"a": "b"}}}]),
    "traces": nested("serve.trace_endpoint", "http://collector.observability:4317"),
    "traces to peers": {
        "serve": {"trace_endpoint": "https://[fd00::1]:443", "trace_share": 0.5},
        "networkPolicy": {"collectors": [{"ipBlock": {"cidr": "fd00::1/128"}}]},
    },
    "headers for a collector": nested(
        "gateway.extraEnv",
        [
            {
                "name": "OTEL_EXPORTER_OTLP_HEADERS",
                "valueFrom": {"secretKeyRef": {"name": "collector", "key": "headers"}},
            }
        ],
    ),
    "logs for people": {"serve": {"log_level": "warning", "log_format": "text"}},
    "logs by default": {"serve": {"log_level": None, "log_format": None}},
    "no budgets": nested("podDisruptionBudgets.enabled", False),
    "monitoring": {
        "monitoring": {
            kind: {"enabled": True} for kind in ("serviceMonitor", "prometheusRule", "dashboard")
        }
    },
    "Redis": nested("ray.gcsFaultTolerance", {"redisAddress": "redis:6379", "existingSecret": "r"}),
    "Redis without password": nested("ray.gcsFaultTolerance", {"redisAddress": "redis:6379"}),
    "own account": {"serviceAccount": {"create": False, "name": "other"}},
    "default account": {"serviceAccount": {"create": False}},
    "own user": {"podSecurity": {"userId": 2000, "groupId": 3000}},
    "names": {"fullnameOverride": "a" * 40, "nameOverride": "b" * 40},
    "no drain": {"gateway": {"drainSeconds": 0, "preStopSeconds": 0}},
    "in a hurry": {
        "gateway": {"startupSeconds": 15},
        "serve": {"placement_timeout_s": 4.5, "load_timeout_s": 10},
    },
    "numbers": {"serve": {"max_queued_tokens": 123456789, "llm_int8_threshold": 5.5}},
}  # fmt: skip


def values_of(name):
    return over(BASE, VALUES[name])


def test_the_matrix_is_as_wide_as_promised():
    assert len(VALUES) >= 30


@pytest.mark.parametrize("name", VALUES)
def test_both_helms_render_the_same_and_its_schema_allows_every_object(name, tmp_path):
    before, objects = (render(values_of(name), tmp_path, major) for major in MAJORS)
    assert before == objects
    by = {tree["kind"]: chart_schemas.validate(tree) for tree in objects}
    assert by["RayCluster"] == "KubeRay's CRD" or chart_schemas.crds() is None
    assert by["Deployment"] == by["Job" if "Job" in by else "Pod"] == "Kubernetes"


@pytest.mark.parametrize("file", sorted(CI.glob("*.yaml")), ids=lambda file: file.name)
def test_each_file_of_values_renders_by_itself(file, tmp_path):
    objects = render(yaml.safe_load(file.read_text()), tmp_path)
    assert {"RayCluster", "Deployment"} <= {tree["kind"] for tree in objects}
    for tree in objects:
        chart_schemas.validate(tree)


@pytest.mark.skipif(
    chart_schemas.crds() is None, reason="no copy of KubeRay's CRD beside the project"
)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec, group, container: group.pop("groupName"),
        lambda spec, group, container: group.update(replica=1),
        lambda spec, group, container: group.update(replicas="1"),
        lambda spec, group, container: group["rayStartParams"].update({"num-cpus": 1}),
        lambda spec, group, container: container["ports"][0].pop("containerPort"),
        lambda spec, group, container: spec.update(headGroupSpec={}),
    ],
)
def test_a_ray_cluster_that_kuberay_would_refuse_is_noticed(spoil, tmp_path):
    tree = find(render(BASE, tmp_path), "RayCluster")
    chart_schemas.validate(tree)
    group = tree["spec"]["workerGroupSpecs"][0]
    spoil(tree["spec"], group, group["template"]["spec"]["containers"][0])
    with pytest.raises(jsonschema.ValidationError):
        chart_schemas.validate(tree)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("Deployment", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("ServiceMonitor", "selector"),
        ("ScaledObject", "triggers"),
    ],
)
def test_what_kubernetes_and_the_operators_would_refuse_is_noticed(kind, needed, tmp_path):
    tree = next(tree for tree in render(EVERYTHING, tmp_path) if tree["kind"] == kind)
    chart_schemas.validate(tree)
    for spec in (
        {**tree["spec"], "unknown": 1},
        {key: value for key, value in tree["spec"].items() if key != needed},
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011, each schema has a kind of its own
            chart_schemas.validate({**tree, "spec": spec})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(unknown=1),
        lambda spec: spec.update(hostnames=["a..b"]),
        lambda spec: spec["parentRefs"][0].pop("name"),
        lambda spec: spec["parentRefs"][0].update(namespace="A"),
        lambda spec: spec["rules"][0].update(backendRef=[]),
        lambda spec: spec["rules"][0].update(matches=[{"method": {"type": "Prefix"}}]),
        lambda spec: spec["rules"][0]["backendRefs"][0].update(port="50051"),
        lambda spec: spec["rules"][0]["backendRefs"][0].pop("name"),
    ],
)
def test_a_route_that_the_gateway_api_would_refuse_is_noticed(spoil, tmp_path):
    tree = find(render(EVERYTHING, tmp_path), "GRPCRoute")
    by = chart_schemas.validate(tree)
    if by.startswith("nothing: "):
        pytest.skip(by)
    spoil(tree["spec"])
    with pytest.raises(jsonschema.ValidationError):
        chart_schemas.validate(tree)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("name", [None, *sorted(path.name for path in CI.glob("*.yaml"))])
def test_lint_has_nothing_to_say(major, name, tmp_path):
    values = yaml.safe_load((CI / name).read_text()) if name else {}
    done = run_helm(major, "lint", values, tmp_path, "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def test_names_of_all_objects_are_names(tmp_path):
    for values in (over(BASE, VALUES["names"]), EVERYTHING):
        objects = render(values, tmp_path)
        cluster = find(objects, "RayCluster")["metadata"]["name"]
        assert len(f"{cluster}-head-svc") <= 50  # beyond which KubeRay shortens it, from the front
        assert all(len(tree["metadata"]["name"]) <= 63 for tree in objects)


def test_notes_say_what_comes_next(tmp_path):
    # Helm 3 asks a cluster even in a dry run.
    done = run_helm(4, "install", BASE, tmp_path, "--dry-run=client", "--generate-name")
    assert "helm test" in done.stdout, done.stderr
    assert "4 cuda device(s) in 1 pool(s): 1 replica(s) of 4 stage(s)" in done.stdout


def test_rules_and_dashboard_are_the_charts_files_as_they_are(tmp_path):
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    shutil.rmtree(chart / "files", ignore_errors=True)
    values = values_of("monitoring")
    kinds = [tree["kind"] for tree in render(values, tmp_path, chart=chart)]
    assert "PrometheusRule" not in kinds
    assert "ServiceMonitor" in kinds
    (chart / "files").mkdir()
    alert = {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.job }}"}}
    rules = {"groups": [{"name": "a", "rules": [alert]}]}
    (chart / "files" / "rules.yaml").write_text(f"# Rules.\n{yaml.safe_dump(rules)}")
    (chart / "files" / "dashboard.json").write_text('{"title": "{{ a }}"}\n')
    objects = render(values, tmp_path, chart=chart)
    assert find(objects, "PrometheusRule")["spec"] == rules
    dashboard = find(objects, "ConfigMap", "dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"]["tightfit.json"].strip() == '{"title": "{{ a }}"}'


def test_autoscaling_goes_by_a_metric_that_there_is(tmp_path):
    (metric,) = find(render(values_of("HPA"), tmp_path), "HorizontalPodAutoscaler")["spec"][
        "metrics"
    ]
    name = metric["pods"]["metric"]["name"].removeprefix("tightfit_")
    assert f'"{name}"' in (ROOT / "cluster" / "metrics.py").read_text()


def test_a_manifest_with_a_key_twice_would_be_noticed():
    with pytest.raises(AssertionError, match="twice"):
        parse("kind: A\nmetadata: {name: a}\nspec: {a: 1, a: 2}\n")
