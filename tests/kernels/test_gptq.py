"""GPTQ against the algorithm as its paper writes it, and against what it is for: less loss in what
the layer puts out."""

import pytest
import torch

from tightfit.kernels.gptq import HessianError, factor_hessian, fit_grid, gptq
from tightfit.kernels.groups import grid, round_to_nearest

pytestmark = pytest.mark.usefixtures("one_thread")


def _inputs(tokens, n_in, seed=0):
    """Features that depend on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator)
    x = torch.randn(tokens, n_in, generator=generator) @ mix
    return x * torch.rand(n_in, generator=generator)


def _weight(n_out, n_in):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1))


def _hessian(x):
    return x.t() @ x


def _loss(weight, hessian, quantized):
    error = (quantized.dequantize() - weight).double()
    return float((error @ hessian.double() * error).sum())


def _paper(weight, hessian, order, bits, scale, zero_point, damping=0.01):
    """Algorithm 1 of arXiv 2210.17323 in fp64, with H's inverse; columns first to last."""
    n_in = weight.shape[1]
    hessian, weight = hessian.double(), weight.double()[:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.empty_like(weight)
    for i in range(n_in):
        group = int(order[i]) // (n_in // scale.shape[1])
        step, zero = scale[:, group].double(), zero_point[:, group].double()
        integers[:, i] = ((weight[:, i] / step).round() + zero).clamp(0, 2**bits - 1)
        error = (weight[:, i] - (integers[:, i] - zero) * step) / upper[i, i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
    result = torch.empty_like(integers)
    result[:, order] = integers
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "n_in"), [(4, 64, 256), (3, 32, 160), (4, 200, 200), (3, 1, 7)]
)
def test_the_integers_are_those_of_the_paper(bits, group_size, n_in, act_order):
    weight, hessian = _weight(40, n_in), _hessian(_inputs(3 * n_in, n_in))
    scale, zero_point = grid(weight.view(40, -1, group_size), bits=bits)
    factor, order = factor_hessian(hessian.clone(), act_order=act_order)
    mine = gptq(weight, factor, order, bits=bits, scale=scale, zero_point=zero_point)
    theirs = _paper(weight, hessian, order.flip(0), bits, scale, zero_point)
    # Sums in fp32 put a value that lies halfway on the other side now and then.
    assert (mine.integers != theirs).float().mean() < 2e-3


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("group_size", [32, 128])
def test_it_loses_far_less_than_rounding_to_nearest(bits, group_size):
    weight, hessian = _weight(96, 256), _hessian(_inputs(512, 256))
    nearest = round_to_nearest(weight, bits=bits, group_size=group_size)
    factor, order = factor_hessian(hessian.clone())
    for scale, zero_point in (
        (nearest.scale, nearest.zero_point),
        fit_grid(weight, hessian.diagonal(), bits=bits, group_size=group_size),
    ):
        rounded = gptq(weight, factor, order, bits=bits, scale=scale, zero_point=zero_point)
        assert _loss(weight, hessian, rounded) < 0.5 * _loss(weight, hessian, nearest)
        assert rounded.integers.max() < 2**bits


def test_act_order_spares_the_features_that_matter():
    x = _inputs(600, 128)
    x[:, :100] *= 0.05
    weight, hessian = _weight(64, 128), _hessian(x)
    scale, zero_point = grid(weight.view(64, -1, 128), bits=3)
    losses = []
    for act_order in (True, False):
        factor, order = factor_hessian(hessian.clone(), act_order=act_order)
        rounded = gptq(weight, factor, order, bits=3, scale=scale, zero_point=zero_point)
        losses.append(_loss(weight, hessian, rounded))
    assert losses[0] < losses[1]


