"""A plan as a picture (SVG): a bar for each device, as long as its memory, and what fills it.

Layers are drawn one by one, as wide as they take bytes, in the colour of their format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate

from tightfit.cluster.planning.plan import Plan, StagePlan, parse_formats
from tightfit.cluster.units import format_bytes

COLOURS = {
    "int3": "#c2410c", "int4": "#d97706", "int8": "#15803d", "llm_int8": "#0f766e",
    "bf16": "#1d4ed8", "fp32": "#4c1d95", "mix": "#92400e",
}  # fmt: skip
"""Of formats; warm ones have few bits."""
OTHER, KV, WORKSPACE, FREE = "#7c8797", "#93c5fd", "#d4d4d8", "#ffffff"
BITS = {"int3": 3, "int4": 4, "int8": 8, "llm_int8": 8, "bf16": 16, "fp32": 32}
"""To divide a stage's layers by; scales are much the same share of all."""

WIDTH, LEFT, TOP, ROW, BAR, LEGEND = 960, 190, 56, 46, 26, 40
FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="#18181b"'


def picture(plan: Plan, *replicas: Plan) -> str:
    """The SVG document of a plan, its replicas below it."""
    stages = [stage for one in (plan, *replicas) for stage in one.stages]
    firsts = accumulate(len(one.stages) for one in (plan, *replicas))
    height = TOP + ROW * len(stages) + LEGEND
    scale = (WIDTH - LEFT - 20) / max(stage.usable_bytes for stage in stages)
    headline = (
        f"{plan.model}: {plan.num_layers} layers, {plan.bits_per_weight:.2f} bits per weight, "
        f"{plan.kv_tokens:,} tokens of {plan.kv_format} keys and values"
        + (f"; {1 + len(replicas)} replicas" if replicas else "")
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">',
        f"<title>{escape(headline)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fafafa"/>',
        f'<text x="16" y="28" font-weight="bold" {FONT}>{escape(headline)}</text>',
    ]
    for number, stage in enumerate(stages):
        lines += _row(stage, TOP + ROW * number, scale)
    lines += [_divider(TOP + ROW * first - (ROW - BAR) // 2) for first in list(firsts)[:-1]]
    return "\n".join([*lines, *_legend(stages, height - LEGEND + 16), "</svg>"]) + "\n"


def _divider(y: int) -> str:
    """Between two replicas."""
    return f'<line x1="16" y1="{y}" x2="{WIDTH - 20}" y2="{y}" stroke="#52525b"/>'


def _row(stage: StagePlan, top: int, scale: float) -> Iterator[str]:
    last = stage.end_layer - 1
    yield (
        f'<text x="16" y="{top + 12}" {FONT}>{escape(stage.device)}  {escape(stage.type)}</text>'
        f'<text x="16" y="{top + 27}" {FONT}>layers {stage.first_layer}–{last}, '
        f"{format_bytes(stage.usable_bytes)}</text>"
    )
    x = float(LEFT)
    for label, size, colour in _segments(stage):
        width = size * scale
        if width > 0:
            yield (
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{BAR}" fill="{colour}" '
                f'stroke="#fafafa" stroke-width="0.5">'
                f"<title>{escape(label)}: {format_bytes(size)}</title></rect>"
            )
        x += width
    yield (
        f'<rect x="{LEFT}" y="{top}" width="{stage.usable_bytes * scale:.2f}" height="{BAR}" '
        'fill="none" stroke="#52525b"/>'
    )


def _segments(stage: StagePlan) -> Iterator[tuple[str, float, str]]:
    """(what, bytes, colour) from the left."""
    runs = parse_formats(stage.formats)
    shares = [BITS.get(name, 1) for name, count in runs for _ in range(count)]
    names = [name for name, count in runs for _ in range(count)]
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        size = stage.layer_bytes * share / sum(shares)
        yield f"layer {stage.first_layer + i}, {name}", size, COLOURS.get(name, OTHER)
    yield "embedding, head", stage.weight_bytes - stage.layer_bytes, OTHER
    yield "KV cache", stage.kv_bytes, KV
    yield "workspace", stage.workspace_bytes, WORKSPACE
    yield "left", stage.headroom_bytes, FREE


def _legend(stages: Sequence[StagePlan], top: int) -> Iterator[str]:
    used = dict.fromkeys(name for stage in stages for name, _ in parse_formats(stage.formats))
    entries = [(f"layers in {name}", COLOURS.get(name, OTHER)) for name in used]
    entries += [("embedding, head", OTHER), ("KV cache", KV), ("workspace", WORKSPACE)]
    x = LEFT
    for label, colour in entries:
        yield (
            f'<rect x="{x}" y="{top - 10}" width="12" height="12" fill="{colour}"/>'
            f'<text x="{x + 18}" y="{top}" {FONT}>{escape(label)}</text>'
        )
        x += 36 + 7 * len(label)
