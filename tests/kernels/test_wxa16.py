"""The int4 and int3 kernels against fp64, by flash-attention's rule: our error is at most twice
that of plain torch in the same dtype."""

import pytest
import torch

from tightfit.kernels import reference, wxa16
from tightfit.kernels.groups import pack_groups, quantize_groups, round_to_nearest
from tightfit.kernels.hqq import hqq
from tightfit.kernels.packing import Layout
from tightfit.kernels.wxa16 import choose_tile, dequantize, wxa16_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BITS = (4, 3)

SHAPES = ((33, 96, 32), (70, 576, 64), (5, 640, 128), (1, 96, 96), (9, 75, 75), (3, 1, 1))
"""(N, K, group size): N that is odd, K that is no multiple of a block, groups of all sizes and of a
whole channel, of an odd number of features too."""


def _layer(n_out, n_in, group_size, bits, seed=0):
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) + 0.3
    return quantize_groups(
        weight, bits=bits, group_size=group_size, layout=Layout.TILES, device=DEVICE
    )


def _random(*shape, dtype=torch.float16, seed=1):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device=DEVICE, dtype=dtype)


def _assert_as_good_as_torch(y, x, weight, bias):
    """Half a unit in the last place of the largest result counts as plain torch's error in any
    case: with few results it may be spared that by luck."""
    exact = reference.group_linear(x.double(), weight, None if bias is None else bias.double())
    plain = reference.group_linear(x, weight, bias).double()
    half_unit = exact.abs().max() * torch.finfo(y.dtype).eps / 2
    allowed = 2 * torch.maximum((plain - exact).abs().max(), half_unit) + 1e-5
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 17, 33, 65])
def test_the_product_is_as_exact_as_plain_torch(n_tokens, shape, bits, dtype):
    weight = _layer(*shape, bits)
    bias = _random(shape[0], dtype=dtype, seed=2) if n_tokens % 2 else None
    x = _random(n_tokens, shape[1], dtype=dtype)
    _assert_as_good_as_torch(wxa16_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_hundreds_of_tokens_are_as_exact_as_plain_torch(bits, dtype):
    weight, bias = _layer(133, 192, 64, bits), _random(133, dtype=dtype)
    x = _random(512, 192, dtype=dtype)
    _assert_as_good_as_torch(wxa16_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_splits_of_k_add_up_and_give_the_same_bits_again(n_tokens, bits, dtype):
    n_in = {4: 2_048 + 64, 3: 3_072 + 64}[bits]
    weight, bias = _layer(5, n_in, 64, bits), _random(5, dtype=dtype)
    num_tiles = weight.packed.shape[1]
    tile = choose_tile(bits, n_tokens, 5, num_tiles)
    assert tile.splits > 1
    assert tile.tiles_per_split(num_tiles) * tile.splits >= num_tiles
    x = _random(n_tokens, n_in, dtype=dtype)
    y = wxa16_linear(x, weight, bias)
    _assert_as_good_as_torch(y, x, weight, bias)
    assert torch.equal(y, wxa16_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 40])
def test_without_tensor_cores_few_go_one_by_one_and_many_through_cublas(
    n_tokens, capability, bits, dtype, monkeypatch
):
    monkeypatch.setattr(wxa16, "DEQUANTIZE_ELEMENTS", 8 * 512)  # several blocks of rows
    monkeypatch.setattr(wxa16, "_gemm_kernel", None)  # needs tensor cores
    weight, bias = _layer(19, 320, 64, bits), _random(19, dtype=dtype, seed=2)
    x = _random(n_tokens, 320, dtype=dtype)
    y = wxa16_linear(x, weight, bias, capability=capability)
    _assert_as_good_as_torch(y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_gives_the_weight_that_is_meant(shape, bits, dtype):
    weight = _layer(*shape, bits)
    wide = weight.dequantize(torch.float64)
    found = dequantize(weight, dtype).double()
    assert (found - wide).abs().max() <= torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.parametrize("n_tokens", [1, 16])
def test_real_zero_points_are_taken_as_they_are(n_tokens):
    dense = _random(16, 128, dtype=torch.float32, seed=0) - 0.2
    weight = pack_groups(hqq(dense, bits=4, group_size=64), layout=Layout.TILES)
    x = _random(n_tokens, 128)
    _assert_as_good_as_torch(wxa16_linear(x, weight), x, weight, None)


@pytest.mark.parametrize("n_tokens", [1, 6])
def test_rows_may_be_a_slice_of_wider_ones_and_are_left_as_they_were(n_tokens):
    weight, wide = _layer(9, 96, 32, 4), _random(n_tokens, 200)
    before = wide.clone()
    part = wide[:, 3:99]
    assert torch.equal(wxa16_linear(part, weight), wxa16_linear(part.contiguous(), weight))
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("n_tokens", [3, 20])
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(n_tokens):
    weight, x = _layer(9, 96, 32, 4), _random(n_tokens, 96)
    x[1, 5] = float("nan")
    finite = torch.isfinite(wxa16_linear(x, weight)).all(dim=1)
    assert not finite[1]
    assert finite.sum() == n_tokens - 1


@pytest.mark.parametrize("bits", BITS)
def test_nothing_in_gives_nothing_out(bits):
    weight = _layer(9, 96, 32, bits)
    assert wxa16_linear(_random(0, 96), weight).shape == (0, 9)


def test_what_does_not_fit_is_refused():
    weight, x = _layer(8, 64, 32, 4), _random(2, 64)
    with pytest.raises(ValueError, match=r"x must be \[T, 64\].*got \[2, 63\]"):
        wxa16_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"got \[2, 64\] torch.float32"):
        wxa16_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        wxa16_linear(x, weight, _random(7))
    rows = pack_groups(round_to_nearest(torch.randn(8, 64), bits=4, group_size=32))
    with pytest.raises(ValueError, match=r"must be in Layout\.TILES .* got Layout\.ROWS"):
        wxa16_linear(x, rows)
    with pytest.raises(ValueError, match="multiple of 32 input features, or all 64, got 16"):
        wxa16_linear(x, _layer(8, 64, 16, 4))
    with pytest.raises(ValueError, match="dtype must be one of"):
        dequantize(weight, torch.float32)
