"""The layer split, against brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.split import split_layers

sizes = st.integers(min_value=0, max_value=50)
layer_lists = st.lists(sizes, min_size=1, max_size=9)


def stage_sizes(split, layers, embedding, head):
    totals = [sum(layers[first:end]) for first, end in split]
    totals[0] += embedding
    totals[-1] += head
    return totals


def every_split(num_layers, num_stages):
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *cuts, num_layers]
        yield list(pairwise(bounds))


@given(layers=layer_lists, embedding=sizes, head=sizes, data=st.data())
def test_no_other_split_has_a_smaller_fullest_stage(layers, embedding, head, data):
    num_stages = data.draw(st.integers(1, len(layers)))
    split = split_layers(layers, embedding, head, num_stages)
    assert split in list(every_split(len(layers), num_stages))
    best = min(
        max(stage_sizes(other, layers, embedding, head))
        for other in every_split(len(layers), num_stages)
    )
    assert max(stage_sizes(split, layers, embedding, head)) == best


@given(layers=layer_lists, embedding=sizes, head=sizes, data=st.data())
def test_a_split_keeps_the_budgets_or_none_could(layers, embedding, head, data):
    num_stages = data.draw(st.integers(1, len(layers)))
    budgets = data.draw(st.lists(st.integers(0, 200), min_size=num_stages, max_size=num_stages))

    def fits(split):
        totals = stage_sizes(split, layers, embedding, head)
        return all(size <= budget for size, budget in zip(totals, budgets, strict=True))

    fitting = [s for s in every_split(len(layers), num_stages) if fits(s)]
    if fitting:
        split = split_layers(layers, embedding, head, num_stages, budgets)
        assert split in fitting
        assert max(stage_sizes(split, layers, embedding, head)) == min(
            max(stage_sizes(s, layers, embedding, head)) for s in fitting
        )
    else:
        with pytest.raises(PlacementError, match=r"it lacks \d"):
            split_layers(layers, embedding, head, num_stages, budgets)


@given(
    layers=st.lists(st.integers(1, 50), min_size=2, max_size=9),
    embedding=sizes,
    head=sizes,
    room=st.integers(1, 200),
)
def test_the_number_of_stages_that_an_error_proposes_fits_and_one_less_does_not(
    layers, embedding, head, room
):
    try:
        split_layers(layers, embedding, head, 1, [room])
    except PlacementError as error:
        words = str(error)
    else:
        return
    items = [*layers]
    items[0] += embedding
    items[-1] += head
    if max(items) > room:
        assert "No number of stages" in words
        return
    proposed = int(words.split(" stages of ")[0].rsplit(" ", 1)[1])
    assert split_layers(layers, embedding, head, proposed, [room] * proposed)
    with pytest.raises(PlacementError):
        split_layers(layers, embedding, head, proposed - 1, [room] * (proposed - 1))


def test_a_heavy_embedding_takes_layers_from_the_first_stage_and_a_heavy_head_from_the_last():
    assert split_layers([10] * 12, 40, 20, 3) == [(0, 2), (2, 8), (8, 12)]


def test_more_stages_than_layers_are_refused_with_the_most_that_is_possible():
    with pytest.raises(PlacementError, match="at most 3 stages"):
        split_layers([1, 1, 1], 0, 0, 4)


def test_an_impossible_split_names_the_stage_what_it_holds_and_what_would_do():
    gib = 2**30
    with pytest.raises(PlacementError) as caught:
        split_layers([gib] * 8, gib, 2 * gib, 2, [4 * gib, 4 * gib])
    words = str(caught.value)
    assert "stage 1 (layers 4-7 and the LM head) needs 6.00 GiB, its budget is 4.00 GiB" in words
    assert "it lacks 2.00 GiB" in words
    assert "3 stages of 4.00 GiB would do" in words


def test_a_split_of_many_layers_on_many_stages_takes_a_moment_only():
    layers = [2_466_000_000] * 96
    split = split_layers(layers, 3_600_000_000, 3_600_000_000, 16)
    assert len(split) == 16
    assert split[0][0] == 0
    assert split[-1][1] == 96
