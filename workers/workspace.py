"""Bytes that a step needs besides weights and KV cache, from shapes alone. No torch: the planner
and the stage share these formulas, and a stage holds them against what it measures.

T tokens, B sequences, H heads, D head size, S context, K in, N out. Each is the most that is alive
at once: in the attention of a chunk at the end of the longest context, in a decode of as many
sequences, in an MLP, or in the head. What the two kinds of device share is little. On a CPU there
are masks, and keys and values are gathered; the kernels of a GPU need neither, but have partial
sums, weights dequantised for cuBLAS, and graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tightfit.kernels.formats import KV_SCALE_BYTES, WEIGHT_BITS, Format, KVFormat
from tightfit.workers.decoder_config import DecoderConfig, Position
from tightfit.workers.model_formats import BLOCK_ROLES, ModelFormats, Role
from tightfit.workers.shard_bytes import act_bytes, linear_shapes

MAX_LOGIT_ROWS: Final = 64
"""Rows of logits in memory at once; more are computed in several goes."""
GATHER_ELEMENTS: Final = 2**21
"""Keys and values that decodes gather at a time, in elements: what stays in cache until it is
multiplied."""

INDEX_BYTES: Final = 8
"""Of torch's whole numbers: positions, and the places of KV blocks."""
MASK_TEMPORARY_BYTES: Final = INDEX_BYTES + 4 + 4 + 1
"""Of one place of a mask while it is made: a distance, its bias, both together, and whether it is
hidden."""

CPU_SCRATCH_ELEMENTS: Final = 2**21
"""Weights that `kernels.cpu` widens at a time."""
CPU_SCRATCH_ROWS: Final = 64
"""Rows of them at least."""
WIDENING_BYTES: Final = 12
"""What `kernels.cpu.bind_dequantized` takes for a weight of 3 bits, whose pieces are int32 before
they are bf16 (measured: 10.8 bytes; 4 bits take about 6)."""
CPU_OUTLIER_EVERY: Final = 32
"""Of so many columns of a weight LLM.int8() widens one at most, to int8 and then to fp32 (models
from 6.7B on have one in 500; random weights of OPT-175B's width about one in 60)."""
CPU_PACKED_FROM: Final = 2**24
"""Weights of a layer in int8 from which on `kernels.packed_int8` may pack it."""
CPU_DIGIT_TOKENS: Final = 128
"""Tokens of which it multiplies the digits at a time."""
HEAP_SLACK_BYTES: Final = 64 * 2**20
"""Freed memory that the C library keeps: it gives the top of its heap back from twice the mmap
threshold on, which is 32 MiB once that much was freed."""
FRAGMENTS: Final = 8
"""How often the scratch of widening lies about in the heap, freed, between what is in use
(measured with 3 bits: 8 times)."""

GRAPH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of tokens that graphs of decodes are captured for."""
FIRST_CONTEXT: Final = 2048
"""Longest context of the graphs that are captured before anything is served; later ones are for
powers of two above it."""
GPU_DEQUANTIZED_ELEMENTS: Final = 2**26
"""Weights that the GPU's kernels dequantise at a time for many tokens."""
GPU_SPLIT_TOKENS: Final = 64
"""Tokens up to which they split K and add the partial sums."""
GPU_SPLIT_COLUMNS: Final = 2 * 640 * 128
"""Splits · N at most: K is split until there are 640 programs of 128 columns, so that the last
doubling begins with fewer."""
GPU_SPLIT_DECODES: Final = {"sums": 4096, "grouped": 512}
"""Programs of paged attention up to which a decode's context is split, by kernel."""
GPU_LOGIT_BYTES: Final = 4 + 4 + 4 + 8
"""Of a logit while tokens are drawn: as it came, with its bias and penalties, in one piece with
the others, and the sampler's weight and key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest micro-batch that a stage can be given."""

    num_tokens: int
    """T."""
    context: int
    """S."""
    num_sequences: int
    """B of a decode."""
    block_size: int
    """Tokens in a KV block."""


def workspace_bytes(
    config: DecoderConfig,
    formats: ModelFormats,
    max_batch_tokens: int,
    *,
    max_context: int | None = None,
    max_sequences: int | None = None,
    block_size: int = 16,
    has_head: bool = True,
) -> int:
    """Most bytes of activations, masks, logits and scratch alive at once in a step (an upper
    estimate).

    Args:
        config: the decoder.
        formats: of its parts; they say on which kind of device it is.
        max_batch_tokens: most tokens in a micro-batch.
        max_context: most tokens of a sequence; None: as many as the model can take.
        max_sequences: most sequences in a micro-batch; None: one for each token.
        block_size: tokens in a KV block.
        has_head: whether the stage computes logits, too.
    """
    limits = StepLimits(
        num_tokens=max_batch_tokens,
        context=min(max_context or config.max_position, config.max_position),
        num_sequences=min(max_sequences or max_batch_tokens, max_batch_tokens),
        block_size=block_size,
    )
    step = _gpu_bytes if formats.on_gpu else _cpu_bytes
    return step(config, formats, limits, has_head=has_head)


