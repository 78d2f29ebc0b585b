import math

import pytest
import torch

from tightfit.workers import sampler
from tightfit.workers.api import SamplingSpec
from tightfit.workers.errors import StageError
from tightfit.workers.sampler import sample, score, uniform

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 40


def logits(rows, *, vocab=VOCAB, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def draw(row, spec, *, count=1, first_position=0):
    """Token ids drawn from one row [V] at consecutive positions."""
    rows = row.expand(count, -1)
    positions = range(first_position, first_position + count)
    drawn = sample(rows, [spec] * count, positions, [1] * count)
    return [token.token_id for token in drawn]


def expected_distribution(row, spec):
    """What the spec means, as plainly as it can be said: probabilities [V] in float64."""
    values = [float(x) for x in row]
    for token, bias in spec.logit_bias:
        values[token] += bias
    for token in spec.banned_token_ids:
        values[token] = -math.inf
    output = spec.history_token_ids[spec.num_prompt_tokens :]
    for token in set(spec.history_token_ids):
        factor = spec.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token in set(output):
        values[token] -= spec.presence_penalty + spec.frequency_penalty * output.count(token)
    top = max(values)
    weights = [math.exp((x - top) / spec.temperature) for x in values]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = [i for i in order if weights[i] >= spec.min_p]
    kept = kept[: spec.top_k] if spec.top_k else kept
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= spec.top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


def assert_drawn_from(counts, expected):
    """Chi-square: no token outside the support, and the others as often as they should be."""
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    cells = [(c, p * total) for c, p in zip(counts, expected, strict=True) if p * total >= 5]
    rare = total - sum(e for _, e in cells)
    if rare >= 5:
        cells.append((total - sum(c for c, _ in cells), rare))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    freedom = max(1, len(cells) - 1)
    # Mean `freedom`, variance twice that: five standard deviations.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


HISTORY = {"history_token_ids": [3, 4, 5, 5, 6, 6, 6], "num_prompt_tokens": 2}
SPECS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k past the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "top_p near one": {"top_p": 0.999},
    "min_p": {"min_p": 0.1},
    "min_p of one": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 8, "top_p": 0.6},
    "min_p and top_p": {"min_p": 0.05, "top_p": 0.8},
    "min_p and top_k": {"min_p": 0.2, "top_k": 12},
    "all three": {"min_p": 0.02, "top_k": 10, "top_p": 0.9, "temperature": 1.3},
    "bias": {"logit_bias": [(0, 3.0), (7, -100.0), (9, 1.5)]},
    "bans": {"banned_token_ids": [0, 1, 2, 3]},
    "repetition": {"repetition_penalty": 1.8, **HISTORY},
    "repetition that rewards": {"repetition_penalty": 0.6, **HISTORY},
    "presence": {"presence_penalty": 1.5, **HISTORY},
    "frequency": {"frequency_penalty": 0.9, **HISTORY},
    "everything": {
        "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.2, "logit_bias": [(4, 2.0)],
        "banned_token_ids": [11], **HISTORY,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_drawn_from_the_distribution_that_the_spec_describes(name):
    spec = SamplingSpec(**{"temperature": 1.0, "seed": 17, **SPECS[name]})
    row = logits(1, seed=3)[0]
    drawn = draw(row, spec, count=3000)
    counts = [drawn.count(token) for token in range(VOCAB)]
    assert_drawn_from(counts, expected_distribution(row, spec))


@pytest.mark.parametrize("name", SPECS)
def test_greedy_takes_the_most_probable_token_after_bias_bans_and_penalties(name):
    spec = SamplingSpec(**{**SPECS[name], "temperature": 0.0})
    for seed in range(20):
        row = logits(1, seed=seed)[0]
        plain = SamplingSpec(**{**SPECS[name], "temperature": 1.0, "top_k": 0, "min_p": 0.0})
        expected = expected_distribution(row, plain)
        assert draw(row, spec) == [expected.index(max(expected))]


def test_the_draw_is_the_inverse_of_the_distribution_function_in_order_of_ids():
    row, spec = logits(1, seed=5)[0], SamplingSpec(temperature=1.0, seed=99, top_p=0.9)
    expected = expected_distribution(row, spec)
    for position in range(200):
        number, mass, token = uniform(99, position), 0.0, 0
        while mass + expected[token] <= number:
            mass += expected[token]
            token += 1
        assert draw(row, spec, first_position=position) == [token]


def test_a_row_gets_the_same_token_alone_and_in_any_batch():
    specs = [
        SamplingSpec(**{"temperature": 1.0, "seed": i, "num_logprobs": 3, **spec})
        for i, spec in enumerate(SPECS.values())
    ]
    rows = logits(len(specs), vocab=3001, seed=7)
    positions = [i * 13 for i in range(len(specs))]
    together = sample(rows, specs, positions, list(range(len(specs))))
    order = list(reversed(range(len(specs))))
    backwards = sample(rows[order], [specs[i] for i in order], [positions[i] for i in order], order)
    assert backwards[::-1] == together
    for i, spec in enumerate(specs):
        assert sample(rows[i : i + 1], [spec], [positions[i]], [i]) == [together[i]]


def test_seed_and_position_alone_decide_the_draw():
    row = torch.zeros(100_000)
    spec = SamplingSpec(temperature=1.0, seed=2**64 - 1)
    first = draw(row, spec, count=50)
    assert draw(row, spec, count=50) == first
    assert len(set(first)) > 45
    assert draw(row, SamplingSpec(temperature=1.0, seed=5), count=50) != first
    assert draw(row, SamplingSpec(temperature=1.0, seed=-1), count=50) == first  # 64 bits


def test_the_random_numbers_are_those_of_philox_for_good():
    # Computed once; a change would break the replay of every stored (seed, position).
    assert [uniform(0, 0), uniform(1, 2), uniform(2**63, 7)] == pytest.approx(
        [0.011546754286331562, 0.30931491118583454, 0.4704565970347999], abs=0
    )


def test_a_filter_that_removes_nothing_changes_nothing():
    row = logits(1, vocab=5000, seed=9)[0]
    plain = draw(row, SamplingSpec(temperature=1.0, seed=4), count=100)
    for change in ({"top_k": 5000}, {"top_p": 1.0}, {"min_p": 1e-12}, {"top_p": 1 - 1e-12}):
        assert draw(row, SamplingSpec(temperature=1.0, seed=4, **change), count=100) == plain


@pytest.mark.parametrize("top_k", [999, 1000, 5000])
def test_a_top_k_of_the_whole_vocabulary_leaves_the_nucleus_as_it_is(top_k):
    row = logits(1, vocab=1000)[0]
    alone = draw(row, SamplingSpec(temperature=1.0, seed=3, top_p=0.9), count=400)
    spec = SamplingSpec(temperature=1.0, seed=3, top_p=0.9, top_k=top_k)
    assert draw(row, spec, count=400) == alone


def test_of_equally_probable_tokens_the_lower_ids_are_kept():
    row = torch.zeros(VOCAB)
    row[30] = 1.0
    top_k = draw(row, SamplingSpec(temperature=1.0, seed=1, top_k=3), count=300)
    assert set(top_k) == {0, 1, 30}
    assert draw(row[:30], SamplingSpec()) == [0]
    share = 1 / 30
    top_p = draw(row[:30], SamplingSpec(temperature=1.0, top_p=3.5 * share), count=300)
    assert set(top_p) == {0, 1, 2, 3}


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
def test_the_nucleus_of_a_large_vocabulary_is_the_smallest_set_that_reaches_top_p(scale, top_p):
    row = logits(1, vocab=2000, seed=11, scale=scale)[0]
    spec = SamplingSpec(temperature=1.0, seed=6, top_p=top_p)
    expected = expected_distribution(row, spec)
    drawn = draw(row, spec, count=400)
    inside = sum(expected[token] > 0 for token in drawn)
    assert inside >= 399  # rounding may move the border by one token


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-4])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    rows = logits(8, seed=2, scale=30.0)
    spec = SamplingSpec(temperature=temperature, top_p=0.9)
    drawn = sample(rows, [spec] * 8, range(8), range(8))
    assert [token.token_id for token in drawn] == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_distribution_function_fall_on_tokens_with_probability(number, monkeypatch):
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: number)
    for kept in range(1, 9):  # between two banned tokens
        row = torch.linspace(0.0, 1.0, kept + 2)
        spec = SamplingSpec(temperature=1.0, banned_token_ids=[0, kept + 1])
        (token,) = draw(row, spec)
        assert {0.0: token == 1, 0.5: 1 <= token <= kept}.get(number, token == kept)


