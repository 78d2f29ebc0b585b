"""Why a plan is as it is: what binds, what one device less lacks, what would make a model fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from tightfit.cluster.planning.inventory import Device, Inventory
from tightfit.cluster.planning.memory import DEVICE_CONTEXT_BYTES
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.planning.planner import Search, Solution, fits, last_that, searches, solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.units import format_bytes
from tightfit.kernels.formats import Format
from tightfit.workers.model_formats import AUTO

LESSER = (Format.INT8, Format.INT4, Format.INT3)
"""Formats that may be proposed, most bits first."""
MOST_DEVICES_MORE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What the model takes in 16 bits throughout."""

    type: str
    """Of device: the roomiest of the inventory."""
    devices: int | None
    """None: more than 64, or no device holds a layer."""
    dollars_per_hour: float
    watts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Beside a plan."""

    binds: str
    """The stage that limits the KV cache."""
    proof: str
    """Why it cannot be cheaper."""
    remedies: tuple[str, ...]
    """What would make one device less do, each alone."""
    baseline: Baseline


def explain(request: PlanRequest, solution: Solution, plan: Plan) -> Explanation:
    """What there is to say of a plan."""
    remedies: tuple[str, ...] = ()
    if request.objective is Objective.DEVICES and len(plan.stages) > 1:
        fewer = replace(request, max_devices=len(plan.stages) - 1)
        proof = f"one device less does not do: {shortfall(fewer)}"
        remedies = tuple(_remedies(fewer, may_add=False))
    elif request.objective is Objective.DEVICES:
        proof = "fewer than one device there is not"
    else:
        proof = _dollar_proof(request, solution)
    return Explanation(
        binds=_binding(solution, plan),
        proof=proof,
        remedies=remedies,
        baseline=baseline(request),
    )


def why_not(name: str, request: PlanRequest) -> str:
    """What binds first where nothing fits, and the smallest changes that would do."""
    changes = list(_remedies(request, may_add=True))
    remedy = (
        "It would fit with " + ", or with ".join(changes)
        if changes
        else "No single change of formats, KV cache or up to "
        f"{MOST_DEVICES_MORE} devices more would do"
    )
    return f"{name} does not fit: {shortfall(request)}. {remedy}"


# -- proofs ----------------------------------------------------------------------------------


def shortfall(request: PlanRequest) -> str:
    """What lacks where the request cannot be met: by the node and formats that come closest."""
    if request.max_dollars is not None:
        cheapest = solve(replace(request, max_dollars=None, objective=Objective.DOLLARS))
        if cheapest is not None:
            return (
                f"the cheapest devices that would do cost ${cheapest.score.cost[0] / 1e6:.2f} an "
                f"hour, and ${request.max_dollars:.2f} are allowed"
            )
    # Not even without constraints on price and layers, or because of the latter.
    request = replace(request, max_dollars=None, objective=Objective.DEVICES)
    if request.pins:
        request, pinned = replace(request, pins={}), request
        if fits(request):
            return f"not with layers pinned to {', '.join(sorted(pinned.pins))}"
    closest = max((_Shortfall.of(search) for search in searches(request)), key=_Shortfall.rank)
    return closest.text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shortfall:
    held: int
    """Most layers that fit."""
    lacks: int
    """Bytes of the others."""
    text: str

    def rank(self) -> tuple[int, int]:
        return self.held, -self.lacks

    @classmethod
    def of(cls, search: Search) -> _Shortfall:
        parts, request = search.parts, search.request
        blocks, num_layers = request.needed_blocks, len(parts.layers)
        each = min(parts.layers) + blocks * parts.kv_block
        roomiest = max(one.room for group in search.pools.groups for one in group)
        if roomiest < each:
            device = max(
                (one for group in search.pools.groups for one in group), key=lambda one: one.room
            ).device
            usable = request.inventory.usable(device)
            return cls(
                held=0,
                lacks=each + parts.workspace - usable,
                text=f"no device holds one layer: {device.device_id} ({device.type.name}) has "
                f"{format_bytes(usable)} to use, and a layer takes "
                f"{format_bytes(min(parts.layers))} in {search.level.format}, "
                f"{format_bytes(blocks * parts.kv_block)} for its KV cache and "
                f"{format_bytes(parts.workspace)} for workspace",
            )
        held = min(search.most_layers(), num_layers)
        if held == num_layers and search.level.min_better:
            return cls(
                held=held,
                lacks=0,
                text=f"{_subject(search)} hold the model in {search.level.format}, but not with "
                f"{search.level.min_better} of its {num_layers} layers in {search.level.better}",
            )
        missing = sum(parts.layers[held:]) + (num_layers - held) * blocks * parts.kv_block
        missing += parts.head
        kv = "int8 KV cache" if search.variant.kv_format == "int8" else "KV cache"
        return cls(
            held=held,
            lacks=missing,
            text=f"{_subject(search)} hold at most {held} of {num_layers} layers in "
            f"{search.level.format} with {kv} for {blocks * request.block_size:,} tokens, and lack "
            f"{format_bytes(missing)} for the rest and the head",
        )


def _subject(search: Search) -> str:
    """The devices that were tried: no others hold more."""
    there, most = search.pools.num_devices, search.request.max_devices
    if most is None or most >= there:
        return f"all {there} devices" if there > 1 else "the one device would"
    return f"the roomiest {most}" if most > 1 else "the roomiest alone would"


def _dollar_proof(request: PlanRequest, solution: Solution) -> str:
    limit = solution.score.cost
    tried = sum(
        1
        for search in searches(request)
        for _ in takewhile(lambda choice: choice.cost < limit, search.choices())
    )
    start = f"of the choices of devices for less than ${limit[0] / 1e6:.2f} an hour"
    if tried == 0:
        return f"{start} none has room for so many layers, whole layers being counted"
    return f"{start} {tried} had room for so many layers by number, and none for all parts"


def _binding(solution: Solution, plan: Plan) -> str:
    spare = [solution.packer.spare_blocks(run) for run in solution.runs]
    number = spare.index(min(spare))
    stage = plan.stages[number]
    return (
        f"stage {number} ({stage.device}) has room for {plan.kv_tokens:,} tokens and no more: "
        f"{format_bytes(stage.headroom_bytes)} are left, one block of {plan.block_size} tokens "
        f"takes {format_bytes(stage.kv_bytes / plan.kv_blocks)}"
    )


# -- what would do -----------------------------------------------------------------------------


def _remedies(request: PlanRequest, *, may_add: bool) -> Iterator[str]:
    """Single changes that would make an unfit request fit, those that cost least quality first."""
    if request.max_dollars is not None and (dollars := _enough_dollars(request)):
        yield dollars
    if request.pins and fits(replace(request, pins={})):
        yield "no layers pinned"
    if "host" not in request.embedding_places:
        host = replace(request, embedding_places=("host",))
        if fits(host):
            yield "the embedding on the host"
    if "int8" not in request.kv_formats and fits(replace(request, kv_formats=("int8",))):
        yield "keys and values in int8"
    if fits(replace(request, sequences=1, context=1)):
        blocks = _most_needed_blocks(request)
        yield (
            f"KV cache for {blocks * request.block_size:,} tokens instead of "
            f"{request.needed_blocks * request.block_size:,}"
        )
    if lesser := _lesser_formats(request):
        yield lesser
    if may_add and (more := _more_devices(request)):
        yield more


def _enough_dollars(request: PlanRequest) -> str | None:
    found = solve(replace(request, max_dollars=None, objective=Objective.DOLLARS))
    return None if found is None else f"${found.score.cost[0] / 1e6:.2f} an hour"


def _most_needed_blocks(request: PlanRequest) -> int:
    def works(blocks: int) -> bool:
        return fits(replace(request, sequences=blocks, context=1))

    return last_that(works, 1, request.needed_blocks - 1)


def _lesser_formats(request: PlanRequest) -> str | None:
    """As few layers as possible in the next formats down."""
    if AUTO in request.formats or request.mix is not None:
        return None
    lowest = next((fmt for fmt in reversed((Format.BF16, *LESSER)) if fmt in request.formats), None)
    below = (
        LESSER if lowest is Format.BF16 else LESSER[LESSER.index(lowest) + 1 :] if lowest else ()
    )
    above = lowest
    for fmt in below:
        mixed = replace(
            request, formats=(fmt, str(above)), is_mixed=True, min_bits=0.0, spare=Spare.QUALITY
        )
        found = solve(mixed)
        if found is not None:
            better = sum(run.num_better for run in found.runs)
            num_layers = request.model.num_layers
            rest = f" and {above} for the others" if better else ""
            return f"{fmt} for {num_layers - better} of the {num_layers} layers{rest}"
        above = fmt
    return None


def _more_devices(request: PlanRequest) -> str | None:
    """Fewest more of the roomiest type, on the node of one."""
    inventory = request.inventory
    free = [d for d in inventory.devices if d.device_id not in request.pins]
    free = [d for d in free if request.exclude.isdisjoint((d.device_id, d.node, d.type.name))]
    if not free:
        return None
    model = max(free, key=inventory.usable)

    def fits_with(number: int) -> bool:
        more = _copies(model, number)
        wider = replace(inventory, devices=(*inventory.devices, *more))
        limit = request.max_devices
        allowed = None if limit is None else limit + number
        return fits(replace(request, inventory=wider, max_devices=allowed))

    if not fits_with(MOST_DEVICES_MORE):
        return None
    number = 1 + last_that(lambda n: not fits_with(n), 0, MOST_DEVICES_MORE)
    return f"{number} more {model.type.name}"


def _copies(device: Device, number: int) -> list[Device]:
    """More devices like one that nobody else uses."""
    idle = device.total_bytes - (DEVICE_CONTEXT_BYTES if device.type.kind == "gpu" else 0)
    return [
        replace(device, device_id=f"{device.node}:more-{i}", free_bytes=max(0, idle))
        for i in range(number)
    ]


def baseline(request: PlanRequest) -> Baseline:
    """The fewest of the inventory's roomiest type that hold all in 16 bits, KV cache too."""
    model = max(request.inventory.devices, key=lambda device: device.total_bytes)
    found = solve(
        PlanRequest(
            model=replace(request.model, stored=None),
            inventory=Inventory(
                devices=tuple(_copies(model, MOST_DEVICES_MORE)), reserve=request.inventory.reserve
            ),
            sequences=request.sequences,
            context=request.context,
            formats=(Format.BF16,),
            kv_formats=(AUTO,),
            embedding_places=("device",),
            block_size=request.block_size,
            max_batch_tokens=request.max_batch_tokens,
        )
    )
    number = None if found is None else len(found.runs)
    return Baseline(
        type=model.type.name,
        devices=number,
        dollars_per_hour=(number or 0) * model.price,
        watts=(number or 0) * model.type.watts,
    )