def test_a_feature_that_is_always_zero_is_rounded_to_nearest():
    x = _inputs(300, 64)
    x[:, 5] = 0
    weight = _weight(32, 64)
    nearest = round_to_nearest(weight, bits=4, group_size=32)
    factor, order = factor_hessian(_hessian(x))
    rounded = gptq(
        weight, factor, order, bits=4, scale=nearest.scale, zero_point=nearest.zero_point
    )
    assert torch.equal(rounded.integers[:, 5], nearest.integers[:, 5])
    assert not torch.equal(rounded.integers, nearest.integers)


def test_inputs_that_are_all_zero_round_everything_to_nearest():
    weight = _weight(32, 64)
    nearest = round_to_nearest(weight, bits=4, group_size=32)
    factor, order = factor_hessian(torch.zeros(64, 64))
    scale, zero_point = fit_grid(weight, torch.zeros(64), bits=4, group_size=32)
    rounded = gptq(weight, factor, order, bits=4, scale=scale, zero_point=zero_point)
    assert torch.equal(rounded.integers, nearest.integers)


def test_the_factor_takes_the_place_of_the_hessian():
    hessian = _hessian(_inputs(300, 96))
    factor, order = factor_hessian(hessian)
    assert factor.data_ptr() == hessian.data_ptr()
    again = _hessian(_inputs(300, 96))
    again.diagonal().add_(0.01 * again.diagonal().mean())
    torch.testing.assert_close(
        factor.t() @ factor, again[order][:, order], rtol=1e-4, atol=1e-5 * float(again.max())
    )


def test_the_result_does_not_depend_on_how_much_is_done_at_a_time(monkeypatch):
    weight, hessian = _weight(37, 96), _hessian(_inputs(300, 96))
    factor, order = factor_hessian(hessian.clone())
    scale, zero_point = fit_grid(weight, hessian.diagonal(), bits=4, group_size=32)
    whole = gptq(weight, factor, order, bits=4, scale=scale, zero_point=zero_point)
    monkeypatch.setattr("tightfit.kernels.gptq.ROWS_ELEMENTS", 10 * 96)
    monkeypatch.setattr("tightfit.kernels.gptq.SCRATCH_ELEMENTS", 10 * 96)
    again_factor, again_order = factor_hessian(hessian.clone())
    assert torch.equal(again_factor, factor)
    assert torch.equal(again_order, order)
    again = gptq(weight, factor, order, bits=4, scale=scale, zero_point=zero_point)
    assert torch.equal(whole.integers, again.integers)
    for part, same in zip(
        fit_grid(weight, hessian.diagonal(), bits=4, group_size=32),
        (scale, zero_point),
        strict=True,
    ):
        assert torch.equal(part, same)


@pytest.mark.parametrize("bits", [4, 3])
def test_a_fitted_grid_is_never_worse_by_its_own_measure(bits):
    weight, importance = _weight(50, 128), _hessian(_inputs(300, 128)).diagonal()

    def loss(scale, zero_point):
        groups = weight.view(50, -1, 32)
        steps = scale.float()[..., None]
        integers = (groups / steps).round().add(zero_point[..., None]).clamp(0, 2**bits - 1)
        error = ((integers - zero_point[..., None]) * steps - groups).abs() ** 2.4
        return (error * importance.view(-1, 32)).sum(-1)

    fitted = loss(*fit_grid(weight, importance, bits=bits, group_size=32))
    whole = loss(*grid(weight.view(50, -1, 32), bits=bits))
    assert (fitted <= whole * (1 + 1e-5)).all()
    assert fitted.sum() < 0.95 * whole.sum()


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(HessianError, match=r"damping 0\.01 the Hessian has no Cholesky factor"):
        factor_hessian(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    for bad in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"inputs are not finite: their mean square is {bad}"):
            factor_hessian(torch.full((2, 2), float(bad)))
    weight = torch.zeros(3, 2)
    weight[1, 0] = float("nan")
    factor, order = factor_hessian(torch.eye(2))
    ones = torch.ones(3, 1)
    with pytest.raises(ValueError, match="NaN or infinite entry in row 1"):
        gptq(weight, factor, order, bits=4, scale=ones, zero_point=ones)
