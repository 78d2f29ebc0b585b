"""The Job that runs before an install: what it says when the pools do, and do not, hold a model."""

import pods
import pytest
from chart import BASE, nested, over, pod_templates, render

pytestmark = pytest.mark.skipif(pods.why_not() is not None, reason=str(pods.why_not()))
OPT = {"planCheck": {"model": "opt-175b"}, "serve": {"model": "/models/opt", "format": "int4"}}


def run_check(values, tmp_path):
    """Exit code and output of the hook's pod."""
    objects = render(over(BASE, OPT, values), tmp_path)
    with pods.Node(tmp_path, objects, secrets={}, claims={}) as node:
        pod = node.start("check", pod_templates(objects)["Job r-tightfit-plan-check"])
        return pod.wait(60), pod.output


def test_pools_that_hold_the_model_pass(tmp_path):
    code, output = run_check({}, tmp_path)
    assert code == 0, output
    assert output.startswith("opt-175b on 2 × a100-80")


def test_pools_that_are_too_small_fail_with_the_planners_explanation(tmp_path):
    small = {"pools": {"big": {"devices": {"type": "l4", "count": 4}}}}
    code, output = run_check(small, tmp_path)
    assert code == 1
    assert output.startswith("tightfit plan: opt-175b does not fit: all 4 devices hold at most")
    assert "It would fit with" in output
    assert output.count("\n") == 1  # all of it is the termination message


def test_a_failed_check_is_not_tried_again_and_stays_to_be_read(tmp_path):
    objects = render(over(BASE, OPT), tmp_path)
    (job,) = (tree for tree in objects if tree["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    annotations = job["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert "hook-failed" not in annotations["helm.sh/hook-delete-policy"]


def test_the_hubs_token_is_a_file_that_the_hubs_library_reads(tmp_path):
    objects = render(over(BASE, OPT, {"hub": {"existingSecret": "hub", "key": "mine"}}), tmp_path)
    template = pod_templates(objects)["Job r-tightfit-plan-check"]
    ask = ["python", "-c", "from huggingface_hub import get_token; print(get_token())"]
    with pods.Node(tmp_path, objects, secrets={"hub": {"mine": "hf_1\n"}}, claims={}) as node:
        pod = node.start("check", template, command=ask)
        assert pod.wait(60) == 0, pod.output
        assert pod.output == "hf_1\n"
        assert "hf_1" not in str(pod.environment())


def test_an_existing_claims_checkpoint_is_read_where_it_lies(tmp_path):
    values = {"models": {"existingClaim": "m"}, "serve": {"model": "/models/x"}}
    template = pod_templates(render(over(BASE, values), tmp_path))["Job r-tightfit-plan-check"]
    (container,) = template["spec"]["containers"]
    assert "/models" in [mount["mountPath"] for mount in container["volumeMounts"]]
    without = pod_templates(render(over(BASE, nested("gateway.replicas", 0)), tmp_path))
    (container,) = without["Job r-tightfit-plan-check"]["spec"]["containers"]
    assert "/models" not in [mount["mountPath"] for mount in container["volumeMounts"]]
