"""From install to uninstall, by the real Helm, against an API server that only remembers."""

import json
import shlex
import subprocess

import pytest
from chart import CHART, EVERYTHING, MAJORS, document, helm_binary, nested, over
from kube_api import KubeApi

pytestmark = pytest.mark.slow
VALUES, COMMANDS = document()
HOOK = ["ConfigMap tightfit-plan-check", "Job tightfit-plan-check"]


@pytest.fixture(params=MAJORS, name="helm")
def _helm(request, tmp_path):
    """Runs a helm command against an API server; `helm.api` is the server."""
    with KubeApi(tmp_path, log_of=lambda pod: " Paris.\n") as api:

        def helm(*arguments, values=VALUES):
            (tmp_path / "values.yaml").write_text(json.dumps(values))
            return subprocess.run(
                [helm_binary(request.param), *arguments],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
                env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "KUBECONFIG": api.kubeconfig},
            )

        (tmp_path / "helm").symlink_to(CHART.parent)
        helm.api = api
        yield helm


def command(verb):
    """The document's first command of a verb of helm."""
    line = next(line for line in COMMANDS if line.startswith(f"helm {verb} "))
    return shlex.split(line)[1:]


def test_the_documents_commands_install_ask_change_and_remove(helm):
    installed = helm(*command("install"))
    assert installed.returncode == 0, installed.stderr
    created = helm.api.created()
    assert created[:2] == HOOK  # before anything else
    assert {"RayCluster tightfit", "Deployment tightfit-gateway"} < set(created[2:])
    assert "helm test tightfit --namespace llm --logs" in installed.stdout

    asked = helm(*command("test"))
    assert asked.returncode == 0, asked.stderr
    assert "Paris" in asked.stdout

    changed = over(VALUES, nested("gateway.drainSeconds", 77))
    upgraded = helm(*command("upgrade"), values=changed)
    assert upgraded.returncode == 0, upgraded.stderr
    assert grace(helm.api) == 77 + 10 + 15 + 30
    rolled_back = helm(*command("rollback"))
    assert rolled_back.returncode == 0, rolled_back.stderr
    assert grace(helm.api) == 120 + 10 + 15 + 30

    removed = helm(*command("uninstall"))
    assert removed.returncode == 0, removed.stderr
    # The checkpoints stay, and what the last test said.
    kept = {"PersistentVolumeClaim tightfit-models", "Pod tightfit-test-prompt"}
    assert helm.api.there() == kept


def grace(api):
    deployment = api.objects["deployments", "tightfit-gateway"]
    return deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_pools_that_are_too_small_stop_an_install_before_anything_is_created(helm):
    helm.api.job_ends = lambda job: not job["metadata"]["name"].endswith("plan-check")
    done = helm(*command("install"))
    assert done.returncode != 0
    assert "pre-install" in done.stderr
    assert helm.api.created() == HOOK
    assert "Job tightfit-plan-check" in helm.api.there()  # to be read
    assert helm.api.there() <= set(HOOK)


def test_pools_that_are_too_small_stop_an_upgrade_before_anything_changes(helm):
    assert helm(*command("install")).returncode == 0
    before = json.dumps(helm.api.objects["rayclusters", "tightfit"])
    helm.api.job_ends = lambda job: not job["metadata"]["name"].endswith("plan-check")
    changed = over(VALUES, nested("pools.cards.devices.count", 1))
    done = helm(*command("upgrade"), values=changed)
    assert done.returncode != 0
    assert json.dumps(helm.api.objects["rayclusters", "tightfit"]) == before
    helm.api.job_ends = lambda job: True
    again = helm(*command("upgrade"), values=changed)
    assert again.returncode == 0, again.stderr
    (group,) = helm.api.objects["rayclusters", "tightfit"]["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_other_settings_of_prepare_are_another_job(helm):
    assert helm(*command("install")).returncode == 0
    first = jobs(helm.api)
    changed = over(VALUES, {"prepare": {"quantize": {"format": "int3"}}})
    done = helm(*command("upgrade"), values=changed)
    assert done.returncode == 0, done.stderr
    assert len(first) == len(jobs(helm.api)) == 1
    assert first != jobs(helm.api)


def jobs(api):
    return {name for kind, name in api.objects if kind == "jobs" and "prepare" in name}


def test_everything_that_can_be_switched_on_is_installed_but_for_kinds_that_need_an_operator(helm):
    monitoring = {name: {"enabled": False} for name in ("serviceMonitor", "prometheusRule")}
    off = {
        "monitoring": monitoring,
        "gateway": {"autoscaling": {"enabled": False}, "grpcRoute": {"enabled": False}},
    }
    done = helm(*command("install"), values=over(EVERYTHING, off))
    assert done.returncode == 0, done.stderr
    assert "Ingress tightfit" in helm.api.there()
