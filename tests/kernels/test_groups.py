"""Weights of 4 and 3 bits in groups: packing, and rounding to nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.kernels import cpu, groups
from tightfit.kernels.dispatch import quantize_linear
from tightfit.kernels.formats import TILE_FEATURES, Format, linear_bytes
from tightfit.kernels.groups import Quantized, grid, pack_groups, quantize_groups
from tightfit.kernels.packing import (
    Layout,
    pack_blocks,
    pack_rows,
    pack_tiles,
    unpack_blocks,
    unpack_rows,
    unpack_tiles,
)

BITS = (3, 4)


def _random(n_out, n_in, dtype=torch.float32, seed=0):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _integers(n_out, n_in, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n_out, n_in), generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    n_out=st.integers(1, 70),
    n_in=st.integers(1, 200),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 99),
)
def test_rows_come_back_as_they_were_packed(n_out, n_in, bits, seed):
    integers = _integers(n_out, n_in, bits, seed)
    back = unpack_rows(pack_rows(integers, bits=bits), bits=bits, n_in=n_in)
    assert torch.equal(back, integers.to(back.dtype))


@settings(max_examples=60, deadline=None)
@given(
    n_out=st.integers(1, 140),
    n_in=st.integers(1, 600),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 99),
)
def test_tiles_come_back_as_they_were_packed_and_are_whole(n_out, n_in, bits, seed):
    integers = _integers(n_out, n_in, bits, seed)
    packed = pack_tiles(integers, bits=bits)
    assert packed.is_contiguous()
    rows, features = 64 * -(-n_out // 64), TILE_FEATURES[bits] * -(-n_in // TILE_FEATURES[bits])
    assert packed.nbytes * 8 == rows * features * bits
    fmt = Format.INT4 if bits == 4 else Format.INT3
    scales = 4 * n_out
    assert linear_bytes(fmt, n_out, n_in, group_size=n_in, is_tiled=True) == packed.nbytes + scales
    back = unpack_tiles(packed, bits=bits, n_out=n_out, n_in=n_in)
    assert torch.equal(back, integers.to(back.dtype))


def test_a_tile_holds_features_that_lie_32_apart_in_a_column():
    integers = torch.zeros(64, 256, dtype=torch.uint8)
    integers[5, 7], integers[5, 32 + 7], integers[5, 96 + 7], integers[5, 128 + 7] = 1, 2, 7, 5
    four = pack_tiles(integers, bits=4)
    assert four[0, 0, 5, 7].item() == 0x7021
    assert four[0, 1, 5, 7].item() == 0x0005
    assert pack_tiles(integers, bits=3)[0, 0, :, 5, 7].tolist() == [
        0b11_00_10_01,
        0b01,
        0b0001_1000,
    ]


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 3), n_in=st.integers(1, 200), seed=st.integers(0, 99))
def test_blocks_come_back_as_they_were_packed(blocks, n_in, seed):
    integers = _integers(64 * blocks, n_in, 4, seed)
    assert torch.equal(unpack_blocks(pack_blocks(integers)), integers)


def test_three_bits_are_packed_32_to_three_words_as_documented():
    integers = torch.zeros(1, 32, dtype=torch.uint8)
    integers[0, 1], integers[0, 16], integers[0, 31] = 0b001, 0b110, 0b101
    low, high, top = pack_rows(integers, bits=3)[0, 0].tolist()
    assert low == 0b01 << 2
    assert high == (0b10 | 0b01 << 30)
    assert top == (1 << 16) - (1 << 31)  # the sign bit of a word of 32


def test_four_bits_lie_two_to_a_byte_the_first_feature_low():
    assert pack_rows(torch.tensor([[1, 2, 3]]), bits=4).tolist() == [[0x21, 0x03]]


def test_three_bits_cost_three_and_a_quarter_with_their_scales():
    weight = quantize_groups(_random(64, 1024), bits=3, group_size=128)
    assert weight.nbytes * 8 / (64 * 1024) == 3.25
    assert quantize_groups(_random(64, 1024), bits=4, group_size=128).nbytes * 8 / 65536 == 4.25


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 128, 64, 32, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_entry_is_within_half_a_step_or_at_the_end_of_the_grid(bits, group_size, dtype):
    weight = _random(65, 384, dtype)
    packed = quantize_groups(weight, bits=bits, group_size=group_size)
    size = group_size or 128
    assert packed.group_size == size
    scale, zero_point = grid(weight.view(65, -1, size), bits=bits)
    steps = weight.double().view(65, -1, size) / scale.double()[..., None]
    best = (steps.round() + zero_point[..., None]).clamp(0, 2**bits - 1).view(65, 384)
    wrong = packed.integers() != best
    near_tie = ((steps - steps.floor()) - 0.5).abs().view(65, 384) < 1e-4
    assert not bool((wrong & ~near_tie).any())
    # zero is rounded to bf16: at most 8 scales, so off by at most 8 · 2^-9 of one.
    back = (best - zero_point[..., None].expand_as(steps).reshape(65, 384)) * scale.double()[
        ..., None
    ].expand_as(steps).reshape(65, 384)
    error = (packed.dequantize(torch.float64) - back).abs()[~near_tie]
    assert bool((error <= (scale.double().max() * 2**-6)).all())


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_kept_and_the_grid_spans_it(bits):
    weight = _random(4, 128).abs() + 5  # far from 0
    weight[1] *= -1
    weight[2] = 0
    weight[3, 7] = 0
    packed = quantize_groups(weight, bits=bits).dequantize()
    assert bool((packed[2] == 0).all())
    assert packed[3, 7] == 0
    assert bool((packed[0] > 0).all())
    assert bool((packed[1] < 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_numbers_at_the_ends_of_the_range_stay_finite(bits):
    weight = _random(4, 64)
    weight[1] = 1e-45
    weight[2, :2] = torch.tensor([1e38, -1e38])
    weight[3] = -2e38
    assert bool(torch.isfinite(quantize_groups(weight, bits=bits).dequantize()).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(bits, bad, monkeypatch):
    monkeypatch.setattr(groups, "SCRATCH_ELEMENTS", 64 * 48)
    weight = _random(270, 48)
    weight[261, 3] = bad
    with pytest.raises(ValueError, match="in row 261"):
        quantize_groups(weight, bits=bits)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int32)])
def test_what_is_no_floating_matrix_is_refused(weight):
    with pytest.raises(ValueError, match="floating matrix"):
        quantize_groups(weight, bits=4)


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ValueError, match="groups of 128 do not divide 192"):
        quantize_groups(_random(2, 192), bits=4, group_size=128)
    with pytest.raises(ValueError, match=r"\[2, G\] with G a divisor of 192"):
        pack_groups(
            Quantized(
                bits=4,
                integers=_integers(2, 192, 4),
                scale=torch.ones(2, 5),
                zero_point=torch.zeros(2, 5),
            )
        )


@pytest.mark.parametrize(
    ("bits", "layout"),
    [(3, Layout.ROWS), (3, Layout.TILES), *[(4, layout) for layout in Layout]],
)
def test_rows_are_quantised_in_blocks_without_a_difference(monkeypatch, bits, layout):
    weight = _random(192, 64)
    whole = quantize_groups(weight, bits=bits, layout=layout)
    monkeypatch.setattr(groups, "SCRATCH_ELEMENTS", 100)
    blocks = quantize_groups(weight, bits=bits, layout=layout)
    assert torch.equal(whole.packed, blocks.packed)
    assert torch.equal(whole.scale_zero, blocks.scale_zero)
    assert torch.equal(whole.dequantize(torch.float32, 64, 128), whole.dequantize()[64:128])


@pytest.mark.parametrize(
    ("bits", "layout"), [(4, Layout.BLOCKS), (4, Layout.TILES), (3, Layout.TILES)]
)
def test_all_layouts_hold_the_same_weight_in_as_many_bytes(bits, layout):
    weight = _random(128, 512)
    rows = quantize_groups(weight, bits=bits)
    other = quantize_groups(weight, bits=bits, layout=layout)
    assert torch.equal(rows.integers(), other.integers().to(rows.integers().dtype))
    assert torch.equal(rows.dequantize(), other.dequantize())
    assert rows.nbytes == other.nbytes


def test_torch_packs_blocks_as_we_do_where_its_op_is_used():
    """On a CPU where torch's op reads another layout, ours is not given to it."""
    integers = _integers(128, 96, 4)
    theirs = torch._convert_weight_to_int4pack_for_cpu(integers.int(), 1)
    same = torch.equal(theirs.reshape(-1), pack_blocks(integers).reshape(-1))
    assert cpu.reads_blocks() is same
    linear = quantize_linear(_random(128, 96), None, Format.INT4)
    assert (linear.weight.layout is Layout.BLOCKS) is same


@pytest.mark.parametrize("fmt", [Format.INT4, Format.INT3])
@pytest.mark.parametrize("group_size", [32, 64, 128, 384])
@pytest.mark.parametrize("n_out", [5, 64])
def test_the_formula_for_bytes_counts_the_groups(fmt, group_size, n_out):
    linear = quantize_linear(_random(n_out, 384), None, fmt, group_size=group_size)
    assert linear.nbytes == linear_bytes(fmt, n_out, 384, group_size=group_size)
    x = _random(3, 384, torch.bfloat16, seed=2)
    exact = x.double() @ linear.weight.dequantize(torch.float64).T
    assert (linear(x).double() - exact).abs().max() < 2**-6 * exact.abs().max()
