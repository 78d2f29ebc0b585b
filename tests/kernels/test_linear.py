"""Every op of every format against fp64, by flash-attention's rule: our error is at most twice that
of plain torch in the same dtype."""

import pytest
import torch

from tightfit.kernels import cpu, reference
from tightfit.kernels.dispatch import CPU_OPS, NEVER, quantize_linear
from tightfit.kernels.formats import Format

TOKENS = (1, 2, 7, 16, 65)
SHAPES = (
    (8, 16),
    (48, 32),
    (33, 100),
    (130, 576),
    (577, 577),
    (5, 1),
    (1, 96),
    (96, 1000),
    (128, 128),
    (64, 192),
)
"""(N, K): also K that is no multiple of 16 or 32, N that is a prime, and one of either; for 4 and 3
bits groups of 128, 64, 32 and of all a channel's features, and N that torch's packed op takes."""

INT8 = (Format.INT8, Format.LLM_INT8)
QUANTIZED = (*INT8, Format.INT4, Format.INT3)
SPECIFICATION = {Format.INT4: reference.group_linear, Format.INT3: reference.group_linear}
ALWAYS = 0


def _layer(fmt, n_out, n_in, *, bias, crossover, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator)
    vector = torch.randn(n_out, generator=generator) if bias else None
    linear = quantize_linear(weight, vector, fmt)
    linear.crossover = crossover
    return linear


def _input(tokens, n_in, dtype=torch.bfloat16, seed=1):
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(seed))
    return x.clamp(-4, 4).to(dtype)


