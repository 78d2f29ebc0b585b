"""Configuration: frozen dataclasses from one YAML file, command-line flags over it.

The file has a section per part: `serve` for the service, `client` for the commands that talk to
one. A new setting is one field here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.hub import parse_hub_name
from tightfit.cluster.settings import Option, Values, build, read_file
from tightfit.cluster.units import parse_bytes
from tightfit.kernels.formats import OUTLIER_THRESHOLD, SUPPORTED_FORMATS, KVFormat
from tightfit.workers.model_formats import AUTO

DEFAULT_LISTEN = "127.0.0.1:50051"
METHODS = ("rtn", "hqq", "gptq")
PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[::1]:port".

    Raises:
        ValueError: no port, or one that is none.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port, such as {DEFAULT_LISTEN}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r}: write an IPv6 host in brackets, such as [::1]:50051")
    return host, int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that `tightfit serve` can be told."""

    model: Annotated[str, Option("Checkpoint directory, GGUF file, or hub name (org/name).")]
    served_model_name: Annotated[
        str | None,
        Option("Name that requests may carry; default: the last part of the model's path."),
    ] = None
    format: Annotated[
        str,
        Option(
            "How linear layers are held; auto: as a quantised checkpoint has them, else int8.",
            choices=(AUTO, *map(str, SUPPORTED_FORMATS)),
        ),
    ] = AUTO
    head_format: Annotated[
        str,
        Option(
            "How the LM head is stored; auto: as the layers, int8 where they have fewer bits.",
            choices=(AUTO, *map(str, SUPPORTED_FORMATS)),
        ),
    ] = AUTO
    llm_int8_threshold: Annotated[
        float,
        Option(
            "Size of an activation from which llm_int8 keeps its feature in 16 bits; lower is more "
            "exact and slower.",
            at_least=0,
        ),
    ] = OUTLIER_THRESHOLD
    kv_format: Annotated[
        str,
        Option(
            "How keys and values are cached; auto: in the 16 or 32 bits that the layers compute "
            "in; int8: in half of 16, so that twice the tokens fit.",
            choices=(AUTO, str(KVFormat.INT8)),
        ),
    ] = AUTO
    embedding_place: Annotated[
        str,
        Option(
            "Where the embedding's table is: device (in the first stage's memory), or host (in the "
            "checkpoint's file, of which a step reads the rows that it needs).",
            choices=("device", "host"),
        ),
    ] = "device"
    stages: Annotated[int, Option("Pipeline stages.", at_least=1)] = 1
    balance: Annotated[
        str,
        Option(
            "What the layers are split by: memory held on each stage, or speed (weights read per "
            "step).",
            choices=("memory", "speed"),
        ),
    ] = "memory"
    device: Annotated[
        str,
        Option("Kind of device of every stage; cuda: one GPU each.", choices=("cpu", "cuda")),
    ] = "cpu"
    listen: Annotated[
        str,
        Option("host:port of the gRPC gateway; port 0 takes a free one.", check=split_address),
    ] = DEFAULT_LISTEN
    metrics_listen: Annotated[
        str | None,
        Option("host:port for Prometheus to scrape; default: none.", check=split_address),
    ] = None
    ray_address: Annotated[
        str | None,
        Option('Ray cluster to join: "auto" or host:port; default: a private one, here.'),
    ] = None
    ray_strategy: Annotated[
        str, Option("How Ray places stages on nodes.", choices=PLACEMENT_STRATEGIES)
    ] = "PACK"
    placement_timeout_s: Annotated[
        float, Option("Seconds to wait for room in the Ray cluster.", at_least=0)
    ] = 60.0
    load_timeout_s: Annotated[float, Option("Seconds that loading may take.", at_least=1)] = 1800.0
    threads_per_stage: Annotated[
        int,
        Option(
            "CPU threads of each stage; default: this machine's cores divided among the stages.",
            at_least=1,
        ),
    ] = 1
    memory_budget_bytes: Annotated[
        int | None,
        Option(
            "Most memory of each stage for weights, KV cache and workspace, such as 4GiB; "
            "default: no limit.",
            key="memory_budget",
            at_least=1,
            is_size=True,
        ),
    ] = None
    block_size: Annotated[int, Option("Tokens in a KV block.", at_least=1)] = 16
    kv_blocks: Annotated[
        int | None,
        Option(
            "KV blocks on every stage; default: as many as the budget leaves, up to max_kv_blocks.",
            at_least=1,
        ),
    ] = None
    max_kv_blocks: Annotated[
        int, Option("Most KV blocks when kv_blocks is not given.", at_least=1)
    ] = 4096
    max_batch_tokens: Annotated[int, Option("Most tokens in one micro-batch.", at_least=1)] = 512
    max_running_sequences: Annotated[
        int, Option("Most sequences that hold KV blocks.", at_least=1)
    ] = 256
    max_queued_requests: Annotated[
        int, Option("Requests that may wait; more are refused.", at_least=0)
    ] = 1024
    max_queued_tokens: Annotated[
        int, Option("Prompt tokens that may wait; more are refused.", at_least=0)
    ] = 1_000_000
    max_context: Annotated[
        int | None,
        Option(
            "Most tokens of prompt and output together; default: the model's limit.", at_least=2
        ),
    ] = None
    prefix_cache: Annotated[bool, Option("Reuse the KV cache of prompts that begin alike.")] = True
    drain_grace_s: Annotated[
        float, Option("Seconds that running streams get to finish on SIGTERM.", at_least=0)
    ] = 30.0

    @property
    def model_name(self) -> str:
        """Name under which the model is served."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model)
        if not path.exists() and (hub_name := parse_hub_name(self.model)):
            return hub_name.served_name
        return path.name.removesuffix(".gguf") or path.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How the client commands reach a service."""

    target: Annotated[
        str,
        Option(
            "host:port of the service; default: serve.listen of the same file.",
            check=split_address,
        ),
    ] = DEFAULT_LISTEN
    timeout_s: Annotated[float, Option("Seconds until a request is given up.", at_least=0.001)] = (
        600.0
    )


