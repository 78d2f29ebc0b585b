"""Plans the large models on each kind of device, and writes docs/fit.md.

Run `make fit`. Everything is computed from configs/models and configs/devices.yaml; no device is
needed. With --check, fails when docs/fit.md is not what this writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.explain import explain
from tightfit.cluster.planning.inventory import (
    CONFIGS,
    Device,
    Inventory,
    read_device_types,
    read_inventory,
)
from tightfit.cluster.planning.layout import Run
from tightfit.cluster.planning.memory import DEVICE_CONTEXT_BYTES, Reserve
from tightfit.cluster.planning.planner import Solution, searches, solve
from tightfit.cluster.planning.report import report
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.settings import as_mapping, read_yaml
from tightfit.workers.decoder_config import DecoderConfig, decoder_config

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "fit.md"
MARK = "<!-- below: written by make fit -->"
MODELS = {
    "bloom-176b": "BLOOM-176B",
    "opt-175b": "OPT-175B",
    "llama-3.1-405b": "Llama-3.1-405B",
    "llama-3.1-70b": "Llama-3.1-70B",
}
DEVICES = ("h200", "a100-80", "a6000", "a100-40", "v100-32", "rtx-3090", "t4")
LOTS = ("mixed-lot", "half-taken", "three-node-pool")
CONTEXT = 2048
MOST_DEVICES = 64
TYPES = read_device_types()


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Formats of layers."""

    title: str
    formats: tuple[str, ...]


