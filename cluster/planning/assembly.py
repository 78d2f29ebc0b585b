"""Makes a plan of what the planner found: which very device holds which layers, and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.inventory import Device
from tightfit.cluster.planning.layout import Packer, Run
from tightfit.cluster.planning.memory import Parts, Reads
from tightfit.cluster.planning.packing import packer_for
from tightfit.cluster.planning.plan import Plan, StagePlan
from tightfit.cluster.planning.planner import Solution, solve
from tightfit.cluster.planning.rates import Rates, dump_curve
from tightfit.cluster.planning.request import (
    PlanRequest,
    Variant,
    layer_formats,
    parts_of,
)
from tightfit.kernels.formats import BYTES_PER_ELEMENT, Format
from tightfit.workers.shard_bytes import bits_per_weight

K = TypeVar("K")


def make_plan(name: str, request: PlanRequest, solution: Solution | None = None) -> Plan:
    """The best plan.

    Args:
        name: of the model, as the plan is to give it.
        request: what is asked for.
        solution: of `solve`, where it is there already.

    Raises:
        PlacementError: there is none. `explain.why_not` says why.
    """
    found = solve(request) if solution is None else solution
    if found is None:
        raise PlacementError(f"{name} does not fit on these devices")
    devices = _devices(found)
    kind = devices[0].type.kind
    variant, packer = _with_embedding_on_device(request, found, kind)
    formats = layer_formats(request, variant, found.level.format, kind)
    level, num_better = found.level, sum(run.num_better for run in found.runs)
    layers = range(request.model.num_layers)
    bits = bits_per_weight(request.model, formats, layers)
    if level.better is not None:
        bits += (level.better_bits - level.format_bits) * num_better / len(layers)
    return Plan(
        model=name,
        num_layers=len(layers),
        bits_per_weight=round(bits, 4),
        embedding_place=variant.embedding_place,
        head_format=str(formats.head),
        kv_format=str(formats.kv),
        block_size=request.block_size,
        max_batch_tokens=request.max_batch_tokens,
        sequences=request.sequences,
        context=request.context,
        kv_blocks=found.kv_blocks,
        hidden_bytes=request.model.hidden_size * BYTES_PER_ELEMENT[formats.activations],
        return_us=request.inventory.link(devices[-1].node, devices[0].node).latency_us,
        stages=tuple(
            _stage(request, found, packer, run, device, before)
            for run, device, before in zip(
                found.runs, devices, [devices[0], *devices[:-1]], strict=True
            )
        ),
    )


def _stage(
    request: PlanRequest,
    found: Solution,
    packer: Packer,
    run: Run,
    device: Device,
    before: Device,
) -> StagePlan:
    """`before`: what its micro-batches come from; of the first stage itself, as the control plane
    is taken to be on its node."""
    better, rest = run.num_better, run.end - run.first - run.num_better
    words = [f"{found.level.better}*{better}"] if better else []
    words += [f"{'mix' if request.mix else found.level.format}*{rest}"] if rest else []
    parts = packer.parts
    # Only LLM.int8() multiplies integers; all other formats are widened first.
    is_int8 = Format.LLM_INT8 in (found.level.format, found.level.better)
    layer_ms, head_ms = _measured(parts, run, device.type.rates)
    link = request.inventory.link(before.node, device.node)
    return StagePlan(
        device=device.device_id,
        node=device.node,
        type=device.type.name,
        first_layer=run.first,
        end_layer=run.end,
        formats=" ".join(words),
        weight_bytes=packer.weight_bytes(run),
        layer_bytes=sum(parts.layers[run.first : run.end]) + better * parts.step,
        kv_bytes=found.kv_blocks * parts.kv_block * (run.end - run.first),
        workspace_bytes=parts.workspace,
        usable_bytes=request.inventory.usable(device),
        gb_per_s=device.type.gb_per_s,
        read_bytes=packer.read_bytes(run),
        num_weights=(run.end - run.first) * request.model.largest_layer_elements,
        head_weights=_head_weights(request, run),
        tera_ops=device.type.int8_tops if is_int8 else device.type.fp16_tflops,
        price=device.price,
        watts=device.type.watts,
        layer_ms=layer_ms,
        head_ms=head_ms,
        link_us=link.latency_us,
        link_gb_per_s=link.gb_per_s,
        kind=device.type.kind,
        uuid=device.uuid,
    )


def _head_weights(request: PlanRequest, run: Run) -> int:
    model = request.model
    return model.vocab_size * model.embedding_size if run.end == model.num_layers else 0


def _measured(parts: Parts, run: Run, rates: Rates) -> tuple[str | None, str | None]:
    """Times of a stage's layers and head, where its formats were measured; as a plan has them."""
    reads = [parts.kinds[parts.kind[i]] for i in range(run.first, run.end)]
    if run.num_better:
        reads[: run.num_better] = parts.better_kinds * run.num_better
    has_head = run.end == len(parts.layers)
    layers, head = _by_format(reads), _by_format([parts.head_reads])
    if not rates.covers(layers.keys() | (head.keys() if has_head else set())):
        return None, None
    return (
        dump_curve(rates.curve(layers)),
        dump_curve(rates.curve(head)) if has_head else None,
    )