def _with_outliers(x):
    """Some columns of which one entry alone reaches the threshold, one at exactly 6."""
    tokens, n_in = x.shape
    x = x.clone()
    x[tokens - 1, n_in // 2] = 6.0
    x[0, 0] = -40.0
    x[:, n_in - 1] = 17.0
    return x


def _assert_as_good_as_torch(got, exact, plain_error):
    """`got` is at most twice as far from the fp64 result as plain torch in the same dtype.

    Half a unit in the last place of the largest result counts as plain torch's in any case: with
    few results it may be spared that by luck.
    """
    half_unit = exact.abs().max() * torch.finfo(got.dtype).eps / 2
    allowed = 2 * torch.maximum(plain_error.abs().max(), half_unit) + 1e-5
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fmt", "crossover"), [(f, c) for f in QUANTIZED for c in (ALWAYS, NEVER)])
def test_quantised_ops_are_as_exact_as_plain_torch(fmt, crossover, shape, bias):
    linear = _layer(fmt, *shape, bias=bias, crossover=crossover)
    is_decomposed = fmt is Format.LLM_INT8 and crossover == ALWAYS and shape[1] > 1
    plain = SPECIFICATION.get(fmt, reference.int8_linear)
    specification = reference.llm_int8_linear if is_decomposed else plain
    for tokens in TOKENS:
        for x in (_input(tokens, shape[1]), _with_outliers(_input(tokens, shape[1]))):
            exact = specification(x.double(), linear.weight, linear.bias)
            plain_error = plain(x, linear.weight, linear.bias).double()
            plain_error -= plain(x.double(), linear.weight, linear.bias)
            y = linear(x)
            assert y.dtype == x.dtype
            _assert_as_good_as_torch(y, exact, plain_error)


@pytest.mark.parametrize("fmt", [Format.FP32, Format.BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_formats_are_torch(fmt, shape):
    linear = _layer(fmt, *shape, bias=True, crossover=NEVER)
    assert not linear.has_many_op
    dtype = torch.float32 if fmt is Format.FP32 else torch.bfloat16
    for tokens in TOKENS:
        x = _input(tokens, shape[1], dtype)
        exact = x.double() @ linear.weight.double().T + linear.bias.double()
        plain = x @ linear.weight.T + linear.bias
        _assert_as_good_as_torch(linear(x), exact, plain.double() - exact)


@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_the_decomposition_agrees_with_weight_only_within_its_own_error(tokens):
    linear = _layer(Format.LLM_INT8, 130, 576, bias=False, crossover=NEVER)
    x = _with_outliers(_input(tokens, 576))
    few = linear(x).double()
    linear.crossover = ALWAYS
    many = linear(x).double()
    # Half a step of every activation, through weights of known size, and bf16's rounding of both.
    regular = torch.where((x.abs() >= 6).any(0), 0, x.double())
    step = regular.abs().amax(1, keepdim=True) / 127
    bound = step / 2 * linear.weight.dequantize(torch.float64).abs().sum(1)
    bound += 2**-7 * torch.maximum(few.abs(), many.abs())
    assert bool(((few - many).abs() <= bound).all())
    assert bool((few != many).any())


def test_outlier_columns_do_not_coarsen_the_others():
    linear = _layer(Format.LLM_INT8, 64, 512, bias=False, crossover=ALWAYS)
    x = _input(32, 512)
    x[3, 77] = 300.0
    exact = x.double() @ linear.weight.dequantize(torch.float64).T
    split = (linear(x).double() - exact)[torch.arange(32) != 3].abs().max()
    scale = x.float().abs().amax() / 127  # one step for all, as without the split
    naive = ((x.float() / scale).round() * scale).double()
    whole = (naive @ linear.weight.dequantize(torch.float64).T - exact).abs().max()
    assert split < whole / 5


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
def test_rows_of_zeros_give_the_bias_alone(fmt, crossover):
    linear = _layer(fmt, 48, 64, bias=True, crossover=crossover)
    x = _input(5, 64)
    x[2] = 0.0
    assert torch.equal(linear(x)[2], linear.bias)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(fmt, crossover, bad):
    linear = _layer(fmt, 48, 64, bias=False, crossover=crossover)
    x = _input(6, 64)
    x[4, 9] = bad
    y = linear(x)
    assert not bool(torch.isfinite(y[4]).any())
    assert bool(torch.isfinite(y[[0, 1, 2, 3, 5]]).all())


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("crossover", [1, NEVER])
def test_no_tokens_give_no_rows(fmt, crossover):
    linear = _layer(fmt, 48, 64, bias=True, crossover=crossover)
    dtype = torch.float32 if fmt is Format.FP32 else torch.bfloat16
    assert linear(torch.empty(0, 64, dtype=dtype)).shape == (0, 48)


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
def test_rows_may_be_a_slice_of_wider_ones_and_are_left_as_they_were(fmt, crossover):
    linear = _layer(fmt, 48, 64, bias=True, crossover=crossover)
    wide = _input(9, 160, torch.float32 if fmt is Format.FP32 else torch.bfloat16)
    wide[3, 5] = 8.0
    before = wide.clone()
    for part in (wide[:, 3:67], wide[:, 16:80], wide[2:5, 64:128], wide.view(-1)[5:69].view(1, 64)):
        expected = linear(part.clone(memory_format=torch.contiguous_format))
        assert torch.allclose(linear(part), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("fmt", [Format.INT8, Format.INT4, Format.INT3])
@pytest.mark.parametrize("n_out", [200, 192])
def test_wide_layers_are_widened_a_block_at_a_time(monkeypatch, fmt, n_out):
    whole = _layer(fmt, n_out, 64, bias=True, crossover=ALWAYS)
    monkeypatch.setattr(cpu, "SCRATCH_ELEMENTS", 64 * 64)
    blocks = _layer(fmt, n_out, 64, bias=True, crossover=ALWAYS)
    x = _input(12, 64)
    assert torch.allclose(whole(x), blocks(x), rtol=2**-7)


@pytest.mark.parametrize("fmt", [*INT8, Format.INT4])
def test_the_crossover_decides_the_op(fmt):
    linear = _layer(fmt, 64, 576, bias=False, crossover=5)
    x = _input(5, 576)
    at, below = linear(x), linear(x[:4])
    linear.crossover = ALWAYS
    assert torch.equal(at, linear(x))
    linear.crossover = NEVER
    assert torch.equal(below, linear(x[:4]))


def test_a_device_without_ops_is_refused_by_name():
    with pytest.raises(ValueError, match="int8 has no ops on device meta"):
        quantize_linear(torch.zeros(2, 2), None, Format.INT8, device="meta")
    assert set(CPU_OPS) == set(Format)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"bias of \[3\] does not fit a weight of \[2, 4\]"):
        quantize_linear(torch.zeros(2, 4), torch.zeros(3), Format.INT8)
    with pytest.raises(ValueError, match=r"\[N, K\], not \[2\]"):
        quantize_linear(torch.zeros(2), None, Format.BF16)


def test_a_lower_threshold_keeps_more_columns_in_16_bits_and_is_more_exact():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    x[:, ::16] *= 4.0
    exact = x @ weight.T
    errors = []
    for threshold in (20.0, 6.0, 2.5):
        linear = quantize_linear(weight, None, Format.LLM_INT8, outlier_threshold=threshold)
        linear.crossover = 0
        y = linear(x.bfloat16())
        expected = reference.llm_int8_linear(x.bfloat16().float(), linear.weight)
        assert (y.float() - expected).abs().max() < 2**-7 * expected.abs().max()
        errors.append(float((y.float() - exact).norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", [(128, 4096), (4096, 128)])
def test_without_a_threshold_llm_int8_computes_small_layers_as_int8_does(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x = _with_outliers(_input(32, shape[1]))
    linears = [
        quantize_linear(weight, None, fmt, outlier_threshold=threshold)
        for fmt, threshold in [
            (Format.INT8, None),
            (Format.LLM_INT8, None),
            (Format.LLM_INT8, 6.0),
        ]
    ]
    for linear in linears:
        linear.crossover = ALWAYS
    whole, by_default, decomposed = (linear(x) for linear in linears)
    assert torch.equal(by_default, whole)
    assert not torch.equal(decomposed, whole)
    assert linears[1].format is Format.LLM_INT8


def test_without_a_threshold_llm_int8_decomposes_the_input_of_a_layer_4096_wide():
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1))
    x = _with_outliers(_input(8, 4096))
    by_default, decomposed = (
        quantize_linear(weight, None, Format.LLM_INT8, outlier_threshold=threshold)
        for threshold in (None, 6.0)
    )
    by_default.crossover = decomposed.crossover = ALWAYS
    assert torch.equal(by_default(x), decomposed(x))
    exact = x.float() @ weight.T
    assert (by_default(x).float() - exact).norm() / exact.norm() > 0.005