def _group_size(text: str) -> int | None:
    if text == AUTO:
        return None
    if text == "channel":
        return 0
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{text!r} is neither a number of features, nor {AUTO} or channel")
    return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Everything that `tightfit quantize` can be told."""

    model: Annotated[str, Option("Checkpoint directory, GGUF file, or hub name (org/name).")]
    out: Annotated[str, Option("Directory to write; what an interrupted run left is kept.")]
    format: Annotated[
        str | None,
        Option("Of the layers' weights; default: int4.", choices=("int8", "int4", "int3")),
    ] = None
    budget: Annotated[
        float | None,
        Option(
            "Instead of one format the best mix of int3, int4 and int8 within so many bits per "
            "weight, scales and zero points included; by the sensitivities of the layers.",
            at_least=0,
        ),
    ] = None
    sensitivity: Annotated[
        str | None,
        Option(
            "File of sensitivities that budget goes by; default: sensitivity.json in OUT, which is "
            "measured first if there is none."
        ),
    ] = None
    measure: Annotated[
        bool,
        Option(
            "Write sensitivity.json in OUT, what each layer loses in each format, and no "
            "checkpoint."
        ),
    ] = False
    measure_tokens: Annotated[
        int,
        Option(
            "Tokens at the end of the calibration text that sensitivities are measured on; gptq "
            "does not see them.",
            at_least=32,
        ),
    ] = 1024
    group_size: Annotated[
        str,
        Option(
            "Input features that share a scale in int4 and int3: a number, channel (all of an "
            "output channel), or auto (128, or 64 or 32 where those divide all layers' widths).",
            check=_group_size,
        ),
    ] = AUTO
    method: Annotated[
        str,
        Option(
            "How int4 and int3 are rounded: rtn (to nearest), hqq (fitted to the weights; read by "
            "Tightfit only), gptq (for the inputs that a calibration text gives), or auto (gptq "
            "where there is a text, else rtn).",
            choices=(AUTO, *METHODS),
        ),
    ] = AUTO
    calibration: Annotated[
        str | None,
        Option("Text file like what the model will be used for; gptq and measuring need it."),
    ] = None
    samples: Annotated[int, Option("Pieces of the text that gptq takes.", at_least=1)] = 128
    sample_tokens: Annotated[
        int, Option("Tokens of each, at most the model's context.", at_least=2)
    ] = 2048
    sample_choice: Annotated[
        str,
        Option(
            "Which pieces of a long text: spread (at equal distances), or by their distance to "
            "prototypes in the space of the model's embeddings: easy (near) or hard (far).",
            choices=("spread", "easy", "hard"),
        ),
    ] = "spread"
    damping: Annotated[
        float,
        Option("Share of the Hessian's mean diagonal that gptq adds to it.", at_least=0),
    ] = 0.01
    act_order: Annotated[bool, Option("gptq rounds the input features that matter most first.")] = (
        True
    )

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        for name, other, remedy in (
            ("budget", "format", "give one of them"),
            ("budget", "measure", "leave measure out: what is missing is measured first"),
            ("measure", "format", "leave format out: all formats are measured"),
            ("measure", "sensitivity", "leave sensitivity out: it is what is measured"),
        ):
            if self._has(name) and self._has(other):
                raise ConfigError(
                    f"quantize.{name} and quantize.{other} exclude each other: {remedy}"
                )
        if self.sensitivity is not None and self.budget is None:
            raise ConfigError("quantize.sensitivity is for quantize.budget, which is missing")
        if self.measure and self.calibration is None:
            raise ConfigError(
                "quantize.calibration is missing: sensitivities are measured on the end of a text"
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    @property
    def uniform_format(self) -> str:
        """Of all layers, where there is no budget."""
        return self.format or "int4"

    @property
    def group_features(self) -> int | None:
        """As a number: None is auto, 0 a whole channel."""
        return _group_size(self.group_size)


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

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        if self.max_loss is not None and self.sensitivity is None:
            raise ConfigError("plan.max_loss is by plan.sensitivity, which is missing")
        if self.sensitivity is not None and (self.formats is not None or self.mixed):
            raise ConfigError(
                "plan.sensitivity mixes formats itself: leave plan.formats and plan.mixed out"
            )
        if self.inventory is None:
            raise ConfigError("plan.inventory is missing: the file that lists the devices")

    @property
    def format_names(self) -> tuple[str, ...] | None:
        """None: what suits the checkpoint."""
        return None if self.formats is None else _formats(self.formats)

    @property
    def kv_format_names(self) -> tuple[str, ...]:
        """At least one."""
        return _kv_formats(self.kv_formats)

    @property
    def excluded(self) -> frozenset[str]:
        """Names of devices, nodes and types."""
        return frozenset(_words(self.exclude)) if self.exclude else frozenset()

    @property
    def pinned(self) -> dict[str, tuple[int, int]]:
        """Device id → (first layer, one past the last)."""
        return _pins(self.pin) if self.pin else {}


SECTIONS: Mapping[str, type[Any]] = {
    "serve": ServeConfig,
    "client": ClientConfig,
    "quantize": QuantizeConfig,
    "plan": PlanConfig,
    "probe": ProbeConfig,
}


def read_config_file(path: Path) -> dict[str, dict[str, object]]:
    """Sections of a YAML file, every key known, no value checked yet.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has an unknown or repeated key.
    """
    return read_file(path, SECTIONS)


def serve_config(file: Mapping[str, Values], flags: Values | None = None) -> ServeConfig:
    """The service's configuration: `flags` (by key) over the file's `serve` section.

    Raises:
        ConfigError: see `build`.
    """
    values = {**file.get("serve", {}), **(flags or {})}
    config = build(ServeConfig, "serve", values)
    if "threads_per_stage" not in values and config.ray_address is None:
        cores = len(os.sched_getaffinity(0))
        config = dataclasses.replace(config, threads_per_stage=max(1, cores // config.stages))
    return config


def client_config(file: Mapping[str, Values], flags: Values | None = None) -> ClientConfig:
    """The client's configuration; without a target, the same file's service.

    Raises:
        ConfigError: see `build`.
    """
    values = {**file.get("client", {}), **(flags or {})}
    listen = file.get("serve", {}).get("listen")
    if "target" not in values and listen is not None:
        values["target"] = re.sub(r"^(0\.0\.0\.0|\[::\]):", "127.0.0.1:", str(listen))
    return build(ClientConfig, "client", values)


def quantize_config(file: Mapping[str, Values], flags: Values | None = None) -> QuantizeConfig:
    """What to quantise: `flags` (by key) over the file's `quantize` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(QuantizeConfig, "quantize", {**file.get("quantize", {}), **(flags or {})})


def plan_config(file: Mapping[str, Values], flags: Values | None = None) -> PlanConfig:
    """What to plan: `flags` (by key) over the file's `plan` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(PlanConfig, "plan", {**file.get("plan", {}), **(flags or {})})


def probe_config(file: Mapping[str, Values], flags: Values | None = None) -> ProbeConfig:
    """What to probe: `flags` (by key) over the file's `probe` section.

    Raises:
        ConfigError: see `build`.
    """
    return build(ProbeConfig, "probe", {**file.get("probe", {}), **(flags or {})})
