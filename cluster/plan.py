"""The command `tightfit plan`: what a model takes of some devices, as table, YAML, JSON or picture.

Starts neither torch nor Ray: everything is computed from the model's config.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from tightfit.cluster.config import PlanConfig
from tightfit.cluster.config.chart import inventory_tree, read_values
from tightfit.cluster.errors import ConfigError, PlacementError
from tightfit.cluster.hub import download_config, parse_hub_name
from tightfit.cluster.planning.ask import plan_request
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.explain import explain, why_not
from tightfit.cluster.planning.inventory import (
    CONFIGS,
    Inventory,
    parse_inventory,
    read_inventory,
)
from tightfit.cluster.planning.picture import picture
from tightfit.cluster.planning.plan import Plan, dump_plan
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.replicas import make_replicas
from tightfit.cluster.planning.report import replica_lines, report
from tightfit.cluster.planning.request import PlanRequest
from tightfit.cluster.settings import as_mapping, read_yaml
from tightfit.cluster.simulation import Load, Simulation, Spread, simulate_plan
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.probing.result import LinkRate, NodeProbe


def plan(config: PlanConfig, *, output: str) -> int:
    """Print the best plan; returns the exit code.

    Args:
        config: what to plan.
        output: "table", "json", "yaml" or "svg".

    Raises:
        ConfigError: the model's config or the inventory cannot be used.
        PlacementError: the model does not fit; says what lacks and what would do.
    """
    if config.simulate is not None and output not in ("table", "json"):
        raise ConfigError(f"plan.simulate goes with the table and --json, not with --{output}")
    model = decoder_config(read_model_config(config.model))
    request = plan_request(config, model, _inventory(config))
    name = _model_name(config.model)
    solution = solve(request)
    if solution is None:
        raise PlacementError(why_not(name, request))
    found = make_plan(name, request, solution)
    replicas = None
    if config.num_replicas != 1:
        replicas = make_replicas(name, request, config.num_replicas, solution)
        found = replicas.plans[0]
    plans = (found,) if replicas is None else replicas.plans
    if output == "yaml":
        print("---\n".join(dump_plan(plan) for plan in plans), end="")
        return 0
    if output == "svg":
        print(picture(*plans), end="")
        return 0
    explanation = explain(request, solution, found)
    simulation = _simulation(config, request, found)
    if output == "json":
        tree = {
            "plan": dataclasses.asdict(found),
            "explanation": dataclasses.asdict(explanation),
            "dollars_per_hour": found.dollars_per_hour,
            "watts": found.watts,
            "kv_tokens": found.kv_tokens,
            "token_s": found.token_s,
            "tokens_per_s": found.tokens_per_s,
            "prefill_tokens_per_s": found.prefill_tokens_per_s,
            "replicas": None if replicas is None else dataclasses.asdict(replicas),
            "simulation": None if simulation is None else dataclasses.asdict(simulation),
        }
        print(json.dumps(tree, indent=1))
    else:
        print(report(request, found, explanation))
        if replicas is not None:
            print(replica_lines(replicas))
        if simulation is not None:
            print(simulation_line(simulation))
    return 0


def _simulation(config: PlanConfig, request: PlanRequest, found: Plan) -> Simulation | None:
    if config.load is None:
        return None
    load = Load(**config.load)
    return simulate_plan(found, load, max_context_tokens=request.model.max_position)


def simulation_line(simulation: Simulation) -> str:
    """For people, as the other lines of the table."""
    load, ttft, itl = simulation.load, simulation.ttft, simulation.itl
    number = f"{load.requests:,} requests on " if load.requests != load.streams else ""
    busy = ", ".join(f"{100 * share:.0f} %" for share in simulation.busy)
    return (
        f"simulated      {number}{load.streams:,} streams of {load.prompt:,} + {load.output:,} "
        f"tokens: {simulation.tokens_per_s:,.1f} tokens/s; first token after {_ms(ttft)}, then one "
        f"every {_ms(itl)}; stages busy {busy}"
    )


def _ms(times: Spread) -> str:
    return f"{1000 * times.mean_s:,.1f} ms (p99 {1000 * times.p99_s:,.1f})"


def read_model_config(model: str) -> Mapping[str, object]:
    """What a model's config.json says: of a directory, a hub, or one that comes with the package.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(model).expanduser()
    shipped = CONFIGS / "models" / f"{model}.yaml"
    if path.is_dir():
        path /= "config.json"
    elif path.suffix == ".gguf":
        raise ConfigError(
            f"{model}: plans are made from a config.json, which a GGUF file has none of. Give the "
            "directory or hub name of the model that it was made from"
        )
    elif path.is_file() and path.suffix not in (".json", ".yaml"):
        raise ConfigError(f"{model}: is a file, but neither .json nor .yaml")
    elif not path.exists():
        if shipped.exists():
            path = shipped
        elif name := parse_hub_name(model):
            path = download_config(name)
        else:
            known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
            raise ConfigError(f"{model}: no such directory, and not one of {known}")
    return as_mapping(_read_json(path) if path.suffix == ".json" else read_yaml(path), str(path))


def _read_json(path: Path) -> object:
    """Not as YAML, for which 1e-05 is text."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _model_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _inventory(config: PlanConfig) -> Inventory:
    """The devices that the plan may use: listed in a file, pools of the chart, or measured."""
    if config.live:
        return _measured(config)
    if config.values is not None:
        return _pools(config.values)
    name = config.inventory or ""
    path = Path(name).expanduser()
    shipped = CONFIGS / "inventories" / f"{name}.yaml"
    if not path.exists() and shipped.exists():
        path = shipped
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
        raise ConfigError(f"{name}: no such inventory; those that come with Tightfit: {known}")
    return read_inventory(path)


def _pools(paths: str) -> Inventory:
    tree = inventory_tree(read_values(paths))
    try:
        return parse_inventory(tree, paths)
    except ConfigError as error:  # in the words of the values
        names = [node["name"] for node in tree["nodes"]]
        said = str(error).replace(": types", ": deviceTypes")
        said = re.sub(r"(nodes\[\d+\])\.count", r"\1.nodes", said)
        said = re.sub(r"nodes\[(\d+)\]", lambda match: f"pools.{names[int(match[1])]}", said)
        raise ConfigError(said.replace(".devices[0]", ".devices")) from None


def _of_cluster(address: str, config: PlanConfig) -> tuple[list[NodeProbe], LinkRate | None]:
    """What the nodes of a Ray cluster measure of themselves, and the slowest link between them."""
    from tightfit.cluster import ray_environment

    ray_environment.prepare(is_private=False)
    from tightfit.cluster.nodes import alive_nodes, measure_nodes
    from tightfit.cluster.ray_session import RayOptions, RaySession

    session = RaySession(RayOptions(address=address, insecure=config.insecure_ray))
    try:
        return measure_nodes(alive_nodes(), config.device)
    finally:
        session.close()


def _measured(config: PlanConfig) -> Inventory:
    """Imports torch, or Ray, only now: planning by a file needs neither."""
    from tightfit.cluster.surroundings import live_inventory, probe_here

    if config.ray_address is None:
        probes, between = [probe_here(config.device)], None
    else:
        probes, between = _of_cluster(config.ray_address, config)
    return live_inventory(
        probes, config.device, between=between, cpu_budget_bytes=config.cpu_budget_bytes
    )
