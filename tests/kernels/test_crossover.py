"""From how many tokens on the many-token op is used, on a clock of our own and for real."""

import math
import time

import pytest
import torch

from tightfit.kernels.crossover import CANDIDATES, NEVER, find_crossover
from tightfit.kernels.dispatch import measure_crossover, quantize_linear
from tightfit.kernels.formats import Format


class Machine:
    """Two ops that take a stated time, and the clock that shows it."""

    def __init__(self, few_s, many_s):
        self.now = 0.0
        self._few_s, self._many_s = few_s, many_s

    def few(self, tokens):
        self.now += self._few_s(tokens)

    def many(self, tokens):
        self.now += self._many_s(tokens)

    def clock(self):
        return self.now

    def crossover(self, **options):
        return find_crossover(self.few, self.many, clock=self.clock, **options)


@pytest.mark.parametrize("true_crossover", [2, 8, 11, 48, 200])
def test_the_first_candidate_past_the_true_crossover_is_found(true_crossover):
    machine = Machine(lambda t: 1e-6 * t, lambda t: 1e-6 * (true_crossover - 0.5))
    expected = next(t for t in CANDIDATES if t >= true_crossover)
    assert machine.crossover() == expected


def test_an_op_that_never_wins_is_never_used():
    assert Machine(lambda t: 1e-6, lambda t: 2e-6).crossover() == NEVER


def test_a_lone_win_is_taken_for_noise():
    machine = Machine(lambda t: 1e-5 if t == 4 else 1e-6 * t, lambda t: 9e-6)
    assert machine.crossover() == 12


def test_slow_ops_end_in_time_with_an_extrapolated_answer():
    machine = Machine(lambda t: 0.05 * t, lambda t: 1.0)
    crossover = machine.crossover(limit_s=0.5)
    assert machine.now < 5
    assert crossover == math.ceil(1.0 / 0.05)


def test_ops_of_seconds_are_run_once():
    machine = Machine(lambda t: 0.1 * t, lambda t: 3.0)
    assert machine.crossover(limit_s=0.5) == 30
    assert machine.now == pytest.approx(0.2 + 3.0)


@pytest.mark.parametrize("fmt", [Format.FP32, Format.BF16])
def test_without_a_choice_nothing_is_measured(fmt):
    linear = quantize_linear(torch.ones(64, 64), None, fmt)
    assert measure_crossover(linear, limit_s=0.0) == NEVER


@pytest.mark.parametrize("fmt", [Format.INT8, Format.LLM_INT8])
def test_a_real_measurement_is_bounded_and_changes_nothing(fmt):
    layers = [quantize_linear(torch.ones(192, 96), None, fmt) for _ in range(3)]
    started = time.monotonic()
    crossover = measure_crossover(*layers, limit_s=0.05)
    assert time.monotonic() - started < 5  # ample: other tests share the cores
    assert crossover >= CANDIDATES[0]
    assert all(layer.crossover == NEVER for layer in layers)


def test_one_token_always_takes_the_exact_op():
    assert min(CANDIDATES) > 1
