"""The int8 kernels against fp64, by flash-attention's rule: our error is at most twice that of
plain torch in the same dtype."""

import pytest
import torch

from tightfit.kernels import reference, w8a16
from tightfit.kernels.w8a16 import choose_tile, dequantize, w8a16_linear
from tightfit.kernels.weights import Int8Weight, quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

SHAPES = ((33, 80), (130, 576), (1, 96), (5, 1), (7, 1100))
"""(N, K): N that is odd or a prime, K that is no multiple of a block, nor of 16."""


def _layer(n_out, n_in, seed=0):
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    return quantize_rows(weight, device=DEVICE)


def _random(*shape, dtype=torch.float16, seed=1):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device=DEVICE, dtype=dtype)


def _assert_as_good_as_torch(y, x, weight, bias):
    """Half a unit in the last place of the largest result counts as plain torch's error in any
    case: with few results it may be spared that by luck."""
    wide_bias = None if bias is None else bias.double()
    exact = reference.int8_linear(x.double(), weight, wide_bias)
    plain = reference.int8_linear(x, weight, bias).double()
    half_unit = exact.abs().max() * torch.finfo(y.dtype).eps / 2
    allowed = 2 * torch.maximum((plain - exact).abs().max(), half_unit) + 1e-5
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 16, 33, 65])
def test_the_product_is_as_exact_as_plain_torch(n_tokens, shape, has_bias, dtype):
    weight = _layer(*shape)
    bias = _random(shape[0], dtype=dtype, seed=2) if has_bias else None
    x = _random(n_tokens, shape[1], dtype=dtype)
    _assert_as_good_as_torch(w8a16_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 80), (129, 200)])
def test_hundreds_of_tokens_are_as_exact_as_plain_torch(shape, dtype):
    weight, bias, x = _layer(*shape), _random(shape[0], dtype=dtype), _random(512, shape[1])
    x = x.to(dtype)
    _assert_as_good_as_torch(w8a16_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_splits_of_k_add_up_and_give_the_same_bits_again(n_tokens, has_bias, dtype):
    shape = (5, 12_700 if n_tokens == 1 else 6300)
    tile = choose_tile(n_tokens, *shape)
    assert tile.splits > 2
    assert tile.k_per_split(shape[1]) * tile.splits >= shape[1]
    weight = _layer(*shape)
    bias = _random(shape[0], dtype=dtype, seed=2) if has_bias else None
    x = _random(n_tokens, shape[1], dtype=dtype)
    y = w8a16_linear(x, weight, bias)
    _assert_as_good_as_torch(y, x, weight, bias)
    assert torch.equal(y, w8a16_linear(x, weight, bias))


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 17, 32, 33, 64, 65, 4096])
@pytest.mark.parametrize("shape", [(5, 1), (14_336, 57_344), (250_880, 14_336), (64, 1_000_000)])
def test_every_split_has_work(n_tokens, shape):
    tile = choose_tile(n_tokens, *shape)
    assert tile.k_per_split(shape[1]) % tile.block_k == 0
    assert tile.k_per_split(shape[1]) * tile.splits >= shape[1]
    assert tile.k_per_split(shape[1]) * (tile.splits - 1) < shape[1]
    assert tile.splits == 1 or n_tokens <= 64


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype_is_taken_in_that_of_the_input(bias_dtype):
    weight, x, bias = _layer(33, 80), _random(2, 80), _random(33, dtype=bias_dtype)
    assert torch.equal(w8a16_linear(x, weight, bias), w8a16_linear(x, weight, bias.half()))


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_sums_may_leave_the_range_of_fp16_before_they_are_scaled(n_tokens):
    values = torch.full((3, 1024), 127, dtype=torch.int8, device=DEVICE)
    scale = torch.full((3,), 2**-14, dtype=torch.bfloat16, device=DEVICE)
    x = torch.full((n_tokens, 1024), 64.0, dtype=torch.float16, device=DEVICE)
    y = w8a16_linear(x, Int8Weight(values=values, scale=scale))
    assert torch.equal(y, torch.full_like(y, 127 * 1024 * 64 * 2**-14))


