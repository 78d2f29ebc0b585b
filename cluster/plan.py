"""The command `tightfit plan`: what a model takes of some devices, as table, YAML, JSON or picture.

Starts neither torch nor Ray: everything is computed from the model's config.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from tightfit.cluster.config import PlanConfig
from tightfit.cluster.errors import ConfigError, PlacementError
from tightfit.cluster.hub import download_config, parse_hub_name
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.explain import explain, why_not
from tightfit.cluster.planning.inventory import CONFIGS, Inventory, read_inventory
from tightfit.cluster.planning.memory import Reserve
from tightfit.cluster.planning.picture import picture
from tightfit.cluster.planning.plan import dump_plan
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.report import report
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.planning.sensitive import with_best_mix
from tightfit.cluster.settings import as_mapping, read_yaml
from tightfit.kernels.formats import Format
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import AUTO
from tightfit.workers.sensitivity import load_sensitivities

DEFAULT_CONTEXT = 2048


def plan(config: PlanConfig, *, output: str) -> int:
    """Print the best plan; returns the exit code.

    Args:
        config: what to plan.
        output: "table", "json", "yaml" or "svg".

    Raises:
        ConfigError: the model's config or the inventory cannot be used.
        PlacementError: the model does not fit; says what lacks and what would do.
    """
    request = plan_request(config)
    name = _model_name(config.model)
    solution = solve(request)
    if solution is None:
        raise PlacementError(why_not(name, request))
    found = make_plan(name, request, solution)
    if output == "yaml":
        print(dump_plan(found), end="")
        return 0
    if output == "svg":
        print(picture(found), end="")
        return 0
    explanation = explain(request, solution, found)
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
        }
        print(json.dumps(tree, indent=1))
    else:
        print(report(request, found, explanation))
    return 0


def plan_request(config: PlanConfig) -> PlanRequest:
    """What the planner is asked.

    Raises:
        ConfigError, PlacementError: see `plan`.
    """
    model = decoder_config(read_model_config(config.model))
    places = ("host", "device") if config.embedding_place == AUTO else (config.embedding_place,)
    default = (AUTO,) if model.stored is not None else (str(Format.INT4), str(Format.INT8))
    request = PlanRequest(
        model=model,
        inventory=_inventory(config),
        sequences=config.sequences,
        context=config.context or min(DEFAULT_CONTEXT, model.max_position),
        formats=config.format_names or default,
        is_mixed=config.mixed,
        head_format=config.head_format,
        kv_formats=config.kv_format_names,
        embedding_places=places,
        min_bits=config.min_bits,
        spare=Spare(config.spare),
        objective=Objective(config.objective),
        max_devices=config.max_devices,
        max_dollars=config.max_cost,
        exclude=config.excluded,
        same_node=config.same_node,
        pins=config.pinned,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
    )
    if config.sensitivity is None:
        return request
    return with_best_mix(request, load_sensitivities(Path(config.sensitivity)), config.max_loss)


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
    name = config.inventory or ""
    path = Path(name).expanduser()
    shipped = CONFIGS / "inventories" / f"{name}.yaml"
    if not path.exists() and shipped.exists():
        path = shipped
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
        raise ConfigError(f"{name}: no such inventory; those that come with Tightfit: {known}")
    inventory = read_inventory(path)
    if config.reserve is None:
        return inventory
    return dataclasses.replace(inventory, reserve=Reserve(config.reserve))
