"""The command `tightfit probe`: this node's devices, measured, as a table, JSON or inventory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml
from rich.console import Console
from rich.table import Table

from tightfit.cluster.config import ProbeConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.kernels.formats import Format
from tightfit.workers.probe import probe_node
from tightfit.workers.probing.cache import ProbeCache, cache_directory
from tightfit.workers.probing.loopback import SMALL_BYTES
from tightfit.workers.probing.result import (
    DeviceProbe,
    DeviceRates,
    LinearRate,
    LinkRate,
    NodeProbe,
    dump_probe,
)

WIDE_COLUMNS = 110
ROUNDED_TO: Final = 2**20
"""Free memory is rounded down to this, so that GPUs that nobody uses are alike to the planner."""
HEADER: Final = """\
# Written by `tightfit probe`: what was free on this node then, less a reserve, and measured rates.
# Prices (US dollars an hour) and watts are not measured: put in your own.
"""


def probe(config: ProbeConfig, *, as_json: bool = False) -> int:
    """Measure, print, and write the inventory that is asked for; returns the exit code.

    Raises:
        ConfigError: the budget or the reserve leaves nothing, or the inventory cannot be written.
        ProbeError: see `probe_node`.
    """
    found = probe_node(config.device, ProbeCache(cache_directory(), is_fresh=config.reprobe))
    if config.out is not None:
        _write(Path(config.out), inventory_text(found, config))
    if as_json:
        print(dump_probe(found))
    else:
        print_probe(found, Console(width=None if sys.stdout.isatty() else WIDE_COLUMNS))
    return 0


# -- inventory -------------------------------------------------------------------------------


def inventory_text(found: NodeProbe, config: ProbeConfig) -> str:
    """This node as `cluster.planning.inventory` reads it, GPUs first, so that `node:0` is cuda:0.

    Devices of one name are one type, with the slowest one's rates. What could not be measured is
    left out, as nothing is known that a plan could go by; a comment says so.

    Raises:
        ConfigError: no device is left, or one has less memory than the budget or reserve takes.
    """
    devices = [(device, device.rates) for device in found.devices if device.rates is not None]
    devices.sort(key=lambda pair: pair[0].kind == "cpu")
    if not devices:
        raise ConfigError(
            f"there is no device to write to {config.out}: {'; '.join(found.notes) or 'none found'}"
        )
    alike: dict[str, list[tuple[DeviceProbe, DeviceRates]]] = {}
    for device, rates in devices:
        alike.setdefault(_type_name(device), []).append((device, rates))
    lots = [
        {
            "type": _type_name(device),
            "total": device.memory.total_bytes,
            "free": _planned_bytes(device, config),
        }
        for device, _ in devices
    ]
    node: dict[str, object] = {"name": found.node, "devices": lots}
    if link := _hop(found.links, [device.device for device, _ in devices]):
        node["link"] = link
    tree = {"types": {name: _type(same) for name, same in alike.items()}, "nodes": [node]}
    comments = [
        f"# {found.node}:{number} is {device.device}: {device.uuid or device.name}\n"
        for number, (device, _) in enumerate(devices)
    ]
    comments += [f"# Note: {' '.join(note.split())}\n" for note in found.notes]
    return HEADER + "".join(comments) + yaml.safe_dump(tree, sort_keys=False, width=WIDE_COLUMNS)


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
        rate = max(1e-6, float(f"{linear.bytes_per_s / 1e9:.4g}"))
        by_tokens[linear.tokens] = min(rate, by_tokens.get(linear.tokens, rate))
    return found


def _hop(links: Sequence[LinkRate], devices: Sequence[str]) -> dict[str, float] | None:
    """From one stage to the next on this node, as an inventory has it; None: not all was measured.

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
    slowest = [[known[pair] for pair in pairs] for pairs in steps]
    s_per_byte = sum(max(1 / link.bytes_per_s for link in step) for step in slowest)
    # What was timed is a message of some bytes; what is written, of none.
    latency_s = sum(
        max(max(0.0, link.latency_s - SMALL_BYTES / link.bytes_per_s) for link in step)
        for step in slowest
    )
    return {
        "latency_us": round(1e6 * latency_s, 1),
        "gb_per_s": max(1e-6, float(f"{1 / s_per_byte / 1e9:.4g}")),
    }


