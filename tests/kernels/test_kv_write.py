"""Writing into the paged cache: 16-bit values exactly, int8 as the reference quantises."""

import pytest
import torch

from tightfit.kernels import reference
from tightfit.kernels.kv_write import write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

SHAPES = ((1, 16), (2, 64), (5, 80), (3, 96), (8, 128))
"""(H_kv, D)."""


def _random(*shape, dtype=torch.float16, seed=1):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device=DEVICE, dtype=dtype)


def _cache(num_kv_heads, head_dim, dtype, num_slots=48):
    """Filled, so that a write beside its slot shows; int8 with scales."""
    shape = (2 * num_kv_heads, num_slots, head_dim)
    if dtype is not torch.int8:
        return torch.full(shape, 7.0, dtype=dtype, device=DEVICE), None
    scales = torch.full(shape[:2], 7.0, dtype=torch.bfloat16, device=DEVICE)
    return torch.full(shape, 7, dtype=dtype, device=DEVICE), scales


def _written(write, kv, slots, num_kv_heads, head_dim, dtype):
    cache, scales = _cache(num_kv_heads, head_dim, dtype)
    write(cache, scales, kv, slots)
    return cache, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_what_is_written_is_what_the_reference_writes(n_tokens, shape, is_int8, dtype):
    num_kv_heads, head_dim = shape
    kv = _random(n_tokens, 2 * num_kv_heads * head_dim, dtype=dtype)
    slots = torch.tensor([33, 0, 47, 12, 13][:n_tokens], device=DEVICE)
    stored = torch.int8 if is_int8 else dtype
    cache, scales = _written(write_kv, kv, slots, *shape, stored)
    expected, expected_scales = _written(reference.write_kv, kv, slots, *shape, stored)
    assert torch.equal(cache, expected)
    assert scales is None or torch.equal(scales, expected_scales)


def test_int8_is_half_a_step_from_the_value_at_most():
    kv = _random(6, 2 * 3 * 64) * torch.logspace(-5, 4, 6, device=DEVICE).half()[:, None]
    slots = torch.arange(6, device=DEVICE)
    cache, scales = _written(write_kv, kv, slots, 3, 64, torch.int8)
    got = cache[:, :6].double() * scales[:, :6].double()[:, :, None]
    error = (got - kv.double().view(6, 6, 64).transpose(0, 1)).abs()
    assert bool((error <= scales[:, :6].double()[:, :, None] * 0.5001).all())
    assert int(cache[:, :6].abs().amax(-1).min()) >= 126  # all of the range is used


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
def test_zeros_have_a_scale_and_what_is_not_finite_shows():
    kv = _random(4, 2 * 64)
    kv[0] = 0.0
    kv[1, 3], kv[2, 70] = float("nan"), float("-inf")
    slots = torch.arange(4, device=DEVICE)
    cache, scales = _written(write_kv, kv, slots, 1, 64, torch.int8)
    assert scales[:, 0].tolist() == [1.0, 1.0]
    assert not cache[:, 0].any()
    expected = [[False, True, False, False], [False, False, True, False]]
    assert scales[:, :4].isnan().tolist() == expected


def test_the_value_in_the_middle_of_two_steps_goes_to_the_even_one():
    kv = torch.zeros(1, 2 * 16, dtype=torch.float16, device=DEVICE)
    kv[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -3.5])
    cache, _ = _written(write_kv, kv, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1, 16,
                        torch.int8)  # fmt: skip
    assert cache[0, 0, :5].tolist() == [127, 0, 2, -2, -4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_negative_slots_are_skipped_and_rows_may_be_slices(dtype):
    wide = _random(3, 400)
    part = wide[:, 16 : 16 + 2 * 2 * 64]
    slots = torch.tensor([5, -1, 7], device=DEVICE)
    cache, _ = _written(write_kv, part, slots, 2, 64, dtype)
    expected, _ = _written(write_kv, part[::2].contiguous(), slots[::2], 2, 64, dtype)
    assert torch.equal(cache, expected)
    untouched = [slot for slot in range(48) if slot not in (5, 7)]
    assert bool((cache[:, untouched] == 7).all())


def test_no_tokens_write_nothing():
    cache, _ = _written(write_kv, _random(0, 256), torch.zeros(0, dtype=torch.int64, device=DEVICE),
                        2, 64, torch.float16)  # fmt: skip
    assert bool((cache == 7).all())


@pytest.mark.gpu
def test_slots_past_two_to_the_31_elements_are_found():
    cache = torch.zeros((2, 2**24 + 64, 128), dtype=torch.float16, device=DEVICE)
    slots = torch.tensor([2**24 + 63], device=DEVICE)
    kv = _random(1, 256)
    write_kv(cache, None, kv, slots)
    assert torch.equal(cache[:, -1].reshape(1, -1), kv)


def test_what_does_not_fit_is_refused():
    kv, slots = _random(2, 256), torch.arange(2, device=DEVICE)
    cache, _ = _cache(2, 64, torch.float16)
    with pytest.raises(ValueError, match=r"kv must be .* got \[2, 256\] torch.float32"):
        write_kv(cache, None, kv.float(), slots)
    with pytest.raises(ValueError, match=r"cache must be .* with 255 values"):
        write_kv(cache, None, kv[:, 1:], slots)
    with pytest.raises(ValueError, match=r"slots must be \[2\] int64, got \[2\] torch.int32"):
        write_kv(cache, None, kv, slots.int())
    with pytest.raises(ValueError, match=r"int8 with scales, got .*torch.int8.* and no scales"):
        write_kv(cache.to(torch.int8), None, kv, slots)
    with pytest.raises(ValueError, match=r"D must be 16, 32, … or 128, got 8"):
        write_kv(torch.zeros(32, 48, 8, dtype=torch.float16, device=DEVICE), None, kv, slots)