@pytest.mark.parametrize("n_tokens", [1, 6, 70])
def test_rows_may_be_a_slice_of_wider_ones_or_have_strides_and_are_left_as_they_were(n_tokens):
    weight = _layer(33, 80)
    wide = _random(n_tokens, 200)
    before = wide.clone()
    for part in (wide[:, 3:83], wide[:, 16:96], wide[:, 40:].t().contiguous().t()[:, :80]):
        assert torch.equal(w8a16_linear(part, weight), w8a16_linear(part.contiguous(), weight))
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("n_tokens", [1, 6, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(n_tokens, bad):
    x = _random(n_tokens, 80)
    token = n_tokens // 2
    x[token, 9] = bad
    finite = torch.isfinite(w8a16_linear(x, _layer(33, 80)))
    assert not bool(finite[token].any())
    finite[token] = True
    assert bool(finite.all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 520)])
def test_a_dequantised_weight_is_the_exact_one_rounded_once(shape, dtype):
    weight = _layer(*shape)
    got = dequantize(weight.values, weight.scale, dtype)
    assert torch.equal(got, weight.dequantize(torch.float64).to(dtype))


@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("n_tokens", [1, 3, 16, 70])
def test_devices_without_tensor_cores_are_as_exact(n_tokens, capability, monkeypatch):
    monkeypatch.setattr(w8a16, "DEQUANTIZE_ELEMENTS", 16 * 576)  # several blocks of rows
    monkeypatch.setattr(w8a16, "_gemm_kernel", None)  # needs tensor cores
    weight, bias, x = _layer(39, 576), _random(39, seed=2), _random(n_tokens, 576)
    y = w8a16_linear(x, weight, bias, capability=capability)
    _assert_as_good_as_torch(y, x, weight, bias)


def test_no_tokens_give_no_rows_and_no_inputs_give_the_bias():
    assert w8a16_linear(_random(0, 80), _layer(33, 80)).shape == (0, 33)
    empty = Int8Weight(values=_layer(3, 1).values[:, :0], scale=_layer(3, 1).scale)
    bias = _random(3)
    assert torch.equal(w8a16_linear(_random(2, 0), empty, bias), bias.expand(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, 16, 128])
def test_rows_past_two_to_the_31_elements_are_found(n_tokens):
    n_out, n_in = 250_880, 14_336
    values = torch.zeros((n_out, n_in), dtype=torch.int8, device=DEVICE)
    values[-1], values[n_out // 2] = 3, 2
    scale = torch.ones(n_out, dtype=torch.bfloat16, device=DEVICE)
    x = torch.full((n_tokens, n_in), 2**-10, dtype=torch.float16, device=DEVICE)
    y = w8a16_linear(x, Int8Weight(values=values, scale=scale))
    assert y[:, [0, n_out // 2, -1]].tolist() == [[0.0, 28.0, 42.0]] * n_tokens


def test_what_does_not_fit_is_refused():
    weight, x = _layer(8, 64), _random(2, 64)
    with pytest.raises(ValueError, match=r"x must be \[T, 64\].*got \[2, 63\]"):
        w8a16_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"got \[2, 64\] torch.float32"):
        w8a16_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        w8a16_linear(x, weight, _random(7))
    with pytest.raises(ValueError, match=r"scale must be \[8\] bfloat16.*got \[7\]"):
        w8a16_linear(x, Int8Weight(values=weight.values, scale=weight.scale[1:]))
    turned = weight.values.t().contiguous().t()
    with pytest.raises(ValueError, match=r"values must be .* contiguous.*strides \[1, 8\]"):
        w8a16_linear(x, Int8Weight(values=turned, scale=weight.scale))
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch.float32"):
        dequantize(weight.values, weight.scale, torch.float32)
