"""What every pod of the chart keeps to, whatever the values."""

import json
import re

import pytest
import yaml
from chart import BASE, CHART, EVERYTHING, containers, find, nested, over, pod_templates, render

INSECURE = {
    "gateway": {"insecure": True, "tls": {"existingSecret": ""}, "auth": {"existingSecret": ""}}
}
SETS = {"base": BASE, "everything": EVERYTHING, "insecure": over(BASE, INSECURE)}
LONG_LIVED = ("Deployment", "head", "worker")


@pytest.fixture(params=SETS, name="objects")
def _objects(request, tmp_path):
    return render(SETS[request.param], tmp_path)


def test_every_container_has_requests_and_limits(objects):
    assert len(containers(objects)) >= 4
    for where, container in containers(objects).items():
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["limits"]) & set(resources["requests"]), where


def test_every_container_that_stays_has_all_three_probes(objects):
    stay = {
        f"{where}: {container['name']}": container
        for where, pod in pod_templates(objects).items()
        if where.split()[0] in LONG_LIVED
        for container in pod["spec"]["containers"]
    }
    assert len(stay) >= 3
    for where, container in stay.items():
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), where


def test_no_container_is_root_or_privileged_or_writes_to_its_image(objects):
    for where, container in containers(objects).items():
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True, where
        assert context["runAsUser"] >= 1, where
        assert context["allowPrivilegeEscalation"] is context["privileged"] is False, where
        assert context["readOnlyRootFilesystem"] is True, where
        assert context["capabilities"] == {"drop": ["ALL"]}, where
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where


def test_no_pod_talks_to_the_kubernetes_api_or_shares_a_namespace_of_the_host(objects):
    for where, pod in pod_templates(objects).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where


def test_every_image_is_pinned(objects):
    for where, container in containers(objects).items():
        assert re.search(r"(:(?!latest)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), where


def test_what_is_written_is_a_volume(objects):
    for where, container in containers(objects).items():
        writable = {
            mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
        }
        if "wait-for-checkpoint" not in where:
            assert {"/tmp", "/home/tightfit"} <= writable, where


def test_secrets_are_files_that_are_only_read_and_no_variables(objects):
    num_secrets = 0
    for where, pod in pod_templates(objects).items():
        secrets = {v["name"] for v in pod["spec"]["volumes"] if "secret" in v}
        modes = {v["secret"]["defaultMode"] for v in pod["spec"]["volumes"] if "secret" in v}
        assert modes <= {0o440}, where
        (container,) = pod["spec"]["containers"]
        mounted = {m["name"]: m.get("readOnly") for m in container["volumeMounts"]}
        assert all(mounted[name] is True for name in secrets), where
        num_secrets += len(secrets)
        for variable in container.get("env", []):
            assert "valueFrom" not in variable, where
            assert not re.search("(TOKEN|KEY|PASSWORD|SECRET)$", variable["name"]), where
    assert num_secrets >= 3


def test_secrets_are_named_and_never_written_out(objects):
    assert not [tree for tree in objects if tree["kind"] == "Secret"]
    configs = [tree for tree in objects if tree["kind"] == "ConfigMap"]
    assert not re.search(r"(?i)token:|password:|BEGIN .*PRIVATE", json.dumps(configs))


def test_ray_wants_its_token_on_every_node(objects):
    for where, container in containers(objects).items():
        if where.split(":")[0].split()[0] not in LONG_LIVED or "wait-for" in where:
            continue
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert variables["RAY_AUTH_MODE"] == "token", where
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        directory, _, file = variables["RAY_AUTH_TOKEN_PATH"].rpartition("/")
        volumes = pod_templates(objects)[where.split(": ")[0]]["spec"]["volumes"]
        (secret,) = (v["secret"] for v in volumes if v["name"] == mounts[directory])
        assert secret["secretName"] == "tightfit-ray"
        assert [item["path"] for item in secret["items"]] == [file]


def test_selectors_find_their_pods_and_no_others(objects):
    labels = {where: pod["metadata"]["labels"] for where, pod in pod_templates(objects).items()}

    def found(selector):
        return {
            where.split()[0]
            for where, has in labels.items()
            if selector.items() <= has.items()
        }  # fmt: skip

    for service in (tree for tree in objects if tree["kind"] == "Service"):
        assert found(service["spec"]["selector"]) == {"Deployment"}
    assert found(find(objects, "Deployment")["spec"]["selector"]["matchLabels"]) == {"Deployment"}
    budgets = {
        tree["metadata"]["name"].rpartition("-")[2]: found(tree["spec"]["selector"]["matchLabels"])
        for tree in objects
        if tree["kind"] == "PodDisruptionBudget"
    }
    assert budgets == {"gateway": {"Deployment"}, "worker": {"worker"}, "head": {"head"}}


def test_ports_that_services_and_policies_name_are_there(objects):
    (gateway,) = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"] for port in gateway["ports"]}
    targets = {
        port["targetPort"]
        for tree in objects
        if tree["kind"] == "Service"
        for port in tree["spec"]["ports"]
    }
    assert targets == ports - {"health"}
    rules = find(objects, "NetworkPolicy", "gateway")["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule.get("ports", [])} == ports


def allowed(policy):
    """Components that may connect by a policy's first rule, and whether it names ports."""
    (rule, *_) = policy["spec"]["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["podSelector"]["matchExpressions"]
    return set(expression["values"]), "ports" in rule


def test_only_gateways_and_the_pool_reach_the_pool(objects):
    policy = find(objects, "NetworkPolicy", "pool")
    assert set(policy["spec"]["podSelector"]["matchExpressions"][0]["values"]) == {"head", "worker"}
    assert len(policy["spec"]["ingress"]) == 1
    assert allowed(policy) == ({"head", "worker", "gateway"}, False)
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_clients_that_are_named_are_the_only_ones_and_helm_test_is_one(tmp_path):
    objects = render(EVERYTHING, tmp_path)
    rules = find(objects, "NetworkPolicy", "gateway")["spec"]["ingress"]
    (rule,) = (r for r in rules if r.get("ports", [{}])[0].get("port") == "grpc")
    ours, theirs = rule["from"]
    assert ours["podSelector"]["matchExpressions"][0]["values"] == ["test"]
    assert theirs == EVERYTHING["networkPolicy"]["clients"][0]


def traced(collectors, tmp_path):
    """Egress rules of the gateways' policy that traces of a service are the reason for."""
    values = over(
        BASE, nested("serve.trace_endpoint", "http://otel.a:4317"),
        nested("networkPolicy.collectors", collectors),
    )  # fmt: skip
    without = find(render(BASE, tmp_path), "NetworkPolicy", "gateway")["spec"]["egress"]
    objects = render(values, tmp_path)
    for others in ("pool", "jobs"):
        assert "4317" not in json.dumps(find(objects, "NetworkPolicy", others))
    rules = find(objects, "NetworkPolicy", "gateway")["spec"]["egress"]
    return [rule for rule in rules if rule not in without]


def test_only_gateways_reach_a_collector_and_only_at_its_port(tmp_path):
    assert traced([], tmp_path) == [{"ports": [{"protocol": "TCP", "port": 4317}]}]


def test_a_collector_that_is_named_is_the_only_one(tmp_path):
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "a"}}}
    (rule,) = traced([peer], tmp_path)
    assert rule == {"ports": [{"protocol": "TCP", "port": 4317}], "to": [peer]}


