"""A plan: which device holds which layers in which formats. Written and read as YAML."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.planning.inventory import KINDS
from tightfit.cluster.planning.rates import Link, at, parse_curve
from tightfit.cluster.settings import (
    Option,
    Values,
    as_mapping,
    build,
    read_yaml,
    refuse_unknown,
    settings,
)

RUN = re.compile(r"([a-z_0-9/]+)\*([1-9][0-9]*)")


def parse_formats(text: str) -> tuple[tuple[str, int], ...]:
    """(format, number of layers) of "int4*17 int3*7".

    Raises:
        ValueError: it is not of that form.
    """
    runs = [RUN.fullmatch(word) for word in text.split()]
    if not runs or not all(runs):
        raise ValueError(f"{text!r} is not like 'int4*17 int3*7'")
    return tuple((run[1], int(run[2])) for run in runs if run)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage."""

    device: Annotated[str, Option("Id of the device, node:number.")]
    node: Annotated[str, Option("Where the device is.")]
    type: Annotated[str, Option("Of the device.")]
    first_layer: Annotated[int, Option("First layer.", at_least=0)]
    end_layer: Annotated[int, Option("One past the last layer.", at_least=1)]
    formats: Annotated[str, Option("Of its layers, in order: format*layers.", check=parse_formats)]
    weight_bytes: Annotated[int, Option("Weights, embedding and head included.", at_least=0)]
    layer_bytes: Annotated[int, Option("Weights of its layers alone.", at_least=0)]
    kv_bytes: Annotated[int, Option("KV blocks, as many as the plan says.", at_least=0)]
    workspace_bytes: Annotated[int, Option("Activations and scratch.", at_least=0)]
    usable_bytes: Annotated[int, Option("What the device has for all of that.", at_least=0)]
    gb_per_s: Annotated[int, Option("Bandwidth of the device's memory.", at_least=1)]
    read_bytes: Annotated[int, Option("Weights that a step reads.", at_least=0)]
    num_weights: Annotated[int, Option("Of its layers.", at_least=0)]
    head_weights: Annotated[int, Option("Of the LM head, if it has it.", at_least=0)]
    tera_ops: Annotated[float, Option("Matmul rate in its formats, 10^12/s.", at_least=0)]
    price: Annotated[float, Option("US dollars an hour.", at_least=0)]
    watts: Annotated[float, Option("Power limit of the device.", at_least=0)]
    kind: Annotated[str, Option("Of the device: gpu or cpu.", choices=KINDS)] = "gpu"
    uuid: Annotated[str | None, Option("Of a GPU that was seen when the plan was made.")] = None
    layer_ms: Annotated[
        str | None,
        Option("Times of its layers by measured rates, tokens:ms.", check=parse_curve),
    ] = None
    head_ms: Annotated[str | None, Option("Times of the head, rows:ms.", check=parse_curve)] = None
    link_us: Annotated[float, Option("Latency of the link into it.", at_least=0)] = 0.0
    link_gb_per_s: Annotated[
        float | None, Option("Bandwidth of that link; none: without limit.", at_least=1e-6)
    ] = None

    def __post_init__(self) -> None:
        """Raises ConfigError where the formats are not of as many layers as it has."""
        counted = sum(n for _, n in parse_formats(self.formats))
        if counted != self.num_layers:
            raise ConfigError(
                f"stage on {self.device}: formats are of {counted} layers, and it holds "
                f"{self.num_layers} ({self.first_layer} to {self.end_layer - 1})"
            )
        if re.fullmatch(r".+:[0-9]{1,6}", self.device) is None:
            raise ConfigError(f"stage on {self.device}: the device is not like node:number")

    @property
    def number(self) -> int:
        """The device's on its node; of a GPU also torch's."""
        return int(self.device.rpartition(":")[2])

    @property
    def num_layers(self) -> int:
        """How many it holds."""
        return self.end_layer - self.first_layer

    def step_s(self, tokens: int, rows: int, kv_bytes: float) -> float:
        """Seconds of a micro-batch.

        By measured rates, and the bandwidth for keys and values, where they are there; else what it
        takes at least by the data sheet: the time to read, or to multiply.

        Args:
            tokens: that it takes a step further.
            rows: of them, those that the LM head sees.
            kv_bytes: of keys and values that it reads.
        """
        read_s = kv_bytes / (self.gb_per_s * 1e9)
        if self.layer_ms is not None:
            head = at(parse_curve(self.head_ms), rows) if self.head_ms and rows else 0.0
            return at(parse_curve(self.layer_ms), tokens) + head + read_s
        read_s += self.read_bytes / (self.gb_per_s * 1e9)
        products = self.num_weights * tokens + self.head_weights * rows
        return max(read_s, 2 * products / (self.tera_ops * 1e12))

    def link_s(self, num_bytes: int) -> float:
        """Seconds until a micro-batch's hidden states have come from the stage before."""
        return Link(latency_us=self.link_us, gb_per_s=self.link_gb_per_s).seconds(num_bytes)

    @property
    def headroom_bytes(self) -> int:
        """What is left."""
        return self.usable_bytes - self.weight_bytes - self.kv_bytes - self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTerms:
    """What holds for all stages of a plan."""

    model: Annotated[str, Option("As the plan was asked for.")]
    num_layers: Annotated[int, Option("Of the model.", at_least=1)]
    bits_per_weight: Annotated[float, Option("Mean of the layers.", at_least=0)]
    embedding_place: Annotated[str, Option("Of its table.", choices=("device", "host"))]
    head_format: Annotated[str, Option("Of the LM head.")]
    kv_format: Annotated[str, Option("Of keys and values.")]
    block_size: Annotated[int, Option("Tokens in a KV block.", at_least=1)]
    max_batch_tokens: Annotated[int, Option("Most tokens in a micro-batch.", at_least=1)]
    sequences: Annotated[int, Option("At the same time, that it was planned for.", at_least=1)]
    context: Annotated[int, Option("Tokens of each.", at_least=1)]
    kv_blocks: Annotated[int, Option("KV blocks on every stage.", at_least=1)]
    hidden_bytes: Annotated[int, Option("Of a token between two stages.", at_least=0)]
    return_us: Annotated[
        float, Option("Latency from the last stage to the first one's node.", at_least=0)
    ] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(PlanTerms):
    """A whole model laid over devices."""

    stages: tuple[StagePlan, ...]
    """First to last."""

    def __post_init__(self) -> None:
        """Raises ConfigError where the stages do not hold every layer once, in order."""
        ends = [0, *(end for stage in self.stages for end in (stage.first_layer, stage.end_layer))]
        ends.append(self.num_layers)
        gaps = [pair for pair in list(pairwise(ends))[::2] if pair[0] != pair[1]]
        empty = [s.device for s in self.stages if s.num_layers < 1]
        twice = len({stage.device for stage in self.stages}) < len(self.stages)
        if gaps or empty or twice:
            raise ConfigError(
                f"plan: its stages do not hold each of the {self.num_layers} layers once, in "
                "order, each stage on a device of its own"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens for which every stage has KV blocks."""
        return self.kv_blocks * self.block_size

    def step_s(self, sequences: int) -> list[float]:
        """Seconds of each stage for the next token of so many sequences, at the full context."""
        share = sequences * self.context / self.kv_tokens
        return [stage.step_s(sequences, sequences, share * stage.kv_bytes) for stage in self.stages]

    def links_s(self, tokens: int) -> list[float]:
        """Seconds on the way into each stage, of so many tokens; into the first come their ids, of
        which only the link's latency counts. Last, the way back."""
        rest = [stage.link_s(tokens * self.hidden_bytes) for stage in self.stages[1:]]
        return [self.stages[0].link_s(0), *rest, self.return_us / 1e6]

    @property
    def is_measured(self) -> bool:
        """Times of all stages are by measured rates."""
        return all(stage.layer_ms is not None for stage in self.stages)

    @property
    def has_links(self) -> bool:
        """Links take time."""
        return any(self.links_s(1))

    @property
    def token_s(self) -> float:
        """Seconds for each token of one sequence alone."""
        return sum(self.step_s(1)) + sum(self.links_s(1))

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences that were planned for, in as many micro-batches as there are stages."""
        micro_batches = min(len(self.stages), self.sequences)
        tokens = -(-self.sequences // micro_batches)
        times = self.step_s(tokens)
        round_s = sum(times) + sum(self.links_s(tokens))
        return self.sequences / max(round_s, micro_batches * max(times))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of long prompts in the largest micro-batches, attention not counted."""
        tokens = self.max_batch_tokens
        return tokens / max(stage.step_s(tokens, 0, 0.0) for stage in self.stages)

    @property
    def dollars_per_hour(self) -> float:
        """Of all devices in use."""
        return sum(stage.price for stage in self.stages)

    @property
    def watts(self) -> float:
        """Limit of all devices in use."""
        return sum(stage.watts for stage in self.stages)


def dump_plan(plan: Plan) -> str:
    """A plan as YAML."""
    tree = dataclasses.asdict(plan)
    tree["stages"] = list(tree["stages"])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_plan(path: Path) -> Plan:
    """A plan out of a file that `dump_plan` wrote.

    Raises:
        ConfigError: it cannot be read, a field is missing, unknown or absurd, or the stages do not
            hold every layer once.
    """
    tree = as_mapping(read_yaml(path), str(path))
    stages = tree.pop("stages", None)
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{path}: plan.stages: expected a list of stages, found {stages!r}")
    try:
        terms: PlanTerms = _section(PlanTerms, tree, "plan")
        found = tuple(
            _section(StagePlan, as_mapping(values, where), where)
            for number, values in enumerate(stages)
            for where in [f"plan.stages[{number}]"]
        )
        return Plan(**dataclasses.asdict(terms), stages=found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _section(kind: type[Any], values: Values, where: str) -> Any:
    refuse_unknown(values, [setting.key for setting in settings(kind)], where)
    return build(kind, where, values)
