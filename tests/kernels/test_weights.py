"""Quantising a weight, row by row."""

import pytest
import torch

from tightfit.kernels import weights
from tightfit.kernels.dispatch import quantize_linear
from tightfit.kernels.formats import Format, activation_dtype, linear_bytes
from tightfit.kernels.weights import quantize_rows


def _random(n_out, n_in, dtype=torch.float32, seed=0):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_entry_is_within_half_a_step_of_the_weight(dtype):
    weight = _random(37, 100, dtype)
    packed = quantize_rows(weight)
    error = (packed.dequantize(torch.float64) - weight.double()).abs()
    # A scale rounded down by 2^-9 clamps the largest entry by a quarter of a step: within the half.
    assert bool((error <= packed.scale.double()[:, None] * (0.5 + 1e-6)).all())
    assert packed.values.dtype == torch.int8
    assert packed.scale.dtype == torch.bfloat16


def test_the_values_belong_to_the_rounded_scale_not_to_the_exact_one():
    weight = _random(64, 256)
    packed = quantize_rows(weight)
    exact = weight.abs().amax(1) / weights.INT8_MAX
    assert bool((packed.scale.float() != exact).any())
    best = (weight / packed.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(packed.values, best)


def test_minus_128_never_appears():
    weight = _random(512, 64)
    weight[:, 0] = -weight.abs().amax(1) * 1.001
    assert int(quantize_rows(weight).values.min()) >= -127


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite():
    weight = _random(4, 32)
    weight[1] = 0.0
    weight[2] = 1e-45
    packed = quantize_rows(weight)
    assert bool((packed.scale > 0).all())
    assert bool(torch.isfinite(packed.dequantize()).all())
    assert bool((packed.dequantize()[1] == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(bad):
    weight = _random(70, 48)
    weight[61, 3] = bad
    with pytest.raises(ValueError, match=r"\[70, 48\].*row 61"):
        quantize_rows(weight)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int32)])
def test_what_is_no_floating_matrix_is_refused(weight):
    with pytest.raises(ValueError, match="floating matrix"):
        quantize_rows(weight)


def test_rows_are_quantised_in_blocks_without_a_difference(monkeypatch):
    weight = _random(65, 33)
    whole = quantize_rows(weight)
    monkeypatch.setattr(weights, "SCRATCH_ELEMENTS", 100)
    blocks = quantize_rows(weight)
    assert torch.equal(whole.values, blocks.values)
    assert torch.equal(whole.scale, blocks.scale)


def test_the_source_is_neither_changed_nor_shared():
    weight = _random(16, 32)
    before = weight.clone()
    packed = quantize_rows(weight.t().contiguous().t())
    assert torch.equal(weight, before)
    assert torch.equal(packed.values, quantize_rows(weight).values)
    assert packed.values.is_contiguous()
    for fmt in Format:
        linear = quantize_linear(weight, before[:, 0], fmt)
        x = torch.ones(1, 32, dtype=torch.float32 if fmt is Format.FP32 else torch.bfloat16)
        first = linear(x).clone()
        weight.zero_()
        assert torch.equal(linear(x), first)
        weight.copy_(before)


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (96, 576)])
def test_the_formula_for_bytes_is_what_a_layer_measures(fmt, has_bias, shape):
    linear = quantize_linear(_random(*shape), torch.zeros(shape[0]) if has_bias else None, fmt)
    assert linear.nbytes == linear_bytes(fmt, *shape, bias=has_bias)
    assert (linear.n_out, linear.n_in, linear.format) == (*shape, fmt)
    assert activation_dtype(fmt) in ("fp32", "bf16")