def _by_format(reads: Sequence[Reads]) -> dict[str, int]:
    """Bytes of linear layers."""
    found: Counter[str] = Counter()
    for one in reads:
        found.update(dict(one.linears))
    return dict(found)


def _with_embedding_on_device(
    request: PlanRequest, found: Solution, kind: str
) -> tuple[Variant, Packer]:
    """The embedding on its stage's device, where that is allowed and costs nothing that counts."""
    if found.variant.embedding_place == "device" or "device" not in request.embedding_places:
        return found.variant, found.packer
    variant = Variant(embedding_place="device", kv_format=found.variant.kv_format)
    packer = packer_for(
        parts_of(request, variant, found.level, kind),
        found.packer.classes,
        found.choice.counts,
    )
    is_same = all(packer.spare_blocks(run) >= found.kv_blocks for run in found.runs)
    is_same = is_same and packer.parts.workspace == found.packer.parts.workspace
    return (variant, packer) if is_same else (found.variant, found.packer)


def _devices(found: Solution) -> list[Device]:
    """One of its class for each stage."""
    wanted = Counter(run.device_class for run in found.runs)
    members = {n: found.pools.members(found.packer.classes[n], found.pace) for n in wanted}
    # Stages of one class lie next to each other on a node where they can.
    queues = {n: iter(devices) for n, devices in on_few_nodes(wanted, members).items()}
    return [next(queues[run.device_class]) for run in found.runs]


def on_few_nodes(
    wanted: Mapping[K, int], members: Mapping[K, Sequence[Device]]
) -> dict[K, list[Device]]:
    """So many devices of each class, on as few nodes as come by taking the most useful first.

    Args:
        wanted: of each class, how many.
        members: of each class that is wanted, at least as many.
    """
    missing, rest = dict(wanted), dict(members)
    taken: dict[K, list[Device]] = {n: [] for n in missing}
    while any(missing.values()):
        node = _most_useful_node(missing, rest)
        for n, devices in rest.items():
            here = [device for device in devices if device.node == node][: missing[n]]
            taken[n] += here
            missing[n] -= len(here)
            rest[n] = [device for device in devices if device.node != node]
    return taken


def _most_useful_node(wanted: Mapping[K, int], members: Mapping[K, Sequence[Device]]) -> str:
    """The node with most devices that are still wanted; of several, the first in the inventory."""
    useful: dict[str, int] = {}
    for n, devices in members.items():
        for node, count in Counter(device.node for device in devices).items():
            useful[node] = useful.get(node, 0) + min(count, wanted[n])
    return max(useful, key=lambda node: useful[node])
