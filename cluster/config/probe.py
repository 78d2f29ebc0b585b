"""Settings of `tightfit probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import Option
from tightfit.cluster.units import parse_bytes


def _reserve(text: str) -> tuple[int, float]:
    """(bytes, share of the total) of "2GiB" or "5%"."""
    if not text.endswith("%"):
        return parse_bytes(text), 0.0
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"{text!r} is neither a size, such as 2GiB, nor from 0% to below 100%")
    return 0, share


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """Everything that `tightfit probe` can be told."""

    device: Annotated[
        str,
        Option(
            "What is probed: cpu, cuda (every visible GPU), or all (the CPU, and GPUs if there "
            "are any).",
            choices=("all", "cpu", "cuda"),
        ),
    ] = "all"
    reprobe: Annotated[
        bool, Option("Measure rates anew, also where they are known from an earlier run.")
    ] = False
    out: Annotated[str | None, Option("Inventory of this node to write, as YAML.")] = None
    reserve: Annotated[
        str,
        Option(
            "What the inventory leaves free of each device: a size, or a share of its total "
            "memory such as 5%.",
            check=_reserve,
        ),
    ] = "0%"
    budget_bytes: Annotated[
        int | None,
        Option(
            "Share of the host's memory that the inventory gives the cpu, such as 16GiB; default: "
            "all that is free, less the reserve.",
            key="budget",
            at_least=1,
            is_size=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        if self.budget_bytes is not None and self.device == "cuda":
            raise ConfigError("probe.budget is for the cpu, and probe.device is cuda: leave it out")

    def reserve_bytes(self, total_bytes: int) -> int:
        """What stays free of a device with this much memory."""
        size, share = _reserve(self.reserve)
        return size + round(share * total_bytes)
