"""LLM.int8()'s kernels against the reference: the split bit by bit, the product by what rounding
its exact value to the input's dtype costs."""

import warnings

import pytest
import torch

from tightfit.kernels import llm_int8, reference
from tightfit.kernels.llm_int8 import MAX_IN, llm_int8_linear, quantize_input
from tightfit.kernels.w8a16 import w8a16_linear
from tightfit.kernels.weights import Int8Weight, quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

SHAPES = ((33, 80), (65, 320), (70, 576), (1, 96), (5, 1))
"""(N, K): N that is odd, K that is no multiple of a block, nor of 16."""

NUM_OUTLIERS = (0, 1, 16, 37, "all")


def _layer(n_out, n_in, seed=0):
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    return quantize_rows(weight, device=DEVICE)


def _random(*shape, dtype=torch.float16, seed=1):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)
    return drawn.to(device=DEVICE, dtype=dtype)


def _with_outliers(x, num_outliers):
    """So many columns, spread over x, of which one entry each reaches the threshold: a third of
    them at exactly 6, a third below -6."""
    tokens, n_in = x.shape
    num_outliers = n_in if num_outliers == "all" else min(num_outliers, n_in)
    order = torch.randperm(n_in, generator=torch.Generator().manual_seed(3))[:num_outliers]
    for place, column in enumerate(order.tolist()):
        x[place % tokens, column] = (6.0, -17.5, 60.0)[place % 3]
    return x, sorted(order.tolist())


def _assert_is_rounded_once(y, x, weight, bias):
    """The int32 sum is exact, so that fp32's roundings in the epilogue and one of the result are
    all that tells y from the fp64 value."""
    x8, scale, outliers = reference.quantize_input(x)
    dot = x8.double() @ weight.values.double().T
    wide_x, wide_w = x[:, outliers].double(), weight.values[:, outliers].double()
    terms = [dot * scale.double()[:, None], wide_x @ wide_w.T]
    sizes = terms[0].abs() + wide_x.abs() @ wide_w.abs().T
    exact = (terms[0] + terms[1]) * weight.scale.double()
    sizes *= weight.scale.double()
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    fp32_error = (4 + len(outliers)) * torch.finfo(torch.float32).eps * sizes
    allowed = torch.finfo(y.dtype).eps / 2 * (exact.abs() + fp32_error) + fp32_error + 2**-24
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all())


