"""Configuration: frozen dataclasses from one YAML file, command-line flags over it.

The file has a section per part: `serve` for the service, `client` for the commands that talk to
one. A new setting is one field in the file of its section.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.cluster.config.addresses import split_address
from tightfit.cluster.config.chart import num_replicas, read_values, section
from tightfit.cluster.config.client import ClientConfig
from tightfit.cluster.config.plan import PlanConfig
from tightfit.cluster.config.probe import ProbeConfig
from tightfit.cluster.config.quantize import QuantizeConfig
from tightfit.cluster.config.serve import ServeConfig
from tightfit.cluster.config.token import TokenConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import Values, build, read_file
from tightfit.workers.model_formats import AUTO

__all__ = [
    "ClientConfig",
    "PlanConfig",
    "ProbeConfig",
    "QuantizeConfig",
    "ServeConfig",
    "TokenConfig",
    "client_config",
    "plan_config",
    "probe_config",
    "quantize_config",
    "read_config_file",
    "serve_config",
    "split_address",
    "start_plan_config",
    "token_config",
]

SECTIONS: Mapping[str, type[Any]] = {
    "serve": ServeConfig,
    "client": ClientConfig,
    "quantize": QuantizeConfig,
    "plan": PlanConfig,
    "probe": ProbeConfig,
    "token": TokenConfig,
}


def read_config_file(path: Path) -> dict[str, dict[str, object]]:
    """Sections of a YAML file, every key known, no value checked yet.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has an unknown or repeated key.
    """
    return read_file(path, SECTIONS)


def serve_config(file: Mapping[str, Values], flags: Values | None = None) -> ServeConfig:
    """The service's configuration: `flags` (by key) over the file's `serve` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(ServeConfig, "serve", {**file.get("serve", {}), **(flags or {})})


def start_plan_config(file: Mapping[str, Values], serve: ServeConfig) -> PlanConfig:
    """What a service plans at its start: by the file's `plan` section, for the service's model and
    the devices that are there.

    Raises:
        ConfigError: see `build`; or the section says what is the service's to say.
    """
    devices = {"live": True, "device": serve.device, "cpu_budget": serve.memory_budget_bytes}
    config = build(PlanConfig, "plan", _as_served(file.get("plan", {}), serve, devices))
    if config.num_replicas != 1:
        raise ConfigError(
            f"plan.replicas: {config.replicas} are planned, and a service is one pipeline: leave "
            "it out, and start a service for each plan that `tightfit plan --replicas` writes"
        )
    return config


def _as_served(section: Values, serve: ServeConfig, devices: Values) -> dict[str, object]:
    """Settings of a plan for what `serve` says, on `devices`, where the section leaves them open.

    Raises:
        ConfigError: the section says what is the service's to say.
    """
    ours: dict[str, object] = {
        "model": serve.model,
        **devices,
        "block_size": serve.block_size,
        "max_batch_tokens": serve.max_batch_tokens,
        "head_format": serve.head_format,
        "embedding_place": serve.embedding_place,
    }
    if serve.format != AUTO:
        ours["formats"] = serve.format
    if serve.kv_format != AUTO:
        ours["kv_formats"] = serve.kv_format
    for key in (*ours, "inventory", "ray_address"):
        if key in section and section[key] != ours.get(key):
            raise ConfigError(
                f"plan.{key}: a service plans its own model on the devices that it finds, by "
                "serve's settings: leave it out of the section plan, or set it in serve"
            )
    if section.keys().isdisjoint(("formats", "mixed", "sensitivity", "min_bits")):
        ours.setdefault("formats", AUTO)
    if "kv_formats" not in section:
        ours.setdefault("kv_formats", AUTO)
    return {**section, **ours}


def _of_chart(paths: str) -> dict[str, object]:
    """Settings of a plan for what the Helm chart would install with these values.

    Raises:
        ConfigError: see `build`.
    """
    try:
        values = read_values(paths)
    except ConfigError as error:
        raise ConfigError(f"plan.values: {error}") from error
    check = section(values, "planCheck")
    serve = build(ServeConfig, "serve", {"model": "", **section(values, "serve")})
    model = check.get("model") or serve.model
    if not model:
        raise ConfigError("serve.model is missing. It is: what is to be served")
    if serve.stages is not None and serve.embedding_place == AUTO:
        serve = dataclasses.replace(serve, embedding_place="device")
    devices: dict[str, object] = {"values": paths, "replicas": str(num_replicas(values))}
    if serve.stages is not None:
        devices["max_devices"] = serve.stages
    return {**_as_served(section(values, "plan"), serve, devices), "model": model}


def client_config(file: Mapping[str, Values], flags: Values | None = None) -> ClientConfig:
    """The client's configuration; without a target, the same file's service.

    Raises:
        ConfigError: see `build`.
    """
    values = {**file.get("client", {}), **(flags or {})}
    listen = file.get("serve", {}).get("listen")
    if "target" not in values and listen is not None:
        values["target"] = re.sub(r"^(0\.0\.0\.0|\[::\]):", "127.0.0.1:", str(listen))
    return build(ClientConfig, "client", values)


def quantize_config(file: Mapping[str, Values], flags: Values | None = None) -> QuantizeConfig:
    """What to quantise: `flags` (by key) over the file's `quantize` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(QuantizeConfig, "quantize", {**file.get("quantize", {}), **(flags or {})})


def plan_config(file: Mapping[str, Values], flags: Values | None = None) -> PlanConfig:
    """What to plan: `flags` (by key) over the file's `plan` section, and both over the chart's
    values, if they name any.

    Raises:
        ConfigError: see `build`.
    """
    given = {**file.get("plan", {}), **(flags or {})}
    if isinstance(values := given.get("values"), str):
        given = {**_of_chart(values), **given}
    return build(PlanConfig, "plan", given)


def probe_config(file: Mapping[str, Values], flags: Values | None = None) -> ProbeConfig:
    """What to probe: `flags` (by key) over the file's `probe` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(ProbeConfig, "probe", {**file.get("probe", {}), **(flags or {})})


def token_config(file: Mapping[str, Values], flags: Values | None = None) -> TokenConfig:
    """Which tokens: `flags` (by key) over the file's `token` section; without a file of tokens,
    the same file's service's.

    Raises:
        ConfigError: see `build`.
    """
    values = {**file.get("token", {}), **(flags or {})}
    tokens_file = file.get("serve", {}).get("tokens_file")
    if "tokens_file" not in values and tokens_file is not None:
        values["tokens_file"] = tokens_file
    return build(TokenConfig, "token", values)
