"""Validates objects as an API server would: against the schemas of Kubernetes and of the operators.

Core kinds by the OpenAPI documents in `kubernetes-validate`, strictly. RayCluster by KubeRay's own
CRD, where a copy lies beside the project (shared/crds). Kinds of the Prometheus operator and of
KEDA by the models that `cloudcoil` generates from their CRDs. The Gateway API's GRPCRoute by its
types, where npm can fetch them.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import gateway_api
import jsonschema
import kubernetes_validate
import referencing
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus

VERSIONS = ("1.27", "1.31", "1.37")
"""Of Kubernetes: the oldest that the chart allows, and newer ones."""
OPERATORS = {
    "PrometheusRule": prometheus.PrometheusRule,
    "ScaledObject": keda.ScaledObject,
    "ServiceMonitor": prometheus.ServiceMonitor,
}
"""Models of the operators' kinds."""


def crds() -> Path | None:
    """Directory of KubeRay's CRDs, beside the project or above."""
    found = (parent / "shared" / "crds" for parent in Path(__file__).resolve().parents)
    return next((path for path in found if path.is_dir()), None)


def validate(tree: dict[str, Any]) -> str:
    """Check one object; returns by what.

    Raises:
        Exception: it does not fit its schema, or nothing is known of its kind.
    """
    return _validate(json.dumps(tree))


@functools.cache  # most objects are the same in most renderings
def _validate(text: str) -> str:
    tree = json.loads(text)
    kind = tree["kind"]
    if kind == "RayCluster":
        if crds() is None:
            return "nothing: no copy of KubeRay's CRD lies beside the project"
        ray_cluster_validator().validate(
            _with_defaults(_without_nulls(tree), _ray_cluster_schema())
        )
        return "KubeRay's CRD"
    if kind in OPERATORS:
        model = OPERATORS[kind].model_validate(tree)
        # The models let unknown fields pass, and drop them.
        kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert kept["spec"] == tree["spec"], "a field that the operator does not know"
        return "the operator's models"
    if kind == "GRPCRoute":
        try:
            route = _route_validator()
        except gateway_api.NoGatewayApiError as error:
            return f"nothing: {error}"
        route.validate(tree["spec"])
        return "the Gateway API's types"
    for version in VERSIONS:
        _kubernetes_validator(version, kind, tree["apiVersion"]).validate(tree)
    return "Kubernetes"


@functools.cache  # a version's definitions are megabytes
def _kubernetes_definitions(version: str) -> tuple[Path, referencing.Registry]:
    """Directory of a version's schemas, in which unknown fields are errors, and what they share."""
    place = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    (directory,) = place.glob(f"v{version}.*-local-strict")
    shared = json.loads((directory / "_definitions.json").read_text())
    return directory, referencing.Resource.from_contents(shared) @ referencing.Registry()


@functools.cache
def _kubernetes_validator(
    version: str, kind: str, api_version: str
) -> jsonschema.Draft202012Validator:
    directory, registry = _kubernetes_definitions(version)
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)  # as the files are called
    schema = json.loads((directory / f"{kind.lower()}-{group}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def _route_validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(gateway_api.schema("GRPCRouteSpec"))


@functools.cache
def _ray_cluster_schema() -> dict[str, Any]:
    directory = crds()
    assert directory is not None
    tree = yaml.load((directory / "ray.io_rayclusters.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = (v for v in tree["spec"]["versions"] if v["name"] == "v1")
    return _strict(version["schema"]["openAPIV3Schema"], is_root=True)


@functools.cache
def ray_cluster_validator() -> jsonschema.Draft7Validator:
    """Of the RayCluster's CRD."""
    return jsonschema.Draft7Validator(_ray_cluster_schema())


def _strict(schema: dict[str, Any], *, is_root: bool = False) -> dict[str, Any]:
    """A structural schema as JSON Schema: unknown fields are errors, as with strict validation."""
    found = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        found["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if is_root:
            found["properties"]["metadata"] = {"type": "object"}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found[key] = _strict(schema[key])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in found and not schema.get("x-kubernetes-int-or-string"):
            found[key] = [_strict(part) for part in schema[key]]
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Defaults are applied before what is required is looked for."""
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        filled = {key: field["default"] for key, field in fields.items() if "default" in field}
        filled |= value
        other = schema.get("additionalProperties")
        other = other if isinstance(other, dict) else {}
        return {key: _with_defaults(entry, fields.get(key, other)) for key, entry in filled.items()}
    if isinstance(value, list):
        return [_with_defaults(entry, schema.get("items", {})) for entry in value]
    return value
