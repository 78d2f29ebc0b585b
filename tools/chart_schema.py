"""Writes the settings of serve, plan and quantize into the schema of the Helm chart's values.

`python tools/chart_schema.py` renews helm/tightfit/values.schema.json, `--check` fails when it is
not what the settings say. The rest of that file is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tightfit.cluster.config import PlanConfig, QuantizeConfig, ServeConfig
from tightfit.cluster.settings import Setting, settings

SCHEMA = Path(__file__).resolve().parent.parent / "helm" / "tightfit" / "values.schema.json"
SECTIONS = {"serve": ServeConfig, "plan": PlanConfig, "quantize": QuantizeConfig}
OF_THE_CHART = {
    "serve": {
        "device", "listen", "metrics_listen", "health_listen", "live_listen", "tls_cert",
        "tls_key", "tls_client_ca", "tokens_file", "insecure_listen", "insecure_ray", "ray_address",
        "ray_join", "drain_grace_s",
    },
    "plan": {
        "model", "inventory", "values", "replicas", "live", "ray_address", "insecure_ray", "device",
        "cpu_budget", "block_size", "max_batch_tokens", "head_format", "embedding_place",
    },
}  # fmt: skip
"""What the chart decides by values of its own, so that `serve`, `plan` and `quantize` may not."""
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
SIZE = r"^\s*[0-9]+(\.[0-9]+)?\s*[kKmMgGtT]?[iI]?[bB]?\s*$"


def schema_of(setting: Setting) -> dict[str, object]:
    """Of one setting: type, range, choices; that a text can be read is checked by the command."""
    option = setting.option
    found: dict[str, object] = {"description": option.help, "type": TYPES[setting.kind]}
    if option.is_size:
        found |= {"type": ["integer", "string"], "pattern": SIZE}
    if option.choices:
        found["enum"] = list(option.choices)
    if option.at_least is not None:
        found["minimum"] = option.at_least
    if option.at_most is not None:
        found["maximum"] = option.at_most
    return found


def section_schema(name: str) -> dict[str, object]:
    """Of a section of the values."""
    taken = OF_THE_CHART.get(name, set())
    return {
        "description": f"Settings of `tightfit {name}`.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            setting.key: schema_of(setting)
            for setting in settings(SECTIONS[name])
            if setting.key not in taken
        },
    }


def renewed(text: str) -> str:
    """The schema's file with these sections as they are now."""
    tree = json.loads(text)
    for name in SECTIONS:
        tree["definitions"][name] = section_schema(name)
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write, or with --check compare."""
    before = SCHEMA.read_text()
    after = renewed(before)
    if arguments == ["--check"]:
        if before != after:
            print(f"{SCHEMA} is out of date: run make chart", file=sys.stderr)
        return int(before != after)
    SCHEMA.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
