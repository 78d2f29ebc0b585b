"""The command `tightfit probe`: this node's devices, measured, as a table, JSON or inventory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml
from rich.console import Console
from rich.table import Table

from tightfit.cluster.config import ProbeConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.measured import ROUNDED_TO, inventory_tree, measured_devices
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.probe import probe_node
from tightfit.workers.probing.cache import ProbeCache, cache_directory
from tightfit.workers.probing.result import (
    DeviceProbe,
    LinearRate,
    LinkRate,
    NodeProbe,
    dump_probe,
)

WIDE_COLUMNS = 110
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
    """This node as `cluster.planning.inventory` reads it. A comment names what was left out.

    Raises:
        ConfigError: no device is left, or one has less memory than the budget or reserve takes.
    """
    devices = measured_devices(found)
    if not devices:
        raise ConfigError(
            f"there is no device to write to {config.out}: {'; '.join(found.notes) or 'none found'}"
        )
    tree = inventory_tree([found], lambda device: _planned_bytes(device, config))
    comments = [
        f"# {found.node}:{number} is {device.device}: {device.uuid or device.name}\n"
        for number, (device, _) in enumerate(devices)
    ]
    comments += [f"# Note: {' '.join(note.split())}\n" for note in found.notes]
    return HEADER + "".join(comments) + yaml.safe_dump(tree, sort_keys=False, width=WIDE_COLUMNS)


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
