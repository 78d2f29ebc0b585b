"""Draws one token of each row by temperature, min-p, top-k and top-p, without sorting.

Of a row of logits x [V], with weights w = exp((x - max x) / temperature), the largest 1, in this
order:

- min-p keeps the tokens with w ≥ min_p;
- top-k keeps the k most probable of them; 0, or a k from V on, keeps all;
- top-p keeps the most probable of those, until the ones before have reached top_p of the mass that
  min-p and top-k left: always one at least;
- the token drawn is the first, by id, at which the running mass of the kept ones exceeds u times
  their total.

Ties: of equal weights the lower id counts as the more probable, so that of those at a border the
lowest ids are kept, as many as fit. Weights are equal when their fp32 are: logits that differ may
give equal weights. A token whose weight is 0, as that of a logit of -∞, is never drawn. Temperature
0 draws the lowest id of the largest logit. `workers.sampler` has the same meaning, ties included;
only the last bits of exp may be another device's.

What is kept is a border weight and how many tokens of just that weight. The border is the greatest
value t for which Σ_{w ≥ t} reaches a target: k of 1 for each token, or top_p of the mass. The bits
of non-negative floats order as the floats do, so t is found exactly, two bits of 30 in a round. A
few rounds read the whole row; then the tokens within the interval that is left are copied together,
and the other rounds read those: mostly few.

Masses are whole numbers: each weight as ⌊w · 2^b⌋ in 64 bits, b the greatest for which the row's
total fits 62. Their sums do not depend on an order, so the same row gives the same token in any
batch and on any chip with the same weights, and chips with few fp64 units lose nothing. A total is
off by less than V · 2^-60 of itself, a fp64 sum by up to V · 2^-53.

B rows, V vocabulary. One program takes one row, in a workspace of 8 · V bytes. There are three
kernels, for the weights, the border and the draw, as one of all spills registers. The search is
that of radix select, as in Alabi et al., "Fast k-selection algorithms for graphics processing
units" (ACM JEA 17, 2012), with sums for counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case

SUPPORTED_DTYPES: Final = (torch.float32,)

MAX_VOCABULARY_SIZE: Final = 2**24
"""Leaves 37 bits for each weight, and ids in 32."""

SMALL_VOCABULARY: Final = 4096

KEY_OF_ONE: Final = tl.constexpr(0x3F800000)
"""The bits of 1.0, the largest weight."""
KEY_BITS: Final = tl.constexpr(30)
"""Of the bits of a weight."""
WIDE_ROUNDS: Final = tl.constexpr(3)
"""Rounds that read the whole row: what is left then is a factor of 4 between weights."""
ALL_ROUNDS: Final = tl.constexpr(15)
TOTAL_BITS: Final = tl.constexpr(62)
LEAST_TEMPERATURE: Final = tl.constexpr(1e-30)
"""As `workers.sampler` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up: a program for each row, which it reads in blocks."""

    block: int
    num_warps: int

    def padded(self, vocabulary_size: int) -> int:
        """Elements of a row of the workspace, a whole number of blocks, one of them to spare."""
        return (int(triton.cdiv(vocabulary_size, self.block)) + 1) * self.block


def choose_tile(vocabulary_size: int) -> Tile:
    """By V: 16 bytes in each thread, and many threads, since rows are fewer than processors."""
    if vocabulary_size <= SMALL_VOCABULARY:
        return Tile(block=512, num_warps=4)
    return Tile(block=2048, num_warps=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One token of each row, and what was kept."""

    token_ids: Tensor
    """[B] int64."""
    logprobs: Tensor
    """[B] fp32, natural, by the logits as given: before temperature and filters. NaN tells that a
    row's logits had a NaN or +∞, or no number at all; its token is 0."""
    weights: Tensor
    """[B, V] fp32, relative to the largest; undefined where the temperature is 0."""
    border: Tensor
    """[B] fp32: tokens of larger weights are kept; 1 where the temperature is 0."""
    num_at_border: Tensor
    """[B] int64: tokens of just that weight that are kept, those of the lowest ids; maybe none."""