def _assert_agrees_with_the_reference(y, x, weight, bias):
    """By flash-attention's rule; plain torch is the weight-only product in x's dtype."""
    wide_bias = None if bias is None else bias.double()
    exact = reference.llm_int8_linear(x.double(), weight, wide_bias)
    plain_error = reference.int8_linear(x, weight, bias).double()
    plain_error -= reference.int8_linear(x.double(), weight, wide_bias)
    half_unit = exact.abs().max() * torch.finfo(y.dtype).eps / 2
    allowed = 2 * torch.maximum(plain_error.abs().max(), half_unit) + 1e-5
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outliers", NUM_OUTLIERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 7, 16, 65])
def test_the_product_is_exact_but_for_one_rounding(n_tokens, shape, num_outliers, dtype):
    weight, bias = _layer(*shape), _random(shape[0], dtype=dtype, seed=2)
    x, _ = _with_outliers(_random(n_tokens, shape[1], dtype=dtype), num_outliers)
    y = llm_int8_linear(x, weight, bias)
    _assert_is_rounded_once(y, x, weight, bias)
    _assert_agrees_with_the_reference(y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outliers", [0, 21])
def test_hundreds_of_tokens_are_exact_but_for_one_rounding(num_outliers, dtype):
    weight = _layer(133, 80)
    x, _ = _with_outliers(_random(512, 80, dtype=dtype), num_outliers)
    y = llm_int8_linear(x, weight)
    _assert_is_rounded_once(y, x, weight, None)
    _assert_agrees_with_the_reference(y, x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outliers", NUM_OUTLIERS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 80), (7, 4500)])
def test_the_split_is_the_references_bit_by_bit(shape, num_outliers, dtype):
    x, columns = _with_outliers(_random(*shape, dtype=dtype), num_outliers)
    x8, scale, outliers = reference.quantize_input(x)
    split = quantize_input(x)
    assert outliers.tolist() == columns
    assert split.num_outliers.tolist() == [len(columns)]
    assert split.outliers[: len(columns)].tolist() == columns
    assert torch.equal(split.scale, scale)
    assert torch.equal(split.values, x8)


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_another_threshold_splits_as_the_reference_does(threshold):
    x = _random(3, 200)
    x8, scale, outliers = reference.quantize_input(x, threshold)
    split = quantize_input(x, threshold)
    assert 0 < len(outliers) < 200
    assert split.outliers[: len(outliers)].tolist() == outliers.tolist()
    assert torch.equal(split.scale, scale)
    assert torch.equal(split.values, x8)


def test_halves_are_rounded_to_even_and_all_steps_are_used():
    halves = torch.arange(-254, 255, device=DEVICE) / 2
    x = (halves / 32).half()[None]  # the scale is 1 / 32 exactly
    split = quantize_input(x)
    assert split.scale.tolist() == [1 / 32]
    assert split.values.tolist() == [halves.round().tolist()]


def test_the_threshold_belongs_to_the_outliers_and_what_is_just_below_does_not():
    x = _random(4, 80).clamp(-2, 2)
    x[1, 3], x[2, 70], x[3, 5] = 6.0, -6.0, 5.996  # the largest fp16 below 6
    split = quantize_input(x)
    assert split.num_outliers.tolist() == [2]
    assert split.outliers[:2].tolist() == [3, 70]
    assert split.values[3, 5].item() == 127
    assert split.values[:, [3, 70]].tolist() == [[0, 0]] * 4


def test_the_int32_sum_of_the_most_inputs_is_exact():
    n_in = 576
    values = torch.full((2, n_in), 127, dtype=torch.int8, device=DEVICE)
    values[1] = -127
    scale = torch.full((2,), 2**-14, dtype=torch.bfloat16, device=DEVICE)
    x = torch.full((17, n_in), 127 / 32, dtype=torch.float16, device=DEVICE)
    y = llm_int8_linear(x, Int8Weight(values=values, scale=scale))
    wanted = torch.tensor([127.0, -127.0], device=DEVICE) * 127 * n_in / 32 * 2**-14
    assert torch.equal(y, wanted.half().expand(17, 2))
    assert MAX_IN * 127**2 < 2**31 <= (MAX_IN + 1) * 127**2


def test_rows_of_zeros_give_the_bias_alone():
    bias, x = _random(33), _random(5, 80)
    x[2] = 0.0
    assert torch.equal(llm_int8_linear(x, _layer(33, 80), bias)[2], bias)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(bad):
    weight, x = _layer(33, 80), _random(6, 80)
    x[4, 9] = bad
    y = llm_int8_linear(x, weight)
    assert not bool(torch.isfinite(y[4]).any())
    x[4] = 0.0
    x[4, 9] = 6.0  # the same column, as an outlier that is finite
    others = [0, 1, 2, 3, 5]
    assert torch.equal(y[others], llm_int8_linear(x, weight)[others])


@pytest.mark.parametrize("n_tokens", [1, 6, 70])
def test_rows_may_be_a_slice_of_wider_ones_or_have_strides_and_are_left_as_they_were(n_tokens):
    weight = _layer(33, 80)
    wide, _ = _with_outliers(_random(n_tokens, 200), 30)
    before = wide.clone()
    for part in (wide[:, 3:83], wide[:, 16:96], wide[:, 40:].t().contiguous().t()[:, :80]):
        assert torch.equal(
            llm_int8_linear(part, weight), llm_int8_linear(part.contiguous(), weight)
        )
    assert torch.equal(wide, before)


@pytest.mark.parametrize("n_tokens", [1, 16])
def test_devices_without_int8_tensor_cores_take_the_weight_only_product(n_tokens, monkeypatch):
    monkeypatch.setattr(llm_int8, "_gemm_kernel", None)
    weight, x = _layer(33, 80), _random(n_tokens, 80)
    wanted = w8a16_linear(x, weight, capability=75)
    assert torch.equal(llm_int8_linear(x, weight, capability=75), wanted)


def test_no_tokens_give_no_rows():
    assert llm_int8_linear(_random(0, 80), _layer(33, 80)).shape == (0, 33)


@pytest.mark.gpu
def test_the_host_waits_for_nothing():
    weight, (x, _) = _layer(130, 576), _with_outliers(_random(65, 576), 37)
    llm_int8_linear(x, weight)  # compiles
    try:
        with warnings.catch_warnings(action="ignore"):  # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
        llm_int8_linear(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_refused():
    weight, x = _layer(8, 64), _random(2, 64)
    with pytest.raises(ValueError, match=r"x must be \[T, 64\].*got \[2, 63\]"):
        llm_int8_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        llm_int8_linear(x, weight, _random(7))
    with pytest.raises(ValueError, match=r"not empty, got \[0, 64\]"):
        quantize_input(x[:0])
    n_in = MAX_IN + 1
    values = torch.zeros((1, n_in), dtype=torch.int8, device=DEVICE)
    wide = Int8Weight(values=values, scale=weight.scale[:1])
    with pytest.raises(ValueError, match=f"at most {MAX_IN} .*got {n_in}"):
        llm_int8_linear(_random(1, n_in), wide)