def _tera(per_s: float) -> float:
    return max(0.001, round(per_s / 1e12, 3))


def _type_name(device: DeviceProbe) -> str:
    """Such as `measured-nvidia-l4`, which no type by its data sheet is called."""
    words = re.findall(r"[a-z0-9]+", device.name.lower()) or [device.kind]
    return "-".join(["measured", *words])


def _planned_bytes(device: DeviceProbe, config: ProbeConfig) -> int:
    """What a plan may take of a device: the declared share of a CPU's, else all but the reserve."""
    memory = device.memory
    reserve = config.reserve_bytes(memory.total_bytes)
    room = max(0, memory.free_bytes - reserve)
    share = room // ROUNDED_TO * ROUNDED_TO
    if device.kind == "cpu" and config.budget_bytes is not None:
        share = config.budget_bytes
    if share == 0 or share > room:
        wanted = f", less than the budget of {format_bytes(share)}" if share else ""
        raise ConfigError(
            f"{device.device} has {format_bytes(memory.free_bytes)} free (by {memory.bound_by}); "
            f"with {format_bytes(reserve)} in reserve {format_bytes(room)} are left{wanted}. Ask "
            "for less, or free some"
        )
    return share


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f"{path.name}.part")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(f"{path}: the inventory cannot be written: {error}") from error


# -- table -----------------------------------------------------------------------------------


def print_probe(found: NodeProbe, console: Console) -> None:
    """The result as a person reads it."""
    _say(console, f"{found.node}: probed in {format_seconds(found.elapsed_s)}")
    console.print(_device_table(found.devices))
    for device in found.devices:
        _say(console, f"{device.device}: what is free is by {device.memory.bound_by}")
    for device in found.devices:
        if device.rates is not None:
            _say(console, f"\n{device.device}: linear layers, read from memory")
            console.print(_rate_table(device.rates.linears))
    if found.links:
        _say(console, "\nlinks")
        console.print(_link_table(found.links))
    for note in found.notes:
        _say(console, f"note: {note}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[dict[str, str]], texts: Sequence[str]) -> Table:
    """Rows by column name; columns of `texts` are left-justified, and wrap where it is narrow."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in rows[0] if rows else ():
        is_text = name in texts
        table.add_column(name, no_wrap=not is_text, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _device_table(devices: Sequence[DeviceProbe]) -> Table:
    rows = []
    for device in devices:
        rates = device.rates
        rows.append(
            {
                "device": device.device,
                "name": device.name,
                "total": format_bytes(device.memory.total_bytes),
                "free": format_bytes(device.memory.free_bytes),
                "read": _giga(rates.read_bytes_per_s, "GB/s") if rates else "–",
                "copy": _giga(rates.copy_bytes_per_s, "GB/s") if rates else "–",
                "rates": ("cached" if device.is_cached else "measured") if rates else "none",
            }
        )
    return _table(rows, ("device", "name", "rates"))


def _rate_table(linears: Sequence[LinearRate]) -> Table:
    rows = [
        {
            "format": str(linear.format),
            "width": str(linear.width),
            "tokens": str(linear.tokens),
            "time": _milli(linear.seconds),
            "weights": _giga(linear.bytes_per_s, "GB/s"),
            "arithmetic": _giga(linear.ops_per_s, "GOP/s"),
        }
        for linear in linears
    ]
    return _table(rows, ("format",))


def _link_table(links: Sequence[LinkRate]) -> Table:
    rows = [
        {
            "from": link.source,
            "to": link.target,
            "bandwidth": _giga(link.bytes_per_s, "GB/s"),
            "28 KiB take": _milli(link.latency_s),
        }
        for link in links
    ]
    return _table(rows, ("from", "to"))


def _giga(per_s: float, unit: str) -> str:
    return f"{per_s / 1e9:,.1f} {unit}"


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
