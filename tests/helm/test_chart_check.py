"""`make chart-check`: what it shows to checkov, and why some of its checks are left out."""

import re

import chart_check
import pytest
from chart import CHART, ROOT, helm_binary, pod_templates


@pytest.mark.parametrize("name", ["gpu.yaml", "everything.yaml", "cpu.yaml"])
def test_it_is_shown_the_pods_of_every_group_of_ray_as_pods(name):
    helm_binary(4)  # or skipped
    objects = chart_check.rendered(CHART / "ci" / name)
    groups = pod_templates([tree for tree in objects if tree["kind"] == "RayCluster"])
    shown = {tree["metadata"]["name"]: tree for tree in objects if tree["kind"] == "Pod"}
    assert len(groups) >= 2
    for where, template in groups.items():
        assert shown[where.split()[-1]]["spec"] == template["spec"]


def test_each_check_that_is_left_out_has_its_reason_in_the_documents():
    text = (ROOT / "docs" / "security.md").read_text()
    explained = re.findall(r"^\| (CKV_K8S_\d+)", text, re.MULTILINE)
    assert sorted(explained) == sorted(chart_check.NOT_FOLLOWED)