def _widths(config: DecoderConfig, formats: ModelFormats) -> tuple[int, int]:
    """Bytes of a token in attention and in the MLP, at most: its hidden state, the residual and
    their norm, what comes out of the linear layers, and what is made of it."""
    hidden, attended = config.hidden_size, config.num_heads * config.head_dim
    rotated = attended + config.num_kv_heads * config.head_dim if config.rope else 0
    attention = config.qkv_out + max(rotated, 3 * attended)
    mlp = 2 * config.mlp_up_out + hidden
    act = act_bytes(formats)
    return (3 * hidden + attention) * act, (3 * hidden + mlp) * act


def _block_linears(
    config: DecoderConfig, formats: ModelFormats, *, has_head: bool
) -> list[tuple[Format, int, int]]:
    """(format, N, K) of the linear layers, each that occurs once."""
    shapes = {role: (n_out, n_in) for role, n_out, n_in, _ in linear_shapes(config)}
    found = {
        (formats.scheme(role, layer).format, *shapes[role])
        for layer in range(config.num_layers)
        for role in BLOCK_ROLES
    }
    if has_head:
        head = formats.scheme(Role.HEAD, None).format
        found.add((head, config.vocab_size, config.embedding_size))
    return sorted(found)


# -- on a CPU --------------------------------------------------------------------------------


def _cpu_bytes(
    config: DecoderConfig, formats: ModelFormats, limits: StepLimits, *, has_head: bool
) -> int:
    attention, mlp = _widths(config, formats)
    num_tokens, num_sequences = limits.num_tokens, limits.num_sequences
    linears = _block_linears(config, formats, has_head=False)
    scratch = max(_cpu_scratch(*linear, num_tokens) for linear in linears)
    kept = max(_cpu_kept(*linear) for linear in linears)
    chunk = _chunk_mask_bytes(config, formats, limits) + max(
        num_tokens * attention + _gathered_bytes(config, formats, limits, limits.context),
        num_tokens * mlp + scratch,
    )
    decode = _decode_mask_bytes(config, limits) + max(
        num_sequences * attention + _gathered_bytes(config, formats, limits, 1),
        num_sequences * mlp + scratch,
    )
    head = 0
    if has_head:
        fmt = formats.scheme(Role.HEAD, None).format
        shape = (config.vocab_size, config.embedding_size)
        logits = 3 * MAX_LOGIT_ROWS * config.vocab_size * 4
        rows = num_tokens * config.hidden_size * act_bytes(formats)
        head = rows + logits + _cpu_scratch(fmt, *shape, MAX_LOGIT_ROWS)
        kept = max(kept, _cpu_kept(fmt, *shape))
    alive = max(chunk, decode, head)
    # What lies about freed was alive before: beside a small step it is little.
    return alive + min(kept, alive) + min(HEAP_SLACK_BYTES, alive)


