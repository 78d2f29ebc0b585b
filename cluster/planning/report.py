"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.cluster.planning.explain import Explanation
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.planning.replicas import Replicas
from tightfit.cluster.planning.request import PlanRequest
from tightfit.cluster.units import format_bytes

LEAST_CAPABILITY = 8.0
"""Of CUDA, for which there are stages."""
HEADINGS = (
    "stage", "device", "type", "layers", "formats", "weights", "KV cache", "workspace", "left",
    "ms/token",
)  # fmt: skip


def report(request: PlanRequest, plan: Plan, explanation: Explanation) -> str:
    """Several lines, without a last line feed."""
    lines = [headline(plan), "", *_table(_rows(plan)), ""]
    lines += [
        f"KV cache       {plan.kv_tokens:,} tokens ({plan.kv_format}); asked for "
        f"{plan.sequences:,} × {plan.context:,}",
        f"embedding      on the {plan.embedding_place}; head in {plan.head_format}",
        f"speed          {1000 * plan.token_s:.1f} ms a token for one sequence, "
        f"{plan.tokens_per_s:,.1f} tokens/s for {plan.sequences}, prompts at "
        f"{plan.prefill_tokens_per_s:,.0f} tokens/s: {_by(plan)}",
        f"cost           ${plan.dollars_per_hour:.2f} an hour, {plan.watts:,.0f} W",
        f"binds          {explanation.binds}",
        f"no cheaper     {explanation.proof}",
    ]
    lines += [f"but with       {remedy}" for remedy in explanation.remedies]
    lines.append(f"in 16 bits     {_baseline(explanation)}")
    return "\n".join([*lines, *_notes(request, plan)])


def replica_lines(replicas: Replicas) -> str:
    """Below the report of the first pipeline, what further ones there are."""
    total = sum(plan.tokens_per_s for plan in replicas.plans)
    lines = [
        f"replicas       {len(replicas.plans)}, {total:,.1f} tokens/s in all; {replicas.proof}"
    ]
    for number, plan in enumerate(replicas.plans[1:], start=2):
        lines += ["", f"replica {number}: {headline(plan)}", "", *_table(_rows(plan))]
    return "\n".join(lines)


def _by(plan: Plan) -> str:
    """What times are by."""
    rates = "by measured rates" if plan.is_measured else "at best, by the devices' data sheets"
    return f"{rates}, {'links counted' if plan.has_links else 'links cost nothing'}"


def headline(plan: Plan) -> str:
    """The model and its devices in one line."""
    kinds = dict.fromkeys(stage.type for stage in plan.stages)
    counted = ", ".join(f"{sum(s.type == kind for s in plan.stages)} × {kind}" for kind in kinds)
    return f"{plan.model} on {counted}: {plan.bits_per_weight:.2f} bits per weight"


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    times = plan.step_s(1)
    return [
        (
            str(number),
            stage.device,
            stage.type,
            f"{stage.first_layer}-{stage.end_layer - 1}",
            stage.formats,
            format_bytes(stage.weight_bytes),
            format_bytes(stage.kv_bytes),
            format_bytes(stage.workspace_bytes),
            format_bytes(stage.headroom_bytes),
            f"{1000 * times[number]:.1f}",
        )
        for number, stage in enumerate(plan.stages)
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they need; numbers, from the sixth on, to the right."""
    widths = [max(len(row[i]) for row in (HEADINGS, *rows)) for i in range(len(HEADINGS))]
    return [
        "  ".join(
            cell.rjust(width) if i >= 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (HEADINGS, *rows)
    ]


def _baseline(explanation: Explanation) -> str:
    base = explanation.baseline
    if base.devices is None:
        return f"does not fit on any 64 {base.type}"
    return (
        f"{base.devices} × {base.type}, ${base.dollars_per_hour:.2f} an hour, {base.watts:,.0f} W"
    )


def _notes(request: PlanRequest, plan: Plan) -> list[str]:
    """What is planned and cannot be served yet."""
    old = {
        device.type.name
        for device in request.inventory.devices
        if device.type.capability is not None and device.type.capability < LEAST_CAPABILITY
    }
    used = sorted(old & {stage.type for stage in plan.stages})
    if not used:
        return []
    return [f"note           stages do not run on {', '.join(used)} yet: planned only"]