@triton.jit
def _masses(keys, bits):  # type: ignore[no-untyped-def]
    """⌊w · 2^bits⌋ in int64, of the bits of w ≤ 1; 0 for a w that is not normal."""
    mantissa = ((keys & 0x7FFFFF) | 0x800000).to(tl.int64)
    shift = (keys >> 23) + (bits - 150)  # w = mantissa · 2^(exponent - 150)
    left = mantissa << tl.maximum(shift, 0).to(tl.int64)
    right = mantissa >> tl.minimum(tl.maximum(-shift, 0), 24).to(tl.int64)
    return tl.where(keys < 0x800000, 0, tl.where(shift < 0, right, left))


@triton.jit  # type: ignore[untyped-decorator]
def _survey(x_ptr, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest logit, the lowest id that has it, and whether the row has a NaN."""
    offsets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    best_ids = offsets
    is_bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, V, BLOCK):
        ids = first + offsets
        x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf"))
        is_bad |= (x != x).to(tl.int32)
        best_ids = tl.where(x > best, ids, best_ids)
        best = tl.where(x > best, x, best)
    top = tl.max(best, axis=0)
    return top, tl.min(tl.where(best == top, best_ids, V), axis=0), tl.max(is_bad, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(x_ptr, keys_ptr, V, top, temperature, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the bits of every weight, and zeros behind them to the end of a block.

    Returns the total of the masses, and Σ exp(x - top): the weights' sum at temperature 1.
    """
    offsets = tl.arange(0, BLOCK)
    masses = tl.zeros((BLOCK,), dtype=tl.int64)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, V, BLOCK):
        ids = first + offsets
        x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf")) - top
        sums += tl.exp(x)
        keys = tl.exp(x / temperature).to(tl.int32, bitcast=True)
        tl.store(keys_ptr + ids, keys)
        masses += _masses(keys, bits)
    return tl.sum(masses, axis=0), tl.sum(sums, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _weigh_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr,
    keys_ptr, bits_ptr, token_ptr, normaliser_ptr,
    V, least_bits,
    stride_logits, stride_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the bits of every weight, the most probable token and the logits' normaliser.

    `bits` are those of masses, 0 where nothing is to be drawn; `least_bits` those that leave a
    total below 2^62 whatever the weights.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride_logits
    temperature = tl.load(temperature_ptr + row)
    is_drawn = temperature > 0.0
    top, token, is_bad = _survey(x_ptr, V, BLOCK)
    normaliser = float("nan")
    bits = 0
    if (is_bad == 0) & (tl.abs(top) < float("inf")):
        temperature = tl.where(is_drawn, tl.maximum(temperature, LEAST_TEMPERATURE), 1.0)
        total, sum_exp = _weigh(
            x_ptr, keys_ptr + row * stride_keys, V, top, temperature, least_bits, BLOCK
        )
        normaliser = top + tl.log(sum_exp)
        # total + V bounds what the truncated weights had: with it, how many bits are to spare.
        bound = (total + V).to(tl.float32).to(tl.int32, bitcast=True)
        bits = least_bits + TOTAL_BITS - 1 - ((bound >> 23) - 127)
        bits = tl.where(is_drawn, bits, 0)
    else:
        token = 0
    tl.store(bits_ptr + row, bits)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(normaliser_ptr + row, normaliser)


@triton.jit  # type: ignore[untyped-decorator]
def _sizes(keys, bits, BY_MASS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What tokens count in a search: their mass, or 1."""
    return _masses(keys, bits) if BY_MASS else tl.full(keys.shape, 1, dtype=tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]
    keys_ptr, num_keys, least, before, target, shift, bits,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two bits of the border.

    It lies in [least, least + 4 · 2^shift), and tokens from there on have the size `before` <
    target. Returns the least of its quarter, and the size of the tokens beyond that.

    Keys of 0, with which rows are padded, are in no sum: quarters above the first begin above 0.
    """
    offsets = tl.arange(0, BLOCK)
    step = 1 << shift
    # The sums of the quarters, the first not needed.
    dtype: tl.constexpr = tl.int64 if BY_MASS else tl.int32
    sums_1 = tl.zeros((BLOCK,), dtype=dtype)
    sums_2 = tl.zeros((BLOCK,), dtype=dtype)
    sums_3 = tl.zeros((BLOCK,), dtype=dtype)
    for first in range(0, num_keys, BLOCK):
        keys = tl.load(keys_ptr + first + offsets)
        sizes = _sizes(keys, bits, BY_MASS)
        quarter = (keys - least) >> shift  # negative below
        sums_1 += tl.where(quarter == 1, sizes, 0)
        sums_2 += tl.where(quarter == 2, sizes, 0)
        sums_3 += tl.where(quarter == 3, sizes, 0)
    from_3 = before + tl.sum(sums_3, axis=0)
    from_2 = from_3 + tl.sum(sums_2, axis=0)
    from_1 = from_2 + tl.sum(sums_1, axis=0)
    if from_3 >= target:
        least += 3 * step
    elif from_2 >= target:
        least += 2 * step
        before = from_3
    elif from_1 >= target:
        least += step
        before = from_2
    else:
        before = from_1
    return least, before


@triton.jit  # type: ignore[untyped-decorator]
def _gather(keys_ptr, num_keys, near_ptr, least, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies the keys in [least, end) together, and zeros behind them; returns their number."""
    offsets = tl.arange(0, BLOCK)
    num_near = 0
    for first in range(0, num_keys, BLOCK):
        keys = tl.load(keys_ptr + first + offsets)
        is_near = ((keys >= least) & (keys < end)).to(tl.int32)
        tl.store(near_ptr + num_near - 1 + tl.cumsum(is_near, axis=0), keys, mask=is_near != 0)
        num_near += tl.sum(is_near, axis=0)
    tl.store(near_ptr + num_near + offsets, tl.zeros((BLOCK,), dtype=tl.int32))
    tl.debug_barrier()  # threads read what others have written
    return num_near


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    keys_ptr, num_keys, near_ptr, target, bits,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greatest t for which the keys ≥ t have the size `target` (1 at least, and at most that of
    all), and the size of the keys > t."""
    least = 0
    before = tl.full((), 0, dtype=tl.int64)
    shift = KEY_BITS
    for _ in range(WIDE_ROUNDS):
        shift -= 2
        least, before = _round(
            keys_ptr, num_keys, least, before, target, shift, bits, BY_MASS, BLOCK
        )
    num_near = _gather(keys_ptr, num_keys, near_ptr, least, least + (1 << shift), BLOCK)
    for _ in range(WIDE_ROUNDS, ALL_ROUNDS):
        shift -= 2
        least, before = _round(
            near_ptr, num_near, least, before, target, shift, bits, BY_MASS, BLOCK
        )
    tl.debug_barrier()  # the next search writes where this one reads
    return least, before


@triton.jit  # type: ignore[untyped-decorator]
def _cut_by_rank(keys_ptr, V, near_ptr, top_k, min_p, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Border by min-p and top-k, and how many tokens at it may be kept."""
    border = min_p.to(tl.int32, bitcast=True)
    border = tl.minimum(tl.maximum(border, 1), KEY_OF_ONE)  # weights of 0 are never kept
    quota = tl.full((), V, dtype=tl.int64)
    if (top_k > 0) & (top_k < V):
        # Rows may have fewer than k weights above 0: their border is 0.
        least, before = _search(keys_ptr, V, near_ptr, top_k.to(tl.int64), 0, False, BLOCK)
        if least >= border:
            border = least
            quota = top_k - before
    return border, quota


@triton.jit  # type: ignore[untyped-decorator]
def _cut_kernel(  # type: ignore[no-untyped-def]
    top_k_ptr, top_p_ptr, min_p_ptr,
    keys_ptr, near_ptr, bits_ptr, border_ptr, num_ptr, total_ptr,
    V,
    stride_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: border (bits of a weight), how many tokens at it are kept, the mass of the kept."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * stride_keys
    near_ptr += row * stride_keys
    bits = tl.load(bits_ptr + row)
    border = KEY_OF_ONE
    quota = tl.full((), 1, dtype=tl.int64)
    total = tl.full((), 0, dtype=tl.int64)
    if bits > 0:
        border, quota = _cut_by_rank(
            keys_ptr, V, near_ptr, tl.load(top_k_ptr + row), tl.load(min_p_ptr + row), BLOCK
        )
        offsets = tl.arange(0, BLOCK)
        beyond = tl.zeros((BLOCK,), dtype=tl.int64)
        tied = tl.zeros((BLOCK,), dtype=tl.int32)
        for first in range(0, V, BLOCK):
            keys = tl.load(keys_ptr + first + offsets)
            beyond += tl.where(keys > border, _masses(keys, bits), 0)
            tied += (keys == border).to(tl.int32)
        quota = tl.minimum(quota, tl.sum(tied, axis=0))
        total = tl.sum(beyond, axis=0) + quota * _masses(border, bits)

        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            target = (top_p * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(tl.maximum(target, 1), total)
            border, before = _search(keys_ptr, V, near_ptr, target, bits, True, BLOCK)
            mass = _masses(border, bits)
            quota = (target - before + mass - 1) // mass  # as target ≤ total, top-k's at most
            total = before + quota * mass
    tl.store(border_ptr + row, border)
    tl.store(num_ptr + row, quota)
    tl.store(total_ptr + row, total)


@triton.jit  # type: ignore[untyped-decorator]
def _invert(keys_ptr, V, border, quota, target, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Id of the first token at which the kept ones' running mass exceeds `target`."""
    offsets = tl.arange(0, BLOCK)
    at_border = _masses(border, bits)
    first = 0
    mass = tl.full((), 0, dtype=tl.int64)  # before `first`, of the kept ones
    is_found = False
    while (not is_found) & (first < V):
        keys = tl.load(keys_ptr + first + offsets)
        tied = tl.minimum(tl.sum((keys == border).to(tl.int64), axis=0), quota)
        here = tl.sum(tl.where(keys > border, _masses(keys, bits), 0), axis=0) + tied * at_border
        is_found = mass + here > target
        if not is_found:
            mass += here
            quota -= tied
            first += BLOCK
    keys = tl.load(keys_ptr + first + offsets)
    is_tied = keys == border
    is_kept = (keys > border) | (is_tied & (tl.cumsum(is_tied.to(tl.int64), axis=0) <= quota))
    running = mass + tl.cumsum(tl.where(is_kept, _masses(keys, bits), 0), axis=0)
    token = first + tl.sum((running <= target).to(tl.int32), axis=0)
    return tl.minimum(token, V - 1)  # whatever numbers the row was given


@triton.jit  # type: ignore[untyped-decorator]
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, uniform_ptr,
    keys_ptr, bits_ptr, border_ptr, num_ptr, total_ptr, normaliser_ptr, token_ptr, logprob_ptr,
    V,
    stride_logits, stride_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the token drawn, in the place of the most probable one, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    bits = tl.load(bits_ptr + row)
    if bits > 0:
        total = tl.load(total_ptr + row)
        target = (tl.load(uniform_ptr + row) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)  # whatever u was given
        token = _invert(
            keys_ptr + row * stride_keys, V, tl.load(border_ptr + row), tl.load(num_ptr + row),
            target, bits, BLOCK,
        ).to(tl.int64)  # fmt: skip
        tl.store(token_ptr + row, token)
    else:
        token = tl.load(token_ptr + row)
    x = tl.load(logits_ptr + row * stride_logits + token)
    tl.store(logprob_ptr + row, x - tl.load(normaliser_ptr + row))


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Drawn:
    """One token of each row; see the module's text, `reference.kept_tokens`
    and `reference.draw_token`.

    Nothing is read back from the device: the rows' numbers are not checked, but whatever they are,
    the token is one of the vocabulary.

    Args:
        logits: [B, V] fp32; rows may be a slice of wider ones; not changed.
        temperature: [B] fp32, finite, not negative; 0 is greedy.
        top_k: [B] int32; 0 is off.
        top_p: [B] fp64; from 1 on it is off.
        min_p: [B] fp32 in [0, 1]; 0 is off.
        uniform: u [B] fp64 in [0, 1).
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if logits.ndim != 2 or logits.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"logits must be [B, V] in one of {SUPPORTED_DTYPES}, got {list(logits.shape)} "
            f"{logits.dtype}"
        )
    n_rows, vocabulary_size = logits.shape
    if not 0 < vocabulary_size <= MAX_VOCABULARY_SIZE:
        raise ValueError(f"V must be 1 to {MAX_VOCABULARY_SIZE}, got {vocabulary_size}")
    numbers = [
        _numbers(name, numbers, dtype, logits)
        for name, numbers, dtype in (
            ("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32),
            ("top_p", top_p, torch.float64), ("min_p", min_p, torch.float32),
            ("uniform", uniform, torch.float64),
        )
    ]  # fmt: skip
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tile = choose_tile(vocabulary_size)
    keys, near = logits.new_empty((2, n_rows, tile.padded(vocabulary_size)), dtype=torch.int32)
    token_ids, num_at_border, total = logits.new_empty((3, n_rows), dtype=torch.int64)
    normaliser, logprobs = logits.new_empty((2, n_rows))
    bits, border = logits.new_empty((2, n_rows), dtype=torch.int32)
    strides = (logits.stride(0), keys.stride(0))
    options = {"BLOCK": tile.block, "num_warps": tile.num_warps, "enable_fp_fusion": True}
    if n_rows:
        _weigh_kernel[(n_rows,)](
            logits, numbers[0],
            keys, bits, token_ids, normaliser,
            vocabulary_size, TOTAL_BITS.value - vocabulary_size.bit_length(), *strides, **options,
        )  # fmt: skip
        _cut_kernel[(n_rows,)](
            *numbers[1:4],
            keys, near, bits, border, num_at_border, total,
            vocabulary_size, keys.stride(0), **options,
        )  # fmt: skip
        _draw_kernel[(n_rows,)](
            logits, numbers[4],
            keys, bits, border, num_at_border, total, normaliser, token_ids, logprobs,
            vocabulary_size, *strides, **options,
        )  # fmt: skip
    return Drawn(
        token_ids=token_ids,
        logprobs=logprobs,
        weights=keys[:, :vocabulary_size].view(torch.float32),
        border=border.view(torch.float32),
        num_at_border=num_at_border,
    )


def _numbers(name: str, numbers: Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    """One number of each row, contiguous."""
    wanted = (logits.shape[0],), dtype, logits.device
    if (numbers.shape, numbers.dtype, numbers.device) != wanted:
        raise ValueError(
            f"{name} must be [{logits.shape[0]}] {dtype} on {logits.device}, got "
            f"{list(numbers.shape)} {numbers.dtype} on {numbers.device}"
        )
    return numbers.contiguous()


VOCABULARY_SIZES: Final = {"bloom-176b": 250_880, "small": 4_096}
"""One of each tile; OPT's 50,272 and Llama's 128,256 share BLOOM's."""


KERNELS: Final = {"weigh": _weigh_kernel, "cut": _cut_kernel, "draw": _draw_kernel}


def compile_cases() -> list[Case]:
    """Every variant: filters are chosen by each row's numbers, not by the compiler."""
    return [
        _case(kernel, name, size) for kernel in KERNELS for name, size in VOCABULARY_SIZES.items()
    ]


def _case(kernel: str, name: str, vocabulary_size: int) -> Case:
    types = {
        "logits_ptr": "*fp32", "temperature_ptr": "*fp32", "top_k_ptr": "*i32",
        "top_p_ptr": "*fp64", "min_p_ptr": "*fp32", "uniform_ptr": "*fp64", "keys_ptr": "*i32",
        "near_ptr": "*i32", "bits_ptr": "*i32", "normaliser_ptr": "*fp32", "token_ptr": "*i64",
        "logprob_ptr": "*fp32", "border_ptr": "*i32", "num_ptr": "*i64", "total_ptr": "*i64",
        "V": "i32", "least_bits": "i32", "stride_logits": "i32", "stride_keys": "i32",
    }  # fmt: skip
    function = KERNELS[kernel]
    tile = choose_tile(vocabulary_size)
    return Case(
        name=f"sampling {kernel} {name}",
        kernel=function,
        types={name: types[name] for name in function.arg_names if name in types},
        constants={"BLOCK": tile.block},
        num_warps=tile.num_warps,
        unaligned=frozenset({"least_bits"}),
        has_dot=False,
        capabilities=(*OLD_CAPABILITIES, *CAPABILITIES),
    )
