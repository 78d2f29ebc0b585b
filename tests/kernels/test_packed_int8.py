"""int8 weights that FBGEMM packs, against fp64 and beside the ops for those that it does not.

On a processor without VNNI nothing is packed: what has to hold for any layer is tested all the
same.
"""

import pytest
import torch

from tightfit.kernels import packed_int8, reference
from tightfit.kernels.dispatch import NEVER, hold_linear, measure_crossover, quantize_linear
from tightfit.kernels.formats import Format, linear_bytes
from tightfit.kernels.groups import INT8_MIDDLE, Quantized
from tightfit.kernels.packed_int8 import PackedInt8Weight
from tightfit.kernels.weights import Int8Weight

FORMATS = (Format.INT8, Format.LLM_INT8)
TOKENS = (1, 2, 7, 65, 300)
SHAPES = ((8, 16), (33, 100), (130, 576), (577, 577), (5, 1), (1, 96), (96, 1000))
ALWAYS = 0


@pytest.fixture(autouse=True)
def _small_layers_are_packed(monkeypatch):
    monkeypatch.setattr(packed_int8, "PACKED_FROM", 1)


def _layer(fmt, n_out, n_in, *, bias=False, crossover=NEVER, threshold=6.0):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in, generator=generator)
    vector = torch.randn(n_out, generator=generator) if bias else None
    linear = quantize_linear(weight, vector, fmt, outlier_threshold=threshold)
    assert isinstance(linear.weight, PackedInt8Weight) == packed_int8.is_exact()
    linear.crossover = crossover
    return linear


def _plain(linear):
    """Its weight as the reference takes it."""
    return linear.weight if isinstance(linear.weight, Int8Weight) else linear.weight.unpack()


def _input(tokens, n_in, seed=1):
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(seed))
    return x.clamp(-4, 4).bfloat16()


