"""What a probe finds out about a node's devices, and its JSON. No torch: planning reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from tightfit.kernels.formats import Format
from tightfit.workers.errors import ProbeError

SMALL_BYTES: Final = 28 * 2**10
"""One token's hidden state of BLOOM-176B: the message that a link's latency is measured with."""
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device's memory at one moment; never cached."""

    total_bytes: int
    free_bytes: int
    """What may be taken now, with a live context: what other processes hold is not in it."""
    bound_by: str
    """What sets `free_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentDevice:
    """A device that is there, and its memory at one moment."""

    device: str
    """torch's name: `cpu` or `cuda:N`."""
    uuid: str | None
    """Of a GPU."""
    total_bytes: int
    free_bytes: int

    @property
    def kind(self) -> str:
        """`gpu` or `cpu`."""
        return "cpu" if self.device == "cpu" else "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRate:
    """One square linear layer in a format, its weights read from memory and not from a cache."""

    format: Format
    tokens: int
    width: int
    """Input features, and as many output features."""
    weight_bytes: int
    """Values, scales and zero points."""
    seconds: float
    """Of one call, the median."""

    @property
    def ops_per_s(self) -> float:
        """Multiplications and additions a second."""
        return 2 * self.tokens * self.width**2 / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Weights read a second: what counts for few tokens."""
        return self.weight_bytes / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """How fast a device is; cached by its identity."""

    read_bytes_per_s: float
    """A sum over a buffer larger than any cache."""
    copy_bytes_per_s: float
    """The same buffer copied; bytes read and bytes written both count."""
    linears: tuple[LinearRate, ...]

    def best(self, fmt: Format) -> LinearRate:
        """A format's highest rate of operations.

        Raises:
            ProbeError: the format was not measured.
        """
        found = [linear for linear in self.linears if linear.format == fmt]
        if not found:
            raise ProbeError(f"the probe has no rate for {fmt}")
        return max(found, key=lambda linear: linear.ops_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRate:
    """One direction between two devices, or a device and its host."""

    source: str
    target: str
    """`cpu` or `cuda:N`. From cpu to cpu: one process to another over ZeroMQ on this host."""
    bytes_per_s: float
    latency_s: float
    """Until `SMALL_BYTES` have arrived."""

    @property
    def empty_latency_s(self) -> float:
        """The same, less what so many bytes take."""
        return max(0.0, self.latency_s - SMALL_BYTES / self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """One device."""

    device: str
    """torch's name: `cpu` or `cuda:N`."""
    name: str
    """Of the model: the GPU's, or the processor's."""
    identity: str
    """What its rates are cached by."""
    cores: float | None = None
    """Of a CPU, that this process may use."""
    capability: str | None = None
    """Of CUDA, such as "9.0"."""
    uuid: str | None = None
    """Of a GPU."""
    memory: DeviceMemory
    rates: DeviceRates | None
    """None where nothing could be measured; `NodeProbe.notes` says why."""
    is_cached: bool
    """The rates were measured earlier."""

    @property
    def kind(self) -> str:
        """`gpu` or `cpu`."""
        return "cpu" if self.device == "cpu" else "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProbe:
    """Everything that one run found out about its node."""

    version: int = VERSION
    node: str
    """Host name."""
    devices: tuple[DeviceProbe, ...]
    links: tuple[LinkRate, ...]
    notes: tuple[str, ...]
    """What went otherwise than hoped, a sentence each."""
    elapsed_s: float
    """Time that it took."""


def dump_probe(probe: NodeProbe) -> str:
    """As JSON, which is YAML too."""
    return msgspec.json.format(msgspec.json.encode(probe), indent=1).decode()


def parse_probe(text: str | bytes) -> NodeProbe:
    """Read what `dump_probe` wrote.

    Raises:
        ProbeError: it is something else, or of another version.
    """
    try:
        found = msgspec.json.decode(text, type=NodeProbe)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProbeError(f"not the result of a probe: {error}") from error
    if found.version != VERSION:
        raise ProbeError(f"a probe's result of version {found.version}; this reads {VERSION}")
    return found
