"""The Helm chart's values, as far as a plan goes by them: pools of devices, and what is served.

Pools are an inventory in other words: a pool's name and `nodes` are a node's name and count, and
its `devices` are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import as_mapping, read_yaml


def read_values(paths: str) -> dict[str, object]:
    """What files hold, later ones over earlier ones, as Helm merges its `--values`.

    Args:
        paths: of the files, comma-separated.

    Raises:
        ConfigError: one cannot be read, or is not a mapping.
    """
    merged: dict[str, object] = {}
    for path in (word.strip() for word in paths.split(",")):
        merged = _over(merged, as_mapping(read_yaml(Path(path).expanduser()), path))
    return merged


def _over(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Mappings are merged key by key, null takes a key away, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _over(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def section(values: Mapping[str, object], name: str) -> dict[str, object]:
    """A mapping among the values; nothing at all is an empty one.

    Raises:
        ConfigError: it is something else.
    """
    return as_mapping(values.get(name), name)


def inventory_tree(values: Mapping[str, object]) -> dict[str, Any]:
    """The pools as the content of an inventory's file.

    Raises:
        ConfigError: there is none, or one lacks its devices.
    """
    pools = section(values, "pools")
    if not pools:
        raise ConfigError(
            "pools: empty; name one, such as {big: {nodes: 1, devices: {type: a100-80, count: 8}}}"
        )
    nodes = []
    for name, value in pools.items():
        pool = as_mapping(value, f"pools.{name}")
        if "devices" not in pool:
            raise ConfigError(f"pools.{name}.devices is missing. It is: what each node has")
        nodes.append({"name": name, "count": pool.get("nodes", 1), "devices": [pool["devices"]]})
    return {"types": section(values, "deviceTypes"), "nodes": nodes}


def num_replicas(values: Mapping[str, object]) -> int:
    """Replicas of the model that may run at once: a gateway each.

    Raises:
        ConfigError: it is not a number.
    """
    gateway = section(values, "gateway")
    scaling = as_mapping(gateway.get("autoscaling"), "gateway.autoscaling")
    path, found = "gateway.replicas", gateway.get("replicas", 1)
    if scaling.get("enabled") is True:
        path, found = "gateway.autoscaling.maxReplicas", scaling.get("maxReplicas", 1)
    if not isinstance(found, int):
        raise ConfigError(f"{path}: {found!r} is not a whole number")
    return max(1, found)
