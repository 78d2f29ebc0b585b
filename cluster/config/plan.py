"""Settings of `tightfit plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import Option
from tightfit.kernels.formats import SUPPORTED_FORMATS, KVFormat
from tightfit.workers.model_formats import AUTO


def _words(text: str) -> tuple[str, ...]:
    """Of "a,b": a and b.

    Raises:
        ValueError: one is empty, or there are none.
    """
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise ValueError(f"{text!r} is not a list such as a,b")
    return words


def _formats(text: str) -> tuple[str, ...]:
    known = (AUTO, *map(str, SUPPORTED_FORMATS))
    for word in _words(text):
        if word not in known:
            raise ValueError(f"{word!r} is not one of {', '.join(known)}")
    return _words(text)


def _kv_formats(text: str) -> tuple[str, ...]:
    for word in _words(text):
        if word not in (AUTO, KVFormat.INT8):
            raise ValueError(f"{word!r} is neither {AUTO} nor {KVFormat.INT8}")
    return _words(text)


def _pins(text: str) -> dict[str, tuple[int, int]]:
    pins = {}
    for word in _words(text):
        match = re.fullmatch(r"(.+)=([0-9]+)-([0-9]+)", word)
        if match is None or int(match[2]) > int(match[3]):
            raise ValueError(f"{word!r} is not like node:0=0-11, a device and its layers")
        pins[match[1]] = (int(match[2]), int(match[3]) + 1)
    return pins


MAX_REPLICAS = 64


def _replicas(text: str) -> int | None:
    if text == "max":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_REPLICAS:
        raise ValueError(f"{text!r} is neither max nor a number from 1 to {MAX_REPLICAS}")
    return int(text)


LOAD = {"streams": 16, "prompt": 128, "output": 128, "requests": 0}
"""What a simulated load is unless told otherwise; of requests, as many as streams."""
MAX_LOAD_TOKENS = 1_000_000


def _load(text: str) -> dict[str, int]:
    load = dict(LOAD)
    for word in _words(text):
        name, _, number = word.partition("=")
        if name not in load or not number.isdecimal() or not 1 <= int(number) <= MAX_LOAD_TOKENS:
            raise ValueError(
                f"{word!r} is not like streams=16 (known: {', '.join(load)}; 1 to "
                f"{MAX_LOAD_TOKENS:,})"
            )
        load[name] = int(number)
    load["requests"] = load["requests"] or load["streams"]
    if load["requests"] * (load["prompt"] + load["output"]) > MAX_LOAD_TOKENS:
        raise ValueError(f"{text!r} is of more than {MAX_LOAD_TOKENS:,} tokens in all")
    return load


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Everything that `tightfit plan` can be told."""

    model: Annotated[
        str,
        Option("Checkpoint directory, hub name, or name of a file in configs/models."),
    ]
    inventory: Annotated[
        str | None,
        Option("File of devices, or name of one in configs/inventories."),
    ] = None
    values: Annotated[
        str | None,
        Option(
            "Instead of an inventory: values of the Helm chart, several files separated by commas "
            "as helm's --values; what they serve is planned on their pools."
        ),
    ] = None
    live: Annotated[
        bool, Option("Instead of an inventory: the devices that are there, measured now.")
    ] = False
    ray_address: Annotated[
        str | None,
        Option('Ray cluster whose nodes are measured: "auto" or host:port; default: this machine.'),
    ] = None
    insecure_ray: Annotated[bool, Option("As of serve.")] = False
    device: Annotated[
        str,
        Option(
            "Kind of device that is measured; auto: cuda where there are GPUs.",
            choices=(AUTO, "cpu", "cuda"),
        ),
    ] = AUTO
    cpu_budget_bytes: Annotated[
        int | None,
        Option(
            "Of each host's memory what a plan may take, such as 16GiB; default: what is free less "
            "5% of the total and 2 GiB.",
            key="cpu_budget",
            at_least=1,
            is_size=True,
        ),
    ] = None
    sequences: Annotated[
        int, Option("Sequences that have room at the same time.", at_least=1, at_most=1_000_000)
    ] = 1
    context: Annotated[
        int | None,
        Option("Tokens of each; default: 2048, or what the model can.", at_least=1),
    ] = None
    formats: Annotated[
        str | None,
        Option(
            "Formats that layers may have, such as int4,int8, of which a plan takes one; default: "
            "that, or auto (as it has them) for a quantised checkpoint.",
            check=_formats,
        ),
    ] = None
    mixed: Annotated[
        bool, Option("Some layers may have one of the formats, the others the next.")
    ] = False
    head_format: Annotated[
        str,
        Option("As of serve.", choices=(AUTO, *map(str, SUPPORTED_FORMATS))),
    ] = AUTO
    kv_formats: Annotated[str, Option("Formats that the KV cache may have.", check=_kv_formats)] = (
        "auto,int8"
    )
    embedding_place: Annotated[
        str,
        Option(
            "Of the embedding's table; auto: on the device where that costs nothing, else on the "
            "host.",
            choices=(AUTO, "device", "host"),
        ),
    ] = AUTO
    min_bits: Annotated[
        float,
        Option("Least bits per weight, mean of all layers, scales counted.", at_least=0),
    ] = 0.0
    sensitivity: Annotated[
        str | None,
        Option("File of sensitivities, which formats are mixed by instead of `formats`."),
    ] = None
    max_loss: Annotated[
        float | None,
        Option("Most loss by these sensitivities, summed, in nats.", at_least=0),
    ] = None
    spare: Annotated[
        str,
        Option(
            "What memory is for that the workload leaves: kv (more tokens) or quality (as many "
            "layers as possible in better formats, then tokens).",
            choices=("kv", "quality"),
        ),
    ] = "kv"
    objective: Annotated[str, Option("What is to be least.", choices=("devices", "dollars"))] = (
        "devices"
    )
    max_devices: Annotated[int | None, Option("Most devices to use.", at_least=1)] = None
    max_cost: Annotated[
        float | None, Option("Most US dollars an hour.", at_least=0, at_most=1e9)
    ] = None
    exclude: Annotated[
        str | None,
        Option("Devices, nodes or types that are not used, such as n0:3,t4.", check=_words),
    ] = None
    same_node: Annotated[bool, Option("All devices are on one node.")] = False
    pin: Annotated[
        str | None,
        Option("Layers that a device holds, and no others, such as n0:0=0-11.", check=_pins),
    ] = None
    reserve: Annotated[
        str | None,
        Option(
            "Of a GPU's memory: tight (0.98 of the total less 1 GiB is used) or safe (0.95 less "
            "1,930 MiB); default: the inventory's.",
            choices=("tight", "safe"),
        ),
    ] = None
    block_size: Annotated[int, Option("Tokens in a KV block.", at_least=1)] = 16
    max_batch_tokens: Annotated[int, Option("Most tokens in one micro-batch.", at_least=1)] = 512
    replicas: Annotated[
        str,
        Option(
            "Pipelines, each with the whole model on devices of its own: so many, or max; "
            "max_devices and max_cost are for each.",
            check=_replicas,
        ),
    ] = "1"
    simulate: Annotated[
        str | None,
        Option(
            "Load to serve by the plan in simulated time, such as "
            "streams=16,prompt=128,output=128,requests=64; any may be left out.",
            check=_load,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        if self.max_loss is not None and self.sensitivity is None:
            raise ConfigError("plan.max_loss is by plan.sensitivity, which is missing")
        if self.sensitivity is not None and (self.formats is not None or self.mixed):
            raise ConfigError(
                "plan.sensitivity mixes formats itself: leave plan.formats and plan.mixed out"
            )
        sources = {"inventory": self.inventory, "values": self.values, "live": self.live or None}
        given = [f"plan.{name}" for name, value in sources.items() if value is not None]
        if not given:
            raise ConfigError(
                "plan.inventory is missing: the file that lists the devices; or measure those that "
                "are there with --live"
            )
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other: give one of them")
        if not self.live and (self.ray_address or self.cpu_budget_bytes or self.device != AUTO):
            raise ConfigError(
                "plan.ray_address, plan.device and plan.cpu_budget are for plan.live: an inventory "
                "says itself what there is"
            )

    @property
    def format_names(self) -> tuple[str, ...] | None:
        """None: what suits the checkpoint."""
        return None if self.formats is None else _formats(self.formats)

    @property
    def kv_format_names(self) -> tuple[str, ...]:
        """At least one."""
        return _kv_formats(self.kv_formats)

    @property
    def num_replicas(self) -> int | None:
        """None: as many as possible."""
        return _replicas(self.replicas)

    @property
    def load(self) -> dict[str, int] | None:
        """Streams, requests, and prompt and output tokens of each."""
        return None if self.simulate is None else _load(self.simulate)

    @property
    def excluded(self) -> frozenset[str]:
        """Names of devices, nodes and types."""
        return frozenset(_words(self.exclude)) if self.exclude else frozenset()

    @property
    def pinned(self) -> dict[str, tuple[int, int]]:
        """Device id → (first layer, one past the last)."""
        return _pins(self.pin) if self.pin else {}
