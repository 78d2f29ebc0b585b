"""The fused norm against fp64, by flash-attention's rule: our error is at most twice that of plain
torch in the same dtype."""

import pytest
import torch

from tightfit.kernels import reference
from tightfit.kernels.norm import MAX_HIDDEN_SIZE, add_norm, choose_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
NORMS = pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
EPS = 1e-5


def _random(*shape, dtype=torch.float32, seed=0, scale=1.0, shift=0.0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return drawn.to(device=DEVICE, dtype=dtype)


def _double(tensor):
    return None if tensor is None else tensor.double()


def _assert_as_good_as_torch(got, exact, plain):
    """Half a unit in the last place of the largest result counts as plain torch's error in any
    case: with few results it may be spared that by luck."""
    half_unit = exact.abs().max() * torch.finfo(got.dtype).eps / 2
    allowed = 2 * torch.maximum((plain.double() - exact).abs().max(), half_unit) + 1e-5
    assert got.dtype == plain.dtype
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= allowed


def _check(x, residual, weight, bias, *, is_rms, eps=EPS):
    inputs = (x, residual, weight, bias)
    exact = reference.add_norm(*map(_double, inputs), eps=eps, is_rms=is_rms)
    plain = reference.add_norm(*inputs, eps=eps, is_rms=is_rms)
    y, total = add_norm(*inputs, eps=eps, is_rms=is_rms)
    _assert_as_good_as_torch(y, exact[0], plain[0])
    if residual is None:
        assert total is None
    else:
        assert torch.equal(total, plain[1])


@NORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("hidden_size", [1, 3, 16, 31, 576, 1000, 1024, 2049])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_the_norm_is_as_exact_as_plain_torch(n_tokens, hidden_size, has_residual, dtype, is_rms):
    x = _random(n_tokens, hidden_size, dtype=dtype)
    residual = _random(n_tokens, hidden_size, dtype=dtype, seed=1) if has_residual else None
    weight = _random(hidden_size, dtype=dtype, seed=2)
    bias = None if is_rms else _random(hidden_size, dtype=dtype, seed=3)
    _check(x, residual, weight, bias, is_rms=is_rms)


@NORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "hidden_size"), [(2, 14_336), (1, 12_288), (512, 64)])
def test_real_hidden_sizes_and_many_tokens_are_as_exact(n_tokens, hidden_size, dtype, is_rms):
    x, residual = (_random(n_tokens, hidden_size, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias = (_random(hidden_size, dtype=dtype, seed=seed) for seed in (2, 3))
    _check(x, residual, weight, bias, is_rms=is_rms)


@NORMS
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_and_bias_are_optional_and_of_any_dtype(has_weight, has_bias, is_rms):
    x = _random(3, 200, dtype=torch.float16)
    weight = _random(200, seed=2) if has_weight else None
    bias = _random(200, seed=3) if has_bias else None
    _check(x, None, weight, bias, is_rms=is_rms)


@NORMS
def test_a_row_far_from_zero_loses_no_digits_to_cancellation(is_rms):
    mean = 1000.0  # a mean square less a squared mean would keep one digit of the variance
    x = _random(4, 1000, shift=mean)
    y, _ = add_norm(x, None, None, None, eps=EPS, is_rms=is_rms)
    exact, _ = reference.add_norm(x.double(), None, None, None, eps=EPS, is_rms=is_rms)
    assert (y - exact).abs().max() <= 2 * mean * torch.finfo(x.dtype).eps


@NORMS
def test_large_halves_do_not_overflow(is_rms):
    x = _random(2, 500, scale=1e4).clamp(-6e4, 6e4).half()
    y, _ = add_norm(x, None, None, None, eps=EPS, is_rms=is_rms)
    exact, _ = reference.add_norm(x.double(), None, None, None, eps=EPS, is_rms=is_rms)
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-10


@NORMS
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_moment(eps, is_rms):
    _check(_random(3, 96, scale=0.1), None, None, None, is_rms=is_rms, eps=eps)


@NORMS
def test_rows_of_zeros_give_the_bias_alone(is_rms):
    x, weight, bias = _random(3, 40), _random(40, seed=2), _random(40, seed=3)
    x[1] = 0.0
    y, _ = add_norm(x, None, weight, bias, eps=EPS, is_rms=is_rms)
    assert torch.equal(y[1], bias)


@NORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_is_not_finite_does_not_spoil_its_neighbours(bad, is_rms):
    x = _random(4, 40)
    x[2, 7] = bad
    y, _ = add_norm(x, None, None, None, eps=EPS, is_rms=is_rms)
    assert bool(y[2].isnan().any())
    assert bool(y[[0, 1, 3]].isfinite().all())


@NORMS
def test_the_norm_is_that_of_the_sum_as_it_is_handed_on(is_rms):
    x, residual = (_random(4, 300, dtype=torch.float16, seed=seed) for seed in (0, 1))
    y, total = add_norm(x, residual, None, None, eps=EPS, is_rms=is_rms)
    again, _ = add_norm(total, None, None, None, eps=EPS, is_rms=is_rms)
    assert torch.equal(y, again)


@NORMS
def test_rows_may_be_a_slice_of_wider_ones_and_are_left_as_they_were(is_rms):
    wide, wider = (_random(6, width, dtype=torch.float16) for width in (300, 430))
    before = wide.clone(), wider.clone()
    x, residual = wide[1:4, 3:103], wider[2:5, 160:260]
    expected = add_norm(x.clone(), residual.clone(), None, None, eps=EPS, is_rms=is_rms)
    got = add_norm(x, residual, None, None, eps=EPS, is_rms=is_rms)
    transposed = add_norm(
        x.T.contiguous().T, residual.T.contiguous().T, None, None, eps=EPS, is_rms=is_rms
    )
    for other in (got, transposed):
        assert torch.equal(other[0], expected[0])
        assert torch.equal(other[1], expected[1])
    assert torch.equal(wide, before[0])
    assert torch.equal(wider, before[1])


@NORMS
def test_no_tokens_give_no_rows(is_rms):
    x = torch.empty(0, 64, device=DEVICE)
    y, total = add_norm(x, x, None, None, eps=EPS, is_rms=is_rms)
    assert y.shape == total.shape == (0, 64)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hidden_size", [1, 33, 1023, 1025, 12_288, 14_336, MAX_HIDDEN_SIZE])
def test_a_block_holds_its_row_in_as_many_threads_as_a_program_can_have(hidden_size, itemsize):
    tile = choose_tile(hidden_size, itemsize)
    assert hidden_size <= tile.block < 2 * max(hidden_size, 32)
    assert tile.num_warps in (1, 4, 8, 16, 32)


def test_what_does_not_fit_is_refused():
    x, vector = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    call = {"eps": EPS, "is_rms": False}
    with pytest.raises(ValueError, match=r"x must be \[T, C ≤ 16384\].* got \[8\]"):
        add_norm(vector, None, None, None, **call)
    with pytest.raises(ValueError, match=r"got \[1, 16385\] torch.float32"):
        add_norm(torch.zeros(1, MAX_HIDDEN_SIZE + 1), None, None, None, **call)
    with pytest.raises(ValueError, match=r"residual must be \[2, 8\] torch.float32 .* \[1, 8\]"):
        add_norm(x, x[:1], None, None, **call)
    with pytest.raises(ValueError, match=r"residual .* got \[2, 8\] torch.float16"):
        add_norm(x, x.half(), None, None, **call)
    with pytest.raises(ValueError, match=r"weight must be \[8\] floating, got \[7\]"):
        add_norm(x, None, vector[:7], None, **call)
    with pytest.raises(ValueError, match=r"bias must be \[8\] floating, got \[8\] torch.int64"):
        add_norm(x, None, vector, vector.long(), **call)
