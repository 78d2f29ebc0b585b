"""Measured rates and links: what times follow, and what a plan's text of them may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.cluster.planning.rates import Link, Rates, at, dump_curve, parse_curve

CURVE = ((1, 0.010), (65, 0.074), (257, 0.170))


def test_between_measured_numbers_of_tokens_seconds_are_on_a_straight_line():
    assert at(CURVE, 1) == 0.010
    assert at(CURVE, 33) == pytest.approx(0.042)
    assert at(CURVE, 161) == pytest.approx(0.122)


def test_beyond_them_the_last_line_goes_on_but_never_down():
    assert at(CURVE, 449) == pytest.approx(0.266)
    assert at(((4, 0.2), (8, 0.1)), 100) == 0.1
    assert at(((4, 0.2), (8, 0.3)), 1) == 0.2


def test_one_measurement_alone_stands_for_all():
    assert at(((8, 0.3),), 1) == at(((8, 0.3),), 900) == 0.3


def test_a_part_of_two_formats_takes_the_time_of_both():
    rates = Rates((("int4", ((1, 1.0), (64, 2.0))), ("int8", ((1, 0.5), (32, 3.0)))))
    curve = rates.curve({"int4": 2_000_000_000, "int8": 500_000_000})
    assert [tokens for tokens, _ in curve] == [1, 32, 64]
    assert curve[0][1] == pytest.approx(2 * 1.0 + 0.5 * 0.5)
    assert curve[1][1] == pytest.approx(2 * (1 + 31 / 63) + 0.5 * 3.0)
    assert rates.covers({"int4", "int8"})
    assert not rates.covers({"int4", "bf16"})


def test_a_link_takes_its_latency_and_the_bytes():
    assert Link(latency_us=50, gb_per_s=2).seconds(4_000_000) == pytest.approx(0.00205)
    assert Link(latency_us=50).seconds(4_000_000) == pytest.approx(5e-5)
    assert Link().seconds(10**9) == 0.0


@given(
    st.dictionaries(st.integers(1, 10**6), st.floats(1e-9, 1e4), min_size=1, max_size=6).map(
        lambda points: tuple(sorted(points.items()))
    )
)
def test_a_curve_is_the_same_after_its_text(curve):
    read = parse_curve(dump_curve(curve))
    assert [tokens for tokens, _ in read] == [tokens for tokens, _ in curve]
    assert [s for _, s in read] == pytest.approx([s for _, s in curve], rel=1e-5)


@pytest.mark.parametrize(
    "text", ["", "1", "1:x", "0:1", "8:1 4:1", "1:-2", "1:nan", "1:inf", "a:1"]
)
def test_text_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="tokens and milliseconds"):
        parse_curve(text)