def _cpu_scratch(fmt: Format, n_out: int, n_in: int, num_tokens: int) -> int:
    """Of one linear layer besides input and output."""
    piece = min(n_out * n_in, max(CPU_SCRATCH_ELEMENTS, CPU_SCRATCH_ROWS * n_in))
    if fmt in WEIGHT_BITS:
        return piece * WIDENING_BYTES
    if fmt in (Format.FP32, Format.BF16):
        return 0
    widened = max(piece * 2, _cpu_digits(fmt, n_out, n_in, num_tokens))
    if fmt is Format.LLM_INT8:  # sums in int32 and in fp32; |x|, x without outliers, in int8
        outliers = n_out * -(-n_in // CPU_OUTLIER_EVERY) * (1 + 4)
        return max(widened, outliers + num_tokens * (n_out * (4 + 4) + n_in * (2 + 2 + 4 + 1)))
    return widened


def _cpu_digits(fmt: Format, n_out: int, n_in: int, num_tokens: int) -> int:
    """Of a packed layer in int8: two rows for each token, in fp32 and as FBGEMM's bytes, their
    products in int32 and fp32, and what is put together of several goes."""
    if n_out * n_in < CPU_PACKED_FROM:
        return 0
    tokens = num_tokens if fmt is Format.LLM_INT8 else min(num_tokens, CPU_DIGIT_TOKENS)
    return 2 * tokens * (n_in * (4 + 1) + n_out * (4 + 4)) + 2 * num_tokens * n_out * 2


def _cpu_kept(fmt: Format, n_out: int, n_in: int) -> int:
    """Of its scratch, what stays in the heap."""
    return (FRAGMENTS - 1) * _cpu_scratch(fmt, n_out, n_in, 1) if fmt in WEIGHT_BITS else 0


def _chunk_mask_bytes(config: DecoderConfig, formats: ModelFormats, limits: StepLimits) -> int:
    """Of a whole micro-batch of one sequence: with ALiBi each head has its own, else those that
    share a KV head have one, repeated."""
    is_alibi = config.position is Position.ALIBI
    masks = config.num_heads if is_alibi else config.num_heads // config.num_kv_heads + 1
    places = min(limits.num_tokens, limits.context) * limits.context
    return places * (masks * act_bytes(formats) + MASK_TEMPORARY_BYTES)


def _decode_mask_bytes(config: DecoderConfig, limits: StepLimits) -> int:
    """Of as many decodes, in fp32, and where their blocks lie, once for all and once for those that
    are gathered together."""
    is_alibi = config.position is Position.ALIBI
    masks = config.num_heads if is_alibi else config.num_kv_heads
    places = limits.num_sequences * limits.context
    num_blocks = limits.num_sequences * -(-limits.context // limits.block_size)
    tables = 2 * 2 * num_blocks * config.num_kv_heads * INDEX_BYTES
    return places * (masks * 4 + MASK_TEMPORARY_BYTES) + tables


def _gathered_bytes(
    config: DecoderConfig, formats: ModelFormats, limits: StepLimits, context: int
) -> int:
    """Keys and values of one layer as they are written and as they are gathered: a sequence's, or
    some decodes'."""
    per_token = 2 * config.num_kv_heads * config.head_dim
    gathered = max(GATHER_ELEMENTS, context * per_token)
    if formats.kv is not KVFormat.INT8:
        return gathered * act_bytes(formats)
    # Gathered as they lie, then widened; rounded in fp32.
    scales = gathered // config.head_dim * KV_SCALE_BYTES
    rounded = limits.num_tokens * per_token * (4 + 1)
    return gathered * (1 + act_bytes(formats)) + scales + rounded


# -- on a GPU --------------------------------------------------------------------------------


def _gpu_bytes(
    config: DecoderConfig, formats: ModelFormats, limits: StepLimits, *, has_head: bool
) -> int:
    """What torch's allocator gives out at most; its fragments, cuBLAS's own workspace and kernels
    are in the reserve (`gpu_reserve_bytes`)."""
    per_token = max(_widths(config, formats))
    tokens = min(limits.num_tokens, GPU_SPLIT_TOKENS)
    linears = _block_linears(config, formats, has_head=False)
    scratch = max(_gpu_scratch(*linear, limits.num_tokens) for linear in linears)
    few = max(_gpu_scratch(*linear, tokens) for linear in linears)
    attention = _gpu_attention_bytes(config)
    layers = limits.num_tokens * per_token + max(scratch, attention) + _plan_bytes(limits)
    head = 0
    if has_head:
        fmt = formats.scheme(Role.HEAD, None).format
        linear = _gpu_scratch(fmt, config.vocab_size, config.embedding_size, tokens)
        logits = MAX_LOGIT_ROWS * config.vocab_size
        act = act_bytes(formats)
        rows = limits.num_tokens * config.hidden_size * act
        head = rows + max(linear + logits * act, logits * GPU_LOGIT_BYTES)
    # Graphs have a pool of their own, as large as the largest of them needs.
    pool = tokens * per_token + max(few, attention)
    return max(layers, head) + pool + graph_bytes(config, formats, limits)


def _gpu_scratch(fmt: Format, n_out: int, n_in: int, num_tokens: int) -> int:
    """Of one linear layer besides input and output."""
    if fmt in (Format.FP32, Format.BF16):
        return 0
    sums = min(num_tokens, GPU_SPLIT_TOKENS) * GPU_SPLIT_COLUMNS * 4
    if fmt is Format.LLM_INT8:
        return max(sums, num_tokens * (n_in + 4) + n_in * (1 + 4))
    piece = min(n_out * n_in, GPU_DEQUANTIZED_ELEMENTS)
    return max(sums, (piece + num_tokens * piece // n_in) * 2)


def _gpu_attention_bytes(config: DecoderConfig) -> int:
    """Partial results of decodes whose context is split: for each head and part a vector, its
    greatest score and its sum, in fp32."""
    group = config.num_heads // config.num_kv_heads
    heads = max(GPU_SPLIT_DECODES["sums"], GPU_SPLIT_DECODES["grouped"] * group)
    return heads * (config.head_dim + 2) * 4


def _plan_bytes(limits: StepLimits) -> int:
    """Block tables of a micro-batch, and where its tokens are."""
    per_sequence = -(-limits.context // limits.block_size) + 3
    return limits.num_sequences * per_sequence * 4 + limits.num_tokens * 3 * INDEX_BYTES


def graph_bytes(config: DecoderConfig, formats: ModelFormats, limits: StepLimits) -> int:
    """What captured graphs keep: hidden states in and out, positions and slots, and the plan, for
    each number of tokens and each longest context."""
    hidden = 2 * config.hidden_size * act_bytes(formats)
    total, context = 0, min(FIRST_CONTEXT, limits.context)
    while True:
        plan = (-(-context // limits.block_size) + 3) * 4
        per_token = hidden + 2 * INDEX_BYTES + plan
        total += per_token * sum(size for size in GRAPH_SIZES if size <= limits.num_tokens)
        if context >= limits.context:
            return total
        context = min(2 * context, limits.context)