def test_the_nucleus_ends_with_the_token_that_reaches_top_p():
    row = torch.zeros(4)
    drawn = draw(row, SamplingSpec(temperature=1.0, top_p=0.5), count=200)
    assert set(drawn) == {0, 1}


def test_a_token_without_probability_is_never_drawn():
    row = torch.full((VOCAB,), -1e9)
    row[20] = 0.0
    for spec in ({}, {"top_k": 30}, {"top_p": 0.99999}, {"min_p": 1e-9}):
        drawn = draw(row, SamplingSpec(temperature=1.0, seed=8, **spec), count=200)
        assert set(drawn) == {20}


def test_logprobs_are_of_the_unmodified_logits():
    rows = logits(3, seed=12)
    reference = torch.log_softmax(rows.double(), dim=-1)
    specs = [
        SamplingSpec(num_logprobs=0),
        SamplingSpec(num_logprobs=4, temperature=0.7, logit_bias=[(5, 100.0)]),
        SamplingSpec(num_logprobs=1000, banned_token_ids=[int(rows[2].argmax())]),
    ]
    tokens = sample(rows, specs, [1, 2, 3], [10, 11, 12])
    assert [token.sequence_id for token in tokens] == [10, 11, 12]
    assert tokens[1].token_id == 5
    for i, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float(reference[i, token.token_id]), abs=1e-5)
    assert [len(token.top_logprobs) for token in tokens] == [0, 4, VOCAB]
    best = reference[1].topk(4)
    assert [i for i, _ in tokens[1].top_logprobs] == best.indices.tolist()
    assert [p for _, p in tokens[1].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sum(math.exp(p) for _, p in tokens[2].top_logprobs) == pytest.approx(1, abs=1e-5)


def test_no_logprobs_come_unless_they_are_wanted():
    (token,) = sample(logits(1), [SamplingSpec(temperature=1.0)], [0], [1])
    assert (token.logprob, token.top_logprobs) == (None, [])


def test_the_logits_are_left_as_they_were():
    rows = logits(2, seed=1)
    before = rows.clone()
    spec = SamplingSpec(temperature=1.0, logit_bias=[(1, 5.0)], banned_token_ids=[2], top_p=0.5)
    sample(rows, [spec, SamplingSpec(banned_token_ids=[3])], [0, 0], [1, 2])
    assert torch.equal(rows, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused_by_sequence(value, temperature):
    rows = logits(4, vocab=1000)
    rows[2, 123] = value
    with pytest.raises(StageError, match="sequence 72: the logits are NaN or infinite"):
        sample(rows, [SamplingSpec(temperature=temperature)] * 4, range(4), [70, 71, 72, 73])


def test_scores_are_log_probabilities_of_the_targets():
    rows = logits(9, vocab=1000, seed=4)
    targets = [0, 999, 5, 5, 17, 200, 300, 400, 500]
    reference = torch.log_softmax(rows.double(), dim=-1)
    expected = [float(reference[i, target]) for i, target in enumerate(targets)]
    assert score(rows, targets) == pytest.approx(expected, abs=1e-5)


def test_a_large_vocabulary_is_scored_in_parts_with_the_same_result():
    rows = logits(5, vocab=2_000_003, seed=4)  # two rows at a time
    reference = rows.double().logsumexp(dim=-1)
    expected = [float(rows[i, i] - reference[i]) for i in range(5)]
    assert score(rows, list(range(5))) == pytest.approx(expected, abs=1e-4)


def test_scores_that_are_not_numbers_are_refused():
    rows = logits(3)
    rows[1, 0] = math.nan
    with pytest.raises(StageError, match="row 1 of 3 to score"):
        score(rows, [1, 2, 3])
