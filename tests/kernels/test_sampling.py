"""Sampling without a sort against a sort: what is kept, ties included, and the token drawn.

The kernel's own weights are the oracle's input, so that sets can be compared exactly; that they
mean the same as `workers.sampler` has tests of its own.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.kernels import reference
from tightfit.kernels.sampling import MAX_VOCABULARY_SIZE, choose_tile, sample
from tightfit.workers import sampler
from tightfit.workers.api import SamplingSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST_UNIFORM = 1 - 2**-53
NEVER = -math.inf

DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "min_p": torch.float32,
    "uniform": torch.float64,
}
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5}


def _logits(rows, vocabulary_size, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary_size, generator=generator) * scale).to(DEVICE)


def _uniforms(count, seed=9):
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.tolist()


def _numbers(rows, numbers):
    """Lists of one number for each row: given as such, or as one for all."""
    every = OFF | numbers
    return {
        name: value if isinstance(value, list) else [value] * rows for name, value in every.items()
    }


def _sample(logits, **numbers):
    tensors = {
        name: torch.tensor(values, dtype=DTYPES[name], device=DEVICE)
        for name, values in _numbers(logits.shape[0], numbers).items()
    }
    return sample(logits, **tensors)


def _kept(drawn, row):
    """Mask [V] of what the kernel kept."""
    weights, border = drawn.weights[row], drawn.border[row]
    tied = weights == border
    return (weights > border) | (tied & (tied.cumsum(0) <= drawn.num_at_border[row]))


def _check(logits, **numbers):
    """Every row, none of them greedy, against the oracle; returns what was drawn."""
    before = logits.clone()
    drawn = _sample(logits, **numbers)
    every = _numbers(logits.shape[0], numbers)
    logprobs = logits.double().log_softmax(-1)
    for row in range(logits.shape[0]):
        filters = {name: every[name][row] for name in ("top_k", "top_p", "min_p")}
        weights, kept = drawn.weights[row], _kept(drawn, row)
        assert torch.equal(kept, reference.kept_tokens(weights, **filters))
        token = int(drawn.token_ids[row])
        assert token == reference.draw_token(weights, kept, every["uniform"][row])
        assert bool(kept[token])
        assert float(drawn.logprobs[row]) == pytest.approx(float(logprobs[row, token]), abs=2e-6)
        x = (before[row].double() - before[row].max()) / every["temperature"][row]
        assert torch.allclose(weights.double(), x.exp(), rtol=2e-5, atol=1e-30)
    assert torch.equal(logits, before)
    return drawn


def _num_kept(drawn):
    return [int(_kept(drawn, row).sum()) for row in range(drawn.weights.shape[0])]


FILTERS = {
    "none": {},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "top-k and top-p": {"top_k": 20, "top_p": 0.6},
    "min-p and top-p": {"min_p": 0.02, "top_p": 0.9},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.03, "temperature": 0.7},
    "all, hot": {"top_k": 30, "top_p": 0.5, "min_p": 0.3, "temperature": 3.0},
}


@pytest.mark.parametrize("numbers", FILTERS.values(), ids=FILTERS.keys())
def test_what_is_kept_and_drawn_is_the_sorts_and_the_samplers(numbers):
    logits = _logits(3, 1001)
    uniforms = [sampler.uniform(row, 5) for row in range(3)]
    drawn = _check(logits, **numbers, uniform=uniforms)
    spec = {"temperature": 1.0} | numbers
    specs = [SamplingSpec(seed=row, **spec) for row in range(3)]
    tokens = sampler.sample(logits.cpu(), specs, [5] * 3, [0, 1, 2])
    assert drawn.token_ids.tolist() == [token.token_id for token in tokens]
    if len(numbers) == 0:
        return
    for row in range(3):
        ids = sampler._kept(drawn.weights[row].cpu(), specs[row])
        assert torch.equal(_kept(drawn, row).cpu().nonzero().flatten(), ids)


def test_of_ties_at_the_border_of_top_k_the_lowest_ids_are_kept():
    row = [1.0, 2.0, 0.0, 2.0, 1.0, 1.0, 0.0, 2.0, 1.0]
    expected = [[1], [1, 3], [1, 3, 7], [0, 1, 3, 7], [0, 1, 3, 4, 7], [0, 1, 3, 4, 5, 7]]
    logits = torch.tensor([row] * 6, device=DEVICE)
    drawn = _check(logits, top_k=[1, 2, 3, 4, 5, 6])
    assert [_kept(drawn, row).nonzero().flatten().tolist() for row in range(6)] == expected


def test_a_token_stays_while_those_before_it_have_not_reached_top_p():
    logits = torch.zeros(6, 8, device=DEVICE)  # eighths, whose sums are exact
    drawn = _check(logits, top_p=[0.0, 0.125, 0.126, 0.5, 0.75, 1.0])
    assert _num_kept(drawn) == [1, 1, 2, 4, 6, 8]


def test_top_p_counts_only_ties_that_top_k_left():
    logits = torch.zeros(4, 16, device=DEVICE)
    logits[:, 3] = 1e-30  # no other weight in fp32
    drawn = _check(logits, top_k=8, top_p=[0.25, 0.5, 0.51, 1.0])
    assert _num_kept(drawn) == [2, 4, 5, 8]


def test_a_weight_of_just_min_p_is_kept():
    logits = torch.tensor([[0.0, math.log(0.5), math.log(0.25), -9.0]] * 2, device=DEVICE)
    border = float(_sample(logits).weights[0, 1])
    drawn = _check(logits, min_p=[border, math.nextafter(border, 1) + 1e-7])
    assert _num_kept(drawn) == [2, 1]


def test_top_k_and_min_p_at_the_same_weight_keep_the_lowest_ids():
    logits = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]] * 2, device=DEVICE)
    border = float(_sample(logits).weights[0, 1])
    assert _num_kept(_check(logits, top_k=[3, 5], min_p=border)) == [3, 4]


def test_masked_logits_are_never_kept():
    logits = _logits(4, 50)
    logits[:, ::2] = NEVER
    drawn = _check(logits, top_k=[0, 40, 0, 30], top_p=[1.0, 1.0, 0.999999, 0.9])
    assert _num_kept(drawn)[:2] == [25, 25]
    logits[:, 1:49] = NEVER
    assert _check(logits, top_k=[0, 1, 3, 60], top_p=0.5).token_ids.tolist() == [49] * 4


def test_one_token_is_always_drawn():
    drawn = _check(torch.full((2, 1), -3.0, device=DEVICE), top_k=[0, 5], top_p=[1.0, 0.1])
    assert drawn.token_ids.tolist() == [0, 0]
    assert drawn.logprobs.tolist() == [0.0, 0.0]


def test_a_top_k_of_the_vocabulary_or_more_is_off():
    logits = _logits(1, 300).expand(4, -1)
    drawn = _check(logits, top_k=[0, 300, 301, 2**31 - 1], top_p=0.5)
    assert len(set(_num_kept(drawn))) == 1
    assert _num_kept(_check(logits, top_k=[0, 299, 300, 400])) == [300, 299, 300, 300]


@pytest.mark.parametrize("top_p", [0.0, 1e-300, 1e-12, 1 - 1e-9, LAST_UNIFORM, 1.0, 2.0])
def test_extreme_top_p_keeps_one_token_or_all(top_p):
    drawn = _check(_logits(1, 64, scale=0.5), top_p=top_p)
    assert _num_kept(drawn) == [1 if top_p < 0.5 else 64]


def test_the_uniform_number_picks_by_running_mass_in_order_of_ids():
    logits = torch.tensor([[0.0, NEVER, 0.0, -1.0, 0.0, 0.0]] * 6, device=DEVICE)
    uniforms = [0.0, math.nextafter(0.25, 0), 0.25, 0.5, 0.75, LAST_UNIFORM]
    drawn = _check(logits, top_k=4, uniform=uniforms)
    assert drawn.token_ids.tolist() == [0, 0, 2, 4, 5, 5]


def test_the_last_uniform_number_draws_a_kept_token():
    _check(_logits(4, 700), top_p=[1.0, 0.9, 0.5, 0.1], uniform=LAST_UNIFORM)


def test_temperature_zero_is_the_lowest_id_of_the_largest_logit():
    logits = _logits(3, 1500)
    logits[1, [515, 3, 1400]] = 99.0
    drawn = _sample(logits, temperature=[0.0, 0.0, 1.0], top_k=5, top_p=0.5, uniform=0.9)
    assert drawn.token_ids[:2].tolist() == [int(logits[0].argmax()), 3]
    expected = logits.double().log_softmax(-1).gather(1, drawn.token_ids[:, None]).flatten()
    assert torch.allclose(drawn.logprobs.double(), expected, atol=2e-6)
    assert (drawn.border[:2].tolist(), drawn.num_at_border[:2].tolist()) == ([1.0, 1.0], [1, 1])


def test_extreme_temperatures_neither_overflow_nor_lose_a_token():
    logits = _logits(4, 40)
    drawn = _sample(logits, temperature=[1e-38, 1e-30, 1e-3, 1e30], uniform=LAST_UNIFORM)
    best = logits.argmax(-1).tolist()
    assert drawn.token_ids.tolist() == [*best[:3], 39]


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract:RuntimeWarning")
def test_logits_farther_apart_than_a_float_reaches_are_drawn_from():
    large = torch.tensor([[3e38, -3e38, 3e38]], device=DEVICE)
    assert _sample(large, uniform=0.6).token_ids.tolist() == [2]


def test_kept_tokens_of_equal_weight_are_counted_across_blocks():
    logits = torch.zeros(3, 1300, device=DEVICE)
    logits[:, 1299] = 1.0
    drawn = _check(logits, top_k=601, uniform=[0.9, LAST_UNIFORM, 0.99])
    assert drawn.token_ids.tolist() == [542, 1299, 596]


def test_a_running_mass_that_ends_with_a_block_draws_the_next_kept_token():
    logits = torch.zeros(1, 1025, device=DEVICE)
    logits[0, 512] = NEVER
    assert _check(logits, uniform=0.5).token_ids.tolist() == [513]


def test_masses_far_below_the_largest_still_count():
    logits = torch.tensor([[0.0, -27.0, -25.0, -26.0]] * 2, device=DEVICE)
    drawn = _check(logits, top_p=[1 - 1e-11, 1 - 1e-12])
    assert _num_kept(drawn) == [2, 4]


@pytest.mark.parametrize("uniform", [1.0, 2.0])
def test_a_uniform_number_out_of_range_draws_the_last_kept_token(uniform):
    logits = torch.tensor([[0.0, 1.0, 0.5, -1.0]], device=DEVICE)
    assert _sample(logits, top_k=2, uniform=uniform).token_ids.tolist() == [2]


@pytest.mark.parametrize("uniform", [-1.0, 1.0, 2.0])
def test_numbers_out_of_range_still_draw_a_token_of_the_vocabulary(uniform):
    numbers = {"temperature": [-1.0, 1.0], "top_k": [1, -3], "top_p": [0.5, -1.0], "min_p": 2.0}
    drawn = _sample(_logits(2, 30), **numbers, uniform=uniform)
    assert bool(((drawn.token_ids >= 0) & (drawn.token_ids < 30)).all())
    assert bool(drawn.logprobs.isfinite().all())


def test_a_row_without_a_distribution_is_told_by_its_logprob_and_spoils_no_other():
    logits = _logits(5, 600)
    logits[0, 17] = math.nan
    logits[1, 550] = math.inf
    logits[2] = NEVER
    logits[3, :300] = math.nan
    temperature = [1.0, 1.0, 1.0, 0.0, 1.0]
    drawn = _sample(logits, temperature=temperature, top_k=3, top_p=0.5)
    assert drawn.logprobs.isnan().tolist() == [True, True, True, True, False]
    assert drawn.token_ids[:4].tolist() == [0] * 4
    alone = _sample(logits[4:], top_k=3, top_p=0.5)
    assert torch.equal(drawn.token_ids[4:], alone.token_ids)


def test_a_real_vocabulary_is_the_sorts_and_the_samplers():
    vocabulary_size = 50_272
    logits = torch.cat((_logits(1, vocabulary_size, scale=3.0), _logits(1, vocabulary_size)))
    logits[1] = (logits[1] * 4).round() / 4  # thousands of ties
    numbers = {"temperature": [0.8, 1.0], "top_k": [0, 5000], "top_p": [0.95, 0.9]}
    uniforms = [sampler.uniform(row, 1) for row in range(2)]
    drawn = _check(logits, **numbers, uniform=uniforms)
    specs = [
        SamplingSpec(seed=row, **{name: values[row] for name, values in numbers.items()})
        for row in range(2)
    ]
    tokens = sampler.sample(logits.cpu(), specs, [1, 1], [0, 1])
    assert drawn.token_ids.tolist() == [token.token_id for token in tokens]


def test_a_row_gives_the_same_in_any_batch_and_in_rows_of_any_width():
    wide = _logits(3, 900)
    logits = wide[:, 5:805]
    numbers = {"top_p": 0.9, "temperature": 0.9}
    uniforms = _uniforms(3)
    together = _sample(logits, **numbers, uniform=uniforms)
    for row in range(3):
        alone = _sample(logits[row : row + 1].clone(), **numbers, uniform=[uniforms[row]])
        assert alone.token_ids[0] == together.token_ids[row]
        assert alone.logprobs[0] == together.logprobs[row]
    transposed = _sample(logits.T.contiguous().T, **numbers, uniform=uniforms)
    assert torch.equal(transposed.token_ids, together.token_ids)


LEVELS = st.sampled_from([NEVER, -200.0, -90.0, -30.0, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0])
LOGIT = st.one_of(LEVELS, st.floats(-20, 20, width=32))
SHARE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    values=st.lists(LOGIT, min_size=1, max_size=40).filter(lambda v: max(v) > NEVER),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 4.0]),
    top_k=st.integers(0, 45),
    top_p=SHARE,
    min_p=st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
    uniform=st.floats(0, LAST_UNIFORM),
)
def test_any_row_keeps_and_draws_what_a_sort_does(values, **numbers):
    _check(torch.tensor([values], device=DEVICE), **numbers)


def test_no_rows_give_no_tokens():
    drawn = _sample(torch.empty(0, 40, device=DEVICE))
    assert drawn.token_ids.shape == drawn.logprobs.shape == (0,)


@pytest.mark.parametrize("vocabulary_size", [1, 511, 512, 4096, 4097, 50_272, 250_880])
def test_a_row_of_the_workspace_is_whole_blocks_with_one_to_spare(vocabulary_size):
    tile = choose_tile(vocabulary_size)
    padded = tile.padded(vocabulary_size)
    assert padded % tile.block == 0
    assert vocabulary_size + tile.block <= padded < vocabulary_size + 2 * tile.block


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"logits must be \[B, V\] .* got \[8\]"):
        _sample(logits[0])
    with pytest.raises(ValueError, match=r"got \[2, 8\] torch.float16"):
        _sample(logits.half())
    with pytest.raises(ValueError, match=r"V must be 1 to 16777216, got 0"):
        _sample(logits[:, :0])
    with pytest.raises(ValueError, match=r"got 16777217"):
        _sample(torch.zeros(1, 1, device=DEVICE).expand(-1, MAX_VOCABULARY_SIZE + 1))
    with pytest.raises(ValueError, match=r"top_k must be \[2\] torch.int32 .* got \[3\]"):
        _sample(logits, top_k=[1, 2, 3])
