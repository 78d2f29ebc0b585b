"""Has checkov look for what is insecure in the objects of the Helm chart: `make chart-check`.

It looks at what each file of values in helm/tightfit/ci renders. It does not know a RayCluster,
so the pods of its groups are shown to it as pods. As it comes with a hundred packages it is not
part of CI, and gets an environment of its own, below build/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from helm_wheels import helm

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "tightfit"
CHECKOV = "checkov==3.3.30"
NOT_FOLLOWED = ("CKV_K8S_8", "CKV_K8S_9", "CKV_K8S_15", "CKV_K8S_43")
"""Checks that say something else than is meant here; why is in docs/security.md."""


def rendered(values: Path) -> list[dict[str, Any]]:
    """The objects of an install with these values, and a Pod for each of Ray's groups."""
    command = [helm(4), "template", "r", CHART, "--namespace", "llm", "--values", values]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    objects = [tree for tree in yaml.safe_load_all(done.stdout) if tree]
    for tree in objects:
        tree["metadata"]["namespace"] = "llm"  # where Helm puts them
    return [*objects, *(pod for tree in objects for pod in ray_pods(tree))]


def ray_pods(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods that KubeRay makes of a RayCluster, one of each group; of others none."""
    if tree["kind"] != "RayCluster":
        return
    head, workers = tree["spec"]["headGroupSpec"], tree["spec"]["workerGroupSpecs"]
    for name, group in (("head", head), *((g["groupName"], g) for g in workers)):
        template = group["template"]
        metadata = {**template["metadata"], "name": name, "namespace": "llm"}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def checkov() -> Path:
    """The program, fetched if need be."""
    place = ROOT / "build" / CHECKOV
    program = place / "bin" / "checkov"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, CHECKOV], check=True)
    return program


def main() -> int:
    """Exit code: 1 if something is found."""
    with tempfile.TemporaryDirectory() as directory:
        for values in sorted((CHART / "ci").glob("*.yaml")):
            manifest = yaml.safe_dump_all(rendered(values))
            (Path(directory) / values.name).write_text(manifest)
        command = [
            checkov(), "--directory", directory, "--framework", "kubernetes", "--quiet",
            "--compact", "--skip-download", "--skip-check", ",".join(NOT_FOLLOWED),
        ]  # fmt: skip
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