def _with_outliers(x, factor):
    x = x.clone()
    x[-1, x.shape[1] // 2] = 6.0
    x[:, -1] *= factor
    return x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_exact_as_plain_torch_in_bf16(shape, bias):
    linear = _layer(Format.INT8, *shape, bias=bias)
    weight = _plain(linear)
    for tokens in TOKENS:
        x = _input(tokens, shape[1])
        for some in (x, _with_outliers(x, 20.0), _with_outliers(x, 300.0)):
            exact = reference.int8_linear(some.double(), weight, linear.bias)
            plain = reference.int8_linear(some, weight, linear.bias).double()
            half_unit = exact.abs().max() * torch.finfo(torch.bfloat16).eps / 2
            allowed = 2 * torch.maximum((plain - exact).abs().max(), half_unit) + 1e-5
            y = linear(some)
            assert y.dtype == torch.bfloat16
            assert (y.double() - exact).abs().max() <= allowed


def test_two_digits_lose_less_than_the_rounding_of_the_result_to_bf16():
    if not packed_int8.is_exact():
        pytest.skip("this processor has no VNNI: layers are not packed on it")
    weight = _layer(Format.INT8, 64, 2048).weight
    multiply = packed_int8.bind_digits(weight, None)
    x = _with_outliers(_input(9, 2048), 20.0)
    exact = x.double() @ weight.unpack().dequantize(torch.float64).T
    error = (multiply(x.float()).double() - exact).abs()
    bound = x.double().abs().amax(1, keepdim=True) / (2 * 127 * 254)
    assert bool((error <= 1.01 * bound * weight.unpack().dequantize().abs().sum(1)).all())
    assert error.norm() < 2**-9 * exact.norm() / 5


@pytest.mark.parametrize("threshold", [6.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_llm_int8_takes_the_outliers_columns_out_of_the_packed_weight(shape, threshold):
    linear = _layer(Format.LLM_INT8, *shape, bias=True, crossover=ALWAYS, threshold=threshold)
    weight = _plain(linear)
    for tokens in (2, 65):
        x = _with_outliers(_input(tokens, shape[1]), 5.0)
        num_outliers = int((x.abs() >= threshold).any(0).sum())
        is_decomposed = num_outliers < tokens or not packed_int8.is_exact()
        specification = reference.llm_int8_linear if is_decomposed else reference.int8_linear
        if shape[1] == 1:
            specification = reference.int8_linear
        exact = specification(x.double(), weight, linear.bias)
        difference = (linear(x).double() - exact).abs().max()
        assert difference <= 2**-7 * exact.abs().max() + 1e-5


def test_llm_int8_is_the_decomposition_and_not_two_digits_where_outliers_are_few():
    linear = _layer(Format.LLM_INT8, 130, 576)
    x = _with_outliers(_input(65, 576), 5.0)
    few = linear(x).double()
    linear.crossover = ALWAYS
    many = linear(x).double()
    exact = x.double() @ _plain(linear).dequantize(torch.float64).T
    assert 0.002 < (many - exact).norm() / exact.norm() < 0.02
    assert (few - exact).norm() < (many - exact).norm() / 2


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
def test_rows_of_zeros_and_no_rows_at_all_are_no_special_case(fmt, crossover):
    linear = _layer(fmt, 48, 64, bias=True, crossover=crossover)
    x = _input(5, 64)
    x[2] = 0.0
    assert torch.equal(linear(x)[2], linear.bias)
    assert linear(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(fmt, crossover, bad):
    linear = _layer(fmt, 48, 64, crossover=crossover)
    x = _input(6, 64)
    x[4, 9] = bad
    y = linear(x)
    assert not bool(torch.isfinite(y[4]).any())
    assert bool(torch.isfinite(y[[0, 1, 2, 3, 5]]).all())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
def test_rows_may_be_a_slice_of_wider_ones_and_are_left_as_they_were(fmt, crossover):
    linear = _layer(fmt, 48, 64, bias=True, crossover=crossover)
    wide = _input(9, 160)
    wide[3, 5] = 8.0
    before = wide.clone()
    for part in (wide[:, 3:67], wide[2:5, 64:128], wide.view(-1)[5:69].view(1, 64)):
        assert torch.equal(linear(part), linear(part.clone()))
    assert torch.equal(wide, before)


def test_a_token_has_the_same_result_alone_and_among_many():
    linear = _layer(Format.INT8, 130, 576, bias=True)
    x = _with_outliers(_input(300, 576), 20.0)
    alone = torch.cat([linear(row[None]) for row in x[::37]])
    assert torch.allclose(linear(x)[::37], alone, rtol=2**-8, atol=1e-6)
    if packed_int8.is_exact():
        assert torch.equal(linear(x)[::37], alone)


@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_that_are_held_are_the_same_ones(fmt):
    integers = torch.randint(1, 256, (48, 64), dtype=torch.uint8)
    weight = Quantized(
        bits=8,
        integers=integers,
        scale=torch.rand(48, 1) + 0.5,
        zero_point=torch.full((48, 1), INT8_MIDDLE),
    )
    linear = hold_linear(weight, None, fmt, outlier_threshold=2.5)
    assert torch.equal(_plain(linear).values.int() + INT8_MIDDLE, integers.int())
    assert _plain(linear).outlier_threshold == 2.5
    assert linear.nbytes == linear_bytes(fmt, 48, 64)


def test_a_packed_int8_layer_has_one_op_and_llm_int8_two():
    if not packed_int8.is_exact():
        pytest.skip("this processor has no VNNI: layers are not packed on it")
    assert not _layer(Format.INT8, 64, 64).has_many_op
    assert measure_crossover(_layer(Format.INT8, 64, 64)) == NEVER
    assert _layer(Format.LLM_INT8, 64, 64).has_many_op


def test_layers_that_are_small_or_too_wide_for_int32_are_not_packed(monkeypatch):
    monkeypatch.setattr(packed_int8, "PACKED_FROM", 64 * 64)
    small, large = (quantize_linear(torch.ones(n, 64), None, Format.INT8) for n in (63, 64))
    assert isinstance(small.weight, Int8Weight)
    assert isinstance(large.weight, PackedInt8Weight) == packed_int8.is_exact()
    wide = quantize_linear(torch.ones(1, packed_int8.MAX_N_IN + 1), None, Format.INT8)
    assert isinstance(wide.weight, Int8Weight)


def test_the_widest_rows_that_are_packed_do_not_overflow():
    n_in = packed_int8.MAX_N_IN
    linear = quantize_linear(torch.ones(2, n_in), None, Format.INT8)
    y = linear(torch.ones(1, n_in).bfloat16())
    assert torch.allclose(y.float(), torch.full((1, 2), float(n_in)), rtol=2**-7)


def test_a_torch_without_the_engine_packs_nothing(monkeypatch):
    packed_int8.is_exact.cache_clear()
    monkeypatch.setattr(packed_int8, "ENGINE", "an engine of another build")
    try:
        linear = quantize_linear(torch.ones(64, 64), None, Format.INT8)
        assert isinstance(linear.weight, Int8Weight)
    finally:
        packed_int8.is_exact.cache_clear()


def test_packing_leaves_torchs_engine_as_it_was():
    before = torch.backends.quantized.engine
    _layer(Format.INT8, 64, 64)
    assert torch.backends.quantized.engine == before
