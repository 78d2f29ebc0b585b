"""HQQ: what it returns, and that it loses less than rounding to nearest."""

import pytest
import torch

from tightfit.kernels.groups import pack_groups, round_to_nearest
from tightfit.kernels.hqq import hqq

pytestmark = pytest.mark.usefixtures("one_thread")


def _weight(n_out, n_in, seed=0):
    """Heavy tails, as weights have."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(n_out, n_in, generator=generator)
    return 0.02 * wide * (1 + torch.randn(n_out, n_in, generator=generator).abs())


def _loss(weight, quantized):
    """Of what a stage holds, by row."""
    return (pack_groups(quantized).dequantize() - weight).abs().pow(3).sum(1)


@pytest.mark.parametrize(("bits", "has_real_zero", "most"), [(4, True, 0.93), (3, False, 0.97)])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_it_loses_less_than_rounding_to_nearest(bits, has_real_zero, most, group_size):
    weight = _weight(64, 256)
    mine = hqq(weight, bits=bits, group_size=group_size, has_real_zero=has_real_zero)
    nearest = round_to_nearest(weight, bits=bits, group_size=group_size)
    assert mine.scale.dtype is mine.zero_point.dtype is torch.bfloat16
    assert mine.scale.shape == mine.zero_point.shape == nearest.scale.shape
    assert int(mine.integers.max()) == 2**bits - 1
    assert _loss(weight, mine).sum() < most * _loss(weight, nearest).sum()
    assert (_loss(weight, mine) <= 1.01 * _loss(weight, nearest)).all()
    if not has_real_zero:
        assert torch.equal(mine.zero_point, mine.zero_point.float().round().clamp(0, 7))


@pytest.mark.parametrize("bits", [4, 3])
def test_a_value_far_above_the_others_is_kept(bits):
    weight = _weight(8, 128)
    weight[3, 70] = 4.0
    mine = hqq(weight, bits=bits, group_size=64)
    nearest = round_to_nearest(weight, bits=bits, group_size=64)
    assert torch.equal(mine.integers[3, 64:], nearest.integers[3, 64:])
    assert torch.equal(mine.scale[3, 1], nearest.scale[3, 1])
    assert float(mine.zero_point[3, 1]) == float(nearest.zero_point[3, 1])


def test_evenly_spaced_values_are_found_exactly_wherever_zero_lies():
    step, first = 2.0**-6, 2.0**-7
    weight = (torch.randint(0, 16, (8, 64)).float() * step + first).contiguous()
    weight[:, 0], weight[:, 1] = first, first + 15 * step
    mine = hqq(weight, bits=4, group_size=64)
    assert torch.equal(mine.dequantize(), weight)
    assert not torch.equal(
        round_to_nearest(weight, bits=4, group_size=64).dequantize(), weight
    )  # zero is none of the values


@pytest.mark.parametrize("has_real_zero", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_groups_of_one_value_are_kept(value, has_real_zero):
    weight = torch.full((3, 64), value)
    mine = hqq(weight, bits=4, group_size=32, has_real_zero=has_real_zero).dequantize()
    torch.testing.assert_close(mine, weight, rtol=2**-7, atol=0)


def test_values_far_from_zero_are_no_worse_than_rounded_to_nearest():
    weight = 100 + _weight(16, 64)
    mine, nearest = (
        hqq(weight, bits=4, group_size=32), round_to_nearest(weight, bits=4, group_size=32),
    )  # fmt: skip
    assert (_loss(weight, mine) <= 1.01 * _loss(weight, nearest)).all()


def test_the_result_does_not_depend_on_how_much_is_done_at_a_time(monkeypatch):
    weight = _weight(37, 96)
    whole = hqq(weight, bits=3, group_size=32)
    monkeypatch.setattr("tightfit.kernels.hqq.SCRATCH_ELEMENTS", 5 * 96)
    again = hqq(weight, bits=3, group_size=32)
    assert torch.equal(whole.integers, again.integers)
    assert torch.equal(whole.scale, again.scale)
    assert torch.equal(whole.zero_point, again.zero_point)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="groups of 48 do not divide 64"):
        hqq(torch.zeros(2, 64), bits=4, group_size=48)
    with pytest.raises(ValueError, match="floating matrix"):
        hqq(torch.zeros(2, 64, dtype=torch.int8), bits=4)
    weight = torch.zeros(5, 64)
    weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite entry in row 3"):
        hqq(weight, bits=4, group_size=32)
