"""The fused activations against fp64, by flash-attention's rule: our error is at most twice that of
plain torch in the same dtype."""

import pytest
import torch

from tightfit.kernels import reference
from tightfit.kernels.activation import SUPPORTED_ACTIVATIONS, activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
NAMES = pytest.mark.parametrize("name", SUPPORTED_ACTIVATIONS)
GATED = pytest.mark.parametrize("is_gated", [False, True], ids=["alone", "gate"])


def _random(*shape, dtype=torch.float32, seed=0, scale=3.0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(device=DEVICE, dtype=dtype)


def _check(x, name, *, is_gated):
    """Half a unit in the last place of the largest result counts as plain torch's error in any
    case: with few results it may be spared that by luck."""
    exact = reference.activate(x.double(), name, is_gated=is_gated)
    plain = reference.activate(x, name, is_gated=is_gated)
    y = activate(x, name, is_gated=is_gated)
    half_unit = exact.abs().max() * torch.finfo(x.dtype).eps / 2
    allowed = 2 * torch.maximum((plain.double() - exact).abs().max(), half_unit) + 1e-5
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= allowed


@NAMES
@GATED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 513, 1025])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_activations_are_as_exact_as_plain_torch(n_tokens, width, dtype, is_gated, name):
    _check(_random(n_tokens, width * (1 + is_gated), dtype=dtype), name, is_gated=is_gated)


@NAMES
@GATED
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 11_008), (512, 24)])
def test_real_widths_and_many_tokens_are_as_exact(n_tokens, width, is_gated, name):
    x = _random(n_tokens, width * (1 + is_gated), dtype=torch.float16)
    _check(x, name, is_gated=is_gated)


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_neither_overflow_nor_vanish(dtype, name):
    largest = torch.finfo(dtype).max
    values = [
        0.0,
        -0.0,
        1e-6,
        -1e-6,
        1.5,
        -1.5,
        20.0,
        -20.0,
        90.0,
        -90.0,
        6e4,
        -6e4,
        largest,
        -largest,
    ]
    if name == "gelu_tanh":  # its cube is infinite in fp32, as torch's is
        values = values[:-2]
    x = torch.tensor([values], dtype=torch.float64, device=DEVICE).to(dtype)
    exact = reference.activate(x.double(), name, is_gated=False)
    y = activate(x, name, is_gated=False).double()
    assert bool(((y - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


@NAMES
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinite_and_missing_numbers_stay_so_where_they_are(name):
    x = torch.tensor([[float("inf"), 1.0, float("nan"), -1.0]], device=DEVICE)
    y = activate(x, name, is_gated=False)
    assert y[0, 0] == float("inf")
    assert y.isnan().tolist() == [[False, False, True, False]]
    assert torch.allclose(y[:, 1::2], reference.activate(x[:, 1::2], name, is_gated=False))


def test_the_gate_comes_first():
    x = torch.tensor([[-1.0, 2.0, 10.0, 20.0]], device=DEVICE)
    assert activate(x, "relu", is_gated=True).tolist() == [[0.0, 40.0]]


@GATED
def test_rows_may_be_a_slice_of_wider_ones_and_are_left_as_they_were(is_gated):
    wide = _random(6, 300, dtype=torch.float16)
    before = wide.clone()
    x = wide[1:4, 3:103]
    expected = activate(x.clone(), "silu", is_gated=is_gated)
    assert torch.equal(activate(x, "silu", is_gated=is_gated), expected)
    assert torch.equal(activate(x.T.contiguous().T, "silu", is_gated=is_gated), expected)
    assert torch.equal(wide, before)


@GATED
def test_no_tokens_give_no_rows(is_gated):
    x = torch.empty(0, 64, device=DEVICE)
    assert activate(x, "gelu", is_gated=is_gated).shape == (0, 32 if is_gated else 64)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 7, device=DEVICE)
    with pytest.raises(ValueError, match=r"name must be one of .* got 'swish'"):
        activate(x, "swish", is_gated=False)
    with pytest.raises(ValueError, match=r"x must be \[T, 2 · W\] .* got \[2, 7\]"):
        activate(x, "silu", is_gated=True)
    with pytest.raises(ValueError, match=r"x must be \[T, W\] .* got \[7\]"):
        activate(x[0], "silu", is_gated=False)
    with pytest.raises(ValueError, match=r"got \[2, 7\] torch.int64"):
        activate(x.long(), "relu", is_gated=False)
