"""The best mix of formats, against brute force."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.mix import Choice, best_choices, mix_for_bits
from tightfit.kernels.formats import Format
from tightfit.workers.model_formats import Role
from tightfit.workers.sensitivity import (
    MIX_FORMATS,
    FormatSensitivity,
    Sensitivities,
    UnitSensitivity,
)

ROLES = (Role.QKV, Role.ATTN_OUT, Role.MLP_UP, Role.MLP_DOWN)
choices = st.builds(
    Choice, st.integers(1, 30), st.one_of(st.integers(-20, 20), st.floats(-2, 9, width=16))
)
unit_lists = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=6)


def total_bytes(units, picked):
    return sum(unit[index].bytes for unit, index in zip(units, picked, strict=True))


def total_loss(units, picked):
    return sum(unit[index].loss for unit, index in zip(units, picked, strict=True))


@given(units=unit_lists, budget=st.integers(1, 120))
def test_no_other_choice_within_the_budget_loses_less(units, budget):
    fitting = [
        picked
        for picked in product(*(range(len(unit)) for unit in units))
        if total_bytes(units, picked) <= budget
    ]
    if not fitting:
        with pytest.raises(ValueError, match="the smallest choices take"):
            best_choices(units, budget)
        return
    picked = best_choices(units, budget)
    assert picked in fitting
    least = min(total_loss(units, other) for other in fitting)
    assert total_loss(units, picked) == pytest.approx(least, abs=1e-6)
    assert best_choices(units, budget) == picked


@given(
    losses=st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=8, max_size=8),
    budget=st.integers(8 * 7, 8 * 17),
)
def test_units_of_one_size_with_very_different_losses_are_told_apart(losses, budget):
    units = [
        [Choice(size, loss) for size, loss in zip((7, 9, 17), unit, strict=True)] for unit in losses
    ]
    picked = best_choices(units, budget)
    least = min(
        total_loss(units, other)
        for other in product(range(3), repeat=8)
        if total_bytes(units, other) <= budget
    )
    assert total_loss(units, picked) == pytest.approx(least, abs=1e-9)


def test_a_model_of_384_units_is_solved_within_its_budget_and_near_it():
    shapes = ((4, 3), (1, 1), (4, 4), (4, 4))
    units = []
    for number in range(384):
        size = 1000 * shapes[number % 4][0] + number % 3
        loss = 1 / (1 + (number * 7919) % 384)
        units.append([Choice(3 * size, loss), Choice(4 * size, loss / 5), Choice(8 * size, 0.0)])
    least = sum(unit[0].bytes for unit in units)
    most = sum(unit[-1].bytes for unit in units)
    for share in (0.02, 0.3, 0.7):
        budget = int(least + share * (most - least))
        picked = best_choices(units, budget)
        assert budget - 20_000 < total_bytes(units, picked) <= budget


def unit(layer, role, *losses):
    sizes = zip(MIX_FORMATS, (3, 4, 8), losses, strict=True)
    return UnitSensitivity(
        layer=layer,
        role=role,
        num_weights=8,
        formats={
            fmt: FormatSensitivity(bytes=size, loss_increase=loss, divergence=loss)
            for fmt, size, loss in sizes
        },
    )


def sensitivities(*units):
    return Sensitivities(
        model="m", text="t", num_tokens=1, method="rtn", group_size=None, base_loss=1.0,
        units=units,
    )  # fmt: skip


def test_bits_go_where_most_is_saved():
    measured = sensitivities(
        *(unit(0, role, 0.1, 0.01, 0.0) for role in ROLES[:3]),
        unit(0, ROLES[3], 5.0, 3.0, 0.0),
        *(unit(1, role, 0.1, 0.01, 0.0) for role in ROLES),
    )
    (first, second) = mix_for_bits(measured, 3.625)  # 29 bytes: 24, and 5 for one in int8
    assert first[Role.MLP_DOWN] is Format.INT8
    assert {*first.values(), *second.values()} == {Format.INT8, Format.INT3}
    (first, second) = mix_for_bits(measured, 3.5)  # 28 bytes: four in int4
    assert first[Role.MLP_DOWN] is Format.INT4
    assert [*first.values(), *second.values()].count(Format.INT4) == 4


def test_noise_that_says_that_fewer_bits_are_better_takes_no_bits_away():
    measured = sensitivities(
        unit(0, ROLES[0], 0.0, 0.3, 0.0),  # int3 measured better than int4
        unit(0, ROLES[1], 0.2, -0.4, 0.0),
        unit(0, ROLES[2], -1.0, -1.0, 0.0),
        unit(0, ROLES[3], 0.1, 0.1, 0.0),
    )
    (layer,) = mix_for_bits(measured, 3.5)
    assert layer == {
        Role.QKV: Format.INT3, Role.ATTN_OUT: Format.INT4, Role.MLP_UP: Format.INT3,
        Role.MLP_DOWN: Format.INT3,
    }  # fmt: skip
    (layer,) = mix_for_bits(measured, 4.5)  # four bytes more: one in int8, which saves most
    assert layer[Role.QKV] is Format.INT8


def test_too_few_bits_are_refused_with_the_fewest():
    measured = sensitivities(*(unit(0, role, 0.1, 0.0, 0.0) for role in ROLES))
    with pytest.raises(PlacementError, match=r"2\.5 bits .* int3 alone takes 3\.000"):
        mix_for_bits(measured, 2.5)
    assert set(mix_for_bits(measured, 3.0)[0].values()) == {Format.INT3}
    assert set(mix_for_bits(measured, 99.0)[0].values()) <= {Format.INT4, Format.INT8}
