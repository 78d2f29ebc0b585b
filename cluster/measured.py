"""An inventory out of what nodes have measured of themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tightfit.kernels.formats import Format
from tightfit.workers.probing.result import DeviceProbe, DeviceRates, LinkRate, NodeProbe

ROUNDED_TO: Final = 2**20
"""Free memory is rounded down to this, so that GPUs that nobody uses are alike to the planner."""


def inventory_tree(
    nodes: Sequence[NodeProbe],
    planned_bytes: Callable[[DeviceProbe], int],
    between: LinkRate | None = None,
) -> dict[str, object]:
    """What `cluster.planning.inventory` reads. GPUs come first, so that `node:0` is its cuda:0.

    Devices of one name are one type, with the slowest one's rates. What could not be measured is
    left out, as nothing is known that a plan could go by; so are nodes that have nothing else.

    Args:
        nodes: of names that differ.
        planned_bytes: of a device, what a plan may take.
        between: from a host to another, where it was measured.
    """
    alike: dict[str, list[tuple[DeviceProbe, DeviceRates]]] = {}
    tree = []
    hops = []
    for node in nodes:
        lots = []
        for device, rates in measured_devices(node):
            alike.setdefault(_type_name(device), []).append((device, rates))
            lots.append(_lot(device, planned_bytes(device)))
        if lots:
            names = [device.device for device, _ in measured_devices(node)]
            link = _hop(node.links, names)
            tree.append({"name": node.node, **({"link": link} if link else {}), "devices": lots})
            if between is not None:
                hops.append(
                    _hop([*node.links, replace(between, source="cpu", target="cpu")], names)
                )
    found: dict[str, object] = {name: _type(same) for name, same in alike.items()}
    known = [hop for hop in hops if hop is not None]
    slowest = {"between_nodes": max(known, key=lambda hop: hop["latency_us"])} if known else {}
    return {"types": found, **slowest, "nodes": tree}


def measured_devices(node: NodeProbe) -> list[tuple[DeviceProbe, DeviceRates]]:
    """Those of a node that have rates, GPUs first."""
    found = [(device, device.rates) for device in node.devices if device.rates is not None]
    return sorted(found, key=lambda pair: pair[0].kind == "cpu")


def _lot(device: DeviceProbe, planned_bytes: int) -> dict[str, object]:
    fields: dict[str, object] = {
        "type": _type_name(device),
        "total": device.memory.total_bytes,
        "free": planned_bytes,
    }
    if device.uuid is not None:
        fields["uuid"] = device.uuid
    return fields


def _type(same: Sequence[tuple[DeviceProbe, DeviceRates]]) -> dict[str, object]:
    """Devices of one name. Rates of arithmetic are the format's highest, in tera-operations."""
    first, all_rates = same[0][0], [rates for _, rates in same]
    fields: dict[str, object] = {
        "kind": first.kind,
        "memory": min(device.memory.total_bytes for device, _ in same),
        "gb_per_s": max(1, round(min(rates.read_bytes_per_s for rates in all_rates) / 1e9)),
        "fp16_tflops": _tera(min(rates.best(Format.BF16).ops_per_s for rates in all_rates)),
        "int8_tops": _tera(min(rates.best(Format.LLM_INT8).ops_per_s for rates in all_rates)),
        "price": 0.0,
        "watts": 0.0,
        "rates": _format_rates(all_rates),
    }
    if first.capability is not None:
        fields["capability"] = float(first.capability)
    return fields


def _format_rates(all_rates: Sequence[DeviceRates]) -> dict[str, dict[int, float]]:
    """Format → tokens → GB of weights a second, the slowest device's."""
    found: dict[str, dict[int, float]] = {}
    for linear in (linear for rates in all_rates for linear in rates.linears):
        by_tokens = found.setdefault(str(linear.format), {})
        rate = _giga(linear.bytes_per_s)
        by_tokens[linear.tokens] = min(rate, by_tokens.get(linear.tokens, rate))
    return found


def _hop(links: Sequence[LinkRate], devices: Sequence[str]) -> dict[str, float] | None:
    """From one stage to the next on a node, as an inventory has it; None: not all was measured.

    Hidden states of a GPU go to the host, from one process to the other, and to the other GPU; of
    several GPUs the slowest counts.
    """
    known = {(link.source, link.target): link for link in links}
    gpus = [device for device in devices if device != "cpu"]
    steps = [[("cpu", "cpu")]]
    if gpus:
        steps += [[(gpu, "cpu") for gpu in gpus], [("cpu", gpu) for gpu in gpus]]
    if not all(pair in known for pairs in steps for pair in pairs):
        return None
    way = [[known[pair] for pair in pairs] for pairs in steps]
    latency_s = sum(max(link.empty_latency_s for link in step) for step in way)
    s_per_byte = sum(max(1 / link.bytes_per_s for link in step) for step in way)
    return {"latency_us": round(1e6 * latency_s, 1), "gb_per_s": _giga(1 / s_per_byte)}


def _giga(per_s: float) -> float:
    """To four digits."""
    return max(1e-6, float(f"{per_s / 1e9:.4g}"))


def _tera(per_s: float) -> float:
    return max(0.001, round(per_s / 1e12, 3))


def _type_name(device: DeviceProbe) -> str:
    """Such as `measured-nvidia-l4`, which no type by its data sheet is called."""
    words = re.findall(r"[a-z0-9]+", device.name.lower()) or [device.kind]
    return "-".join(["measured", *words])