COLUMNS = (
    Column(title="bf16", formats=("bf16",)),
    Column(title="int8", formats=("int8",)),
    Column(title="int4, int8", formats=("int4", "int8")),
    Column(title="int4", formats=("int4",)),
    Column(title="int3, int4", formats=("int3", "int4")),
    Column(title="int3", formats=("int3",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A count that was published, and what is planned for the same model."""

    model: str
    published: str
    device: str
    formats: tuple[str, ...]
    sequences: int
    aim: int
    """Devices at most: with more, nothing is written."""
    kv: str = "int8"


CLAIMS = (
    Claim(model="bloom-176b", published="8 × A100-80 in 16 bits (Accelerate, DeepSpeed)",
          device="a100-80", formats=("int4", "int8"), sequences=1, aim=2),
    Claim(model="bloom-176b", published="4 × A100-80, LLM.int8() (Accelerate)",
          device="a100-80", formats=("int8",), sequences=1, aim=3),
    Claim(model="bloom-176b", published="–",
          device="a100-40", formats=("int3", "int4"), sequences=8, aim=3),
    Claim(model="bloom-176b", published="–", device="a100-80", formats=("int3", "int4"),
          sequences=1, aim=1),
    Claim(model="opt-175b", published="8 × A100-80 in 16 bits (metaseq); 16 × V100-32",
          device="v100-32", formats=("int3", "int4"), sequences=1, aim=3),
    Claim(model="opt-175b", published="1 × A100-80, 3 bits (GPTQ)",
          device="a100-80", formats=("int3", "int4"), sequences=1, aim=1),
    Claim(model="opt-175b", published="2 × A6000, 3 bits (GPTQ)",
          device="a6000", formats=("int3", "int4"), sequences=1, aim=2),
    Claim(model="opt-175b", published="8 × 24 GB, LLM.int8(): only just",
          device="rtx-3090", formats=("int3", "int4"), sequences=1, aim=4),
)  # fmt: skip


def model_config(name: str) -> DecoderConfig:
    """Of a model that comes with the package."""
    path = CONFIGS / "models" / f"{name}.yaml"
    return decoder_config(as_mapping(read_yaml(path), str(path)))


def idle(device: str, reserve: Reserve) -> Inventory:
    """Enough devices of one type that nobody else uses."""
    kind = TYPES[device]
    return Inventory(
        devices=tuple(
            Device(
                device_id=f"a:{number}",
                node="a",
                type=kind,
                total_bytes=kind.memory_bytes,
                free_bytes=kind.memory_bytes - DEVICE_CONTEXT_BYTES,
                price=kind.price,
            )
            for number in range(MOST_DEVICES)
        ),
        reserve=reserve,
    )


def request_for(
    model: DecoderConfig, device: str, formats: tuple[str, ...], sequences: int, kv: str
) -> PlanRequest:
    """The fewest devices, as many layers as possible in the better format."""
    return PlanRequest(
        model=model,
        inventory=idle(device, Reserve.TIGHT),
        sequences=sequences,
        context=CONTEXT,
        formats=formats,
        is_mixed=len(formats) > 1,
        kv_formats=(kv,),
        spare=Spare.QUALITY,
    )


def cell(request: PlanRequest) -> str:
    """Devices by both reserves, layers in the better format, and what one device less holds."""
    found = solve(request)
    if found is None:
        return "–"
    number, num_layers = len(found.runs), request.model.num_layers
    careful = solve(replace(request, inventory=replace(request.inventory, reserve=Reserve.SAFE)))
    text = f"**{number}** / {len(careful.runs) if careful else '–'}"
    if found.level.better is not None:
        text += f", {sum(run.num_better for run in found.runs)} in {found.level.better}"
    if number == 1:
        return text
    fewer = replace(request, max_devices=number - 1)
    held = max(search.most_layers() for search in searches(fewer))
    return f"{text} ({number - 1}: {min(held, num_layers)})"


def tables() -> Iterator[str]:
    """Of each model, workload and KV format."""
    for name, title in MODELS.items():
        model = model_config(name)
        yield f"## {title}, {model.num_layers} layers"
        yield ""
        for sequences in (1, 8):
            for kv in ("int8", "auto"):
                label = "int8" if kv == "int8" else "bf16"
                yield f"{sequences} × {CONTEXT:,} tokens, KV cache in {label}:"
                yield ""
                yield "| device | " + " | ".join(column.title for column in COLUMNS) + " |"
                yield "|---|" + "---|" * len(COLUMNS)
                for device in DEVICES:
                    cells = [
                        cell(request_for(model, device, column.formats, sequences, kv))
                        for column in COLUMNS
                    ]
                    yield f"| {device} | " + " | ".join(cells) + " |"
                yield ""


def claims() -> Iterator[str]:
    """Published counts beside ours, and each plan with its proof."""
    yield "## Beside published counts"
    yield ""
    yield "| model | published | here | formats | tokens |"
    yield "|---|---|---|---|---|"
    details: list[str] = []
    for claim in CLAIMS:
        request = request_for(
            model_config(claim.model), claim.device, claim.formats, claim.sequences, claim.kv
        )
        found = solve(request)
        title = MODELS[claim.model]
        if found is None:
            raise SystemExit(f"{title} does not fit on {MOST_DEVICES} {claim.device}")
        plan = make_plan(claim.model, request, found)
        number = len(plan.stages)
        if number > claim.aim:
            raise SystemExit(f"{title}: {number} {claim.device}, and {claim.aim} are aimed at")
        yield (
            f"| {title} | {claim.published} | {number} × {claim.device} | "
            f"{plan.bits_per_weight:.2f} bits ({', '.join(claim.formats)}) | "
            f"{claim.sequences} × {CONTEXT:,} |"
        )
        details += ["```", report(request, plan, explain(request, found, plan)), "```", ""]
    yield ""
    yield "As `tightfit plan --spare quality` prints them, with why one device less does not do:"
    yield ""
    yield from details


def beside_equal_split() -> Iterator[str]:
    """Tokens that the stages of a mixed lot hold, by plan and by equal numbers of layers."""
    yield "## Beside a split by number of layers"
    yield ""
    yield "On inventories of unequal devices, all layers in `int4`: the KV tokens of the worst"
    yield "stage by plan, and when the same devices, in the best order, get equal numbers of layers"
    yield "(the roomiest those that are left over)."
    yield ""
    yield "| model | inventory | devices | layers by plan | tokens | equal | tokens |"
    yield "|---|---|---|---|---:|---|---:|"
    for name in ("bloom-176b", "opt-175b"):
        for lot in LOTS:
            yield _equal_split_row(name, lot)
    yield ""


def _equal_split_row(name: str, lot: str) -> str:
    model = model_config(name)
    inventory = read_inventory(CONFIGS / "inventories" / f"{lot}.yaml")
    request = PlanRequest(model=model, inventory=inventory, context=CONTEXT, formats=("int4",))
    found = solve(request)
    if found is None:
        return f"| {MODELS[name]} | {lot} | does not fit | | | | |"
    plan = make_plan(name, request, found)
    share, left = divmod(model.num_layers, len(plan.stages))
    rooms = [found.packer.classes[run.device_class].room for run in found.runs]
    roomiest = sorted(range(len(rooms)), key=lambda i: -rooms[i])[:left]
    counts = {i: share + (i in roomiest) for i in range(len(rooms))}
    tokens = max(
        _worst_tokens(found, order, [counts[i] for i in order])
        for order in permutations(range(len(rooms)))
    )
    equal = ", ".join(str(counts[i]) for i in range(len(rooms)))
    return (
        f"| {MODELS[name]} | {lot} | {', '.join(s.type for s in plan.stages)} | "
        f"{', '.join(str(s.num_layers) for s in plan.stages)} | {plan.kv_tokens:,} | {equal} | "
        f"{f'{tokens:,}' if tokens >= 0 else 'weights do not fit'} |"
    )


def _worst_tokens(found: Solution, order: Sequence[int], counts: Sequence[int]) -> int:
    """Of stages on the plan's devices, in an order, with so many layers each."""
    blocks, first = [], 0
    for i, count in zip(order, counts, strict=True):
        run = Run(found.runs[i].device_class, first, first + count, 0)
        blocks.append(found.packer.spare_blocks(run))
        first += count
    return min(blocks) * 16


def document() -> str:
    """docs/fit.md: what is written by hand, and what is computed."""
    head, _, _ = DOCUMENT.read_text().partition(MARK)
    return "\n".join([head + MARK, "", *claims(), *beside_equal_split(), *tables()]).rstrip() + "\n"


def main() -> int:
    """Write or check the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args()
    text = document()
    if not args.check:
        DOCUMENT.write_text(text)
        return 0
    if DOCUMENT.read_text() != text:
        print("docs/fit.md is not what tools/fit_report.py writes: run `make fit`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