def test_a_gateway_logs_each_request_as_json_unless_the_values_say_otherwise(tmp_path):
    def logs(values):
        config = find(render(values, tmp_path), "ConfigMap", "tightfit")["data"]["tightfit.yaml"]
        serve = yaml.safe_load(config)["serve"]
        return serve.get("log_level"), serve.get("log_format")

    assert logs(BASE) == ("info", "json")
    assert logs(EVERYTHING) == ("debug", "text")
    assert logs(over(BASE, nested("serve.log_level", None))) == (None, "json")


def test_a_pod_has_more_time_to_end_than_its_drain_takes(objects):
    deployment = find(objects, "Deployment")["spec"]["template"]["spec"]
    config = yaml.safe_load(find(objects, "ConfigMap", "tightfit")["data"]["tightfit.yaml"])[
        "serve"
    ]
    (gateway,) = deployment["containers"]
    before = int(gateway["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = before + config["drain_grace_s"]
    assert deployment["terminationGracePeriodSeconds"] >= drain + 30
    for where, pod in pod_templates(objects).items():
        if where.split()[0] in ("head", "worker"):
            assert pod["spec"]["terminationGracePeriodSeconds"] > drain + 30, where
        if where.split()[0] == "worker":
            (worker,) = pod["spec"]["containers"]
            (waits,) = (v for v in worker["env"] if v["name"].endswith("DRAIN_TIMEOUT_S"))
            assert drain < int(waits["value"]) < pod["spec"]["terminationGracePeriodSeconds"]


def test_loading_may_take_more_than_an_hour_and_a_full_queue_restarts_nothing(objects):
    (gateway,) = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    startup = gateway["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 5400
    assert gateway["readinessProbe"]["grpc"]["service"] == "tightfit.v1.InferenceService"
    assert gateway["livenessProbe"]["grpc"]["service"] == "liveness"


def test_an_upgrade_does_not_wait_for_devices_that_the_old_pod_holds(objects):
    strategy = find(objects, "Deployment")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_rays_head_takes_no_stage_and_its_workers_count_their_devices(tmp_path):
    cluster = find(render(EVERYTHING, tmp_path), "RayCluster")["spec"]
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert head["num-cpus"] == head["num-gpus"] == "0"
    pools = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    big = pools["big"]["template"]["spec"]["containers"][0]["resources"]
    assert (pools["big"]["replicas"], pools["big"]["rayStartParams"]["num-gpus"]) == (2, "8")
    assert big["limits"] == {"cpu": 90, "memory": "900Gi", "rdma/hca": 1, "nvidia.com/gpu": 8}
    assert big["requests"] == {"cpu": 64, "memory": "900Gi", "nvidia.com/gpu": 8}
    odd = pools["odd"]["template"]["spec"]["containers"][0]["resources"]
    assert odd["limits"] == {"cpu": "16", "memory": "64Gi", "example.org/gpu": 4}


def test_the_chart_is_of_the_packages_version():
    from tightfit import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert "dependencies" not in chart
