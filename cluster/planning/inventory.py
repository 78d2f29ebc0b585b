"""The devices that a model may be placed on, read from YAML: kinds, nodes, what is free.

```yaml
reserve: tight                     # or safe; see `memory.Reserve`
types:                             # kinds that configs/devices.yaml does not have, if any
  my-gpu: {memory: 20GiB, gb_per_s: 500, fp16_tflops: 60, int8_tops: 120, price: 0.5, watts: 200}
  probed:                          # `tightfit probe --out` writes such
    memory: 20GiB
    ...
    rates:                         # GB/s of weights that linear layers get through, by tokens
      int8: {1: 410, 64: 380}
between_nodes: {latency_us: 90, gb_per_s: 3}   # links from stage to stage; left out: they take no
nodes:                                         # time
  - name: pool                     # pool-0, pool-1, pool-2
    count: 3
    link: {latency_us: 40, gb_per_s: 12}       # between this node's devices
    devices:
      - {type: a100-80, count: 7}
      - {type: a100-80, free: 41GiB, price: 3.1}
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tightfit
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.planning.memory import DEVICE_CONTEXT_BYTES, Reserve, usable_bytes
from tightfit.cluster.planning.rates import NO_RATES, Curve, Link, Rates
from tightfit.cluster.settings import (
    Option,
    Values,
    as_mapping,
    build,
    read_yaml,
    refuse_unknown,
    settings,
    shown,
)
from tightfit.cluster.units import format_bytes
from tightfit.kernels.formats import SUPPORTED_FORMATS

CONFIGS = Path(tightfit.__file__).parent / "configs"
"""Devices, models and inventories that come with the package."""
DEVICE_TYPES = CONFIGS / "devices.yaml"
MAX_DEVICES = 1_000_000
KINDS = ("gpu", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSheet:
    """A kind of device, by its data sheet."""

    name: Annotated[str, Option("Name of the type.")]
    kind: Annotated[str, Option("gpu, or cpu: a share of a host.", choices=KINDS)] = "gpu"
    memory_bytes: Annotated[
        int,
        Option("Memory as torch shows it.", key="memory", at_least=1, at_most=2**50, is_size=True),
    ]
    gb_per_s: Annotated[
        int, Option("Bandwidth of its memory, in GB/s.", at_least=1, at_most=1_000_000)
    ]
    fp16_tflops: Annotated[
        float, Option("Dense matmul rate in 16 bit, TFLOP/s.", at_least=0.001, at_most=1e6)
    ]
    int8_tops: Annotated[
        float, Option("Dense matmul rate in int8, TOP/s.", at_least=0.001, at_most=1e6)
    ]
    price: Annotated[float, Option("US dollars an hour.", at_least=0, at_most=100_000)]
    watts: Annotated[float, Option("Power limit.", at_least=0, at_most=1_000_000)]
    capability: Annotated[float | None, Option("CUDA capability.", at_least=1, at_most=1000)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceType(DeviceSheet):
    """A kind of device, and what was measured on it."""

    rates: Rates = NO_RATES
    """Of its linear layers; they go before the data sheet where all formats of a model are
    there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device."""

    device_id: str
    """node:number, the number being its place on the node."""
    node: str
    type: DeviceType
    total_bytes: int
    free_bytes: int
    """Free while a process of ours has its context on it."""
    price: float
    """US dollars an hour."""
    uuid: str | None = None
    """Of a GPU that was seen, by which it is found again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything that a plan may use."""

    devices: tuple[Device, ...]
    reserve: Reserve = Reserve.TIGHT
    within_node: Mapping[str, Link] = field(default_factory=dict)
    """Node → link between its devices, where it is known."""
    between_nodes: Link | None = None

    def link(self, one: str, other: str) -> Link:
        """Between devices of two nodes, or of one; takes no time where it is not known."""
        known = self.within_node.get(one) if one == other else self.between_nodes
        return known or Link()

    def usable(self, device: Device) -> int:
        """Bytes of a device for weights, KV cache and workspace."""
        is_gpu = device.type.kind == "gpu"
        return usable_bytes(device.free_bytes, device.total_bytes, self.reserve, is_gpu=is_gpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """Some nodes that are alike."""

    name: Annotated[str, Option("Name of the node, or of all nodes of the pool.")]
    count: Annotated[int, Option("Nodes.", at_least=1, at_most=MAX_DEVICES)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lot:
    """Some devices of a node that are alike."""

    type: Annotated[str, Option("One of configs/devices.yaml, or of the file's own types.")]
    count: Annotated[int, Option("Devices.", at_least=1, at_most=MAX_DEVICES)] = 1
    total: Annotated[
        int | None,
        Option("Memory, where it is not its type's.", at_least=1, at_most=2**50, is_size=True),
    ] = None
    free: Annotated[
        int | None,
        Option("What is free of it; default: all but our own context.", at_least=0, is_size=True),
    ] = None
    price: Annotated[
        float | None,
        Option("US dollars an hour; default: its type's.", at_least=0, at_most=100_000),
    ] = None
    uuid: Annotated[str | None, Option("Of a single GPU, by which it is found again.")] = None


def read_device_types(path: Path = DEVICE_TYPES) -> dict[str, DeviceType]:
    """Kinds of devices by name.

    Raises:
        ConfigError: the file cannot be read, or a field is missing, unknown or absurd.
    """
    return _types(as_mapping(read_yaml(path), str(path)), str(path))


def read_inventory(path: Path, types: Mapping[str, DeviceType] | None = None) -> Inventory:
    """The devices that a file lists, in its order.

    Args:
        path: of the file.
        types: kinds that it may name, beside its own; None: configs/devices.yaml.

    Raises:
        ConfigError: the file cannot be read, or a field is missing, unknown or absurd.
    """
    return parse_inventory(as_mapping(read_yaml(path), str(path)), str(path), types)


def parse_inventory(
    tree: Values, path: str, types: Mapping[str, DeviceType] | None = None
) -> Inventory:
    """The same of what a file holds.

    Args:
        tree: its keys and values.
        path: where it is from, for errors.
        types: see `read_inventory`.

    Raises:
        ConfigError: a field is missing, unknown or absurd.
    """
    try:
        refuse_unknown(tree, ("reserve", "types", "between_nodes", "nodes"), "inventory")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    known = dict(read_device_types() if types is None else types)
    known |= _types(as_mapping(tree.get("types"), f"{path}: types"), f"{path}: types")
    devices: list[Device] = []
    nodes: set[str] = set()
    links: dict[str, Link] = {}
    for number, values in enumerate(_sequence(tree.get("nodes"), f"{path}: nodes")):
        where = f"{path}: nodes[{number}]"
        tree_of_pool = as_mapping(values, where)
        lots = list(_lots(tree_of_pool.pop("devices", None), known, where))
        link = _link(tree_of_pool.pop("link", None), f"{where}.link")
        pool = _section(_Pool, tree_of_pool, where)
        names = [pool.name] if pool.count == 1 else [f"{pool.name}-{i}" for i in range(pool.count)]
        if len(devices) + pool.count * sum(lot.count for lot, _ in lots) > MAX_DEVICES:
            raise ConfigError(f"{where}: more than {MAX_DEVICES:,} devices")
        for name in names:
            if name in nodes:
                raise ConfigError(f"{where}: there are two nodes called {name!r}")
            nodes.add(name)
            devices += _node(name, lots)
            if link is not None:
                links[name] = link
    if not devices:
        raise ConfigError(f"{path}: lists no device")
    return Inventory(
        devices=tuple(devices),
        reserve=_reserve(tree.get("reserve"), path),
        within_node=links,
        between_nodes=_link(tree.get("between_nodes"), f"{path}: between_nodes"),
    )


def _types(tree: Values, where: str) -> dict[str, DeviceType]:
    found = {}
    for name, values in tree.items():
        fields = as_mapping(values, f"{where}: {name}")
        if "name" in fields:
            raise ConfigError(f"{where}: {name}.name is not a setting: the key is its name")
        rates = _rates(fields.pop("rates", None), f"{where}: {name}.rates")
        sheet = _section(DeviceSheet, {"name": name, **fields}, f"{where}: {name}")
        found[name] = DeviceType(**asdict(sheet), rates=rates)
    return found


def _rates(value: object, where: str) -> Rates:
    """GB/s by tokens, by format, as seconds for a GB."""
    found = []
    for name, values in as_mapping(value, where).items():
        if name not in SUPPORTED_FORMATS:
            raise ConfigError(f"{where}: {name!r} is not one of {', '.join(SUPPORTED_FORMATS)}")
        found.append((name, _curve(values, f"{where}.{name}")))
    return Rates(tuple(sorted(found)))


def _curve(values: object, where: str) -> Curve:
    points = []
    for tokens, gb_per_s in values.items() if isinstance(values, dict) else ():
        is_number = isinstance(gb_per_s, int | float) and not isinstance(gb_per_s, bool)
        if type(tokens) is not int or tokens < 1 or not is_number or not 1e-6 <= gb_per_s <= 1e6:
            raise ConfigError(
                f"{where}: {tokens!r}: {gb_per_s!r} is not a number of tokens and GB/s, at most "
                "1,000,000"
            )
        points.append((tokens, 1 / gb_per_s))
    if not points:
        raise ConfigError(f"{where}: expected GB/s by number of tokens, found {values!r}")
    return tuple(sorted(points))


def _link(value: object, where: str) -> Link | None:
    found: Link | None = None if value is None else _section(Link, as_mapping(value, where), where)
    return found


def _section(kind: type[Any], values: Values, where: str) -> Any:
    refuse_unknown(values, [setting.key for setting in settings(kind)], where)
    return build(kind, where, values)


def _sequence(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list (`- …` lines), found {shown(value)}")
    return value


def _lots(
    value: object, known: Mapping[str, DeviceType], where: str
) -> Iterator[tuple[_Lot, DeviceType]]:
    for number, values in enumerate(_sequence(value, f"{where}.devices")):
        here = f"{where}.devices[{number}]"
        lot: _Lot = _section(_Lot, as_mapping(values, here), here)
        if lot.type not in known:
            raise ConfigError(f"{here}.type: {lot.type!r} is not one of {', '.join(known)}")
        kind = known[lot.type]
        total = kind.memory_bytes if lot.total is None else lot.total
        if lot.free is not None and lot.free > total:
            raise ConfigError(
                f"{here}.free: {format_bytes(lot.free)} is more than the device has, "
                f"{format_bytes(total)}"
            )
        if lot.uuid is not None and lot.count > 1:
            raise ConfigError(f"{here}.uuid: is of one device, and count is {lot.count}")
        yield lot, kind


def _node(name: str, lots: list[tuple[_Lot, DeviceType]]) -> Iterator[Device]:
    number = 0
    for lot, kind in lots:
        total = kind.memory_bytes if lot.total is None else lot.total
        idle = max(0, total - (DEVICE_CONTEXT_BYTES if kind.kind == "gpu" else 0))
        for _ in range(lot.count):
            yield Device(
                device_id=f"{name}:{number}",
                node=name,
                type=kind,
                total_bytes=total,
                free_bytes=idle if lot.free is None else lot.free,
                price=kind.price if lot.price is None else lot.price,
                uuid=lot.uuid,
            )
            number += 1


def _reserve(value: object, path: str) -> Reserve:
    if value is None:
        return Reserve.TIGHT
    try:
        return Reserve(str(value))
    except ValueError:
        known = ", ".join(Reserve)
        raise ConfigError(
            f"{path}: inventory.reserve: {shown(value)} is not one of {known}"
        ) from None
