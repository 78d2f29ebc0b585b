"""Plans by what a model is measured to lose: the best mix of formats first, then its placement.

The mix is the best for its bits over the whole model (`mix`), wherever its layers will lie; the
placement of that mix is exact. A mix made stage by stage could use a little more of what is left on
each device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.mix import mix_for_bits, mix_loss
from tightfit.cluster.planning.planner import fits, last_that, searches
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.workers.model_formats import common_group_size
from tightfit.workers.sensitivity import MIX_FORMATS, FormatMix, Sensitivities, model_units

PER_BIT = 1000
"""Bits per weight are told apart in thousandths."""


def with_best_mix(
    request: PlanRequest, sensitivities: Sensitivities, max_loss: float | None = None
) -> PlanRequest:
    """The request, its formats being the best mix that keeps the bounds; or the best that fits at
    the least cost, where spare memory is to go to quality.

    Args:
        request: what is asked for; of its formats none counts.
        sensitivities: measured on this model.
        max_loss: most of the summed loss increase, in nats; None: any.

    Raises:
        PlacementError: they are another model's, or no mix loses so little.
    """
    _check(request, sensitivities)

    @cache
    def mix(thousandths: int) -> FormatMix:
        return mix_for_bits(sensitivities, thousandths / PER_BIT)

    least, most = (
        -(-PER_BIT * 8 * size // sensitivities.num_weights)
        for size in (_bytes(sensitivities, 0), _bytes(sensitivities, -1))
    )
    low = max(least, round(request.min_bits * PER_BIT))
    if low > most:
        raise PlacementError(
            f"{request.min_bits:g} bits per weight are asked for, and {MIX_FORMATS[-1]} alone has "
            f"{most / PER_BIT:.3f}"
        )
    if max_loss is not None and mix_loss(sensitivities, mix(low)) > max_loss:
        if mix_loss(sensitivities, mix(most)) > max_loss:
            raise PlacementError(
                f"a loss of {max_loss:g} is asked for at most, and {MIX_FORMATS[-1]} alone loses "
                f"{mix_loss(sensitivities, mix(most)):.4f}"
            )
        low = 1 + last_that(
            lambda bits: mix_loss(sensitivities, mix(bits)) > max_loss, low, most - 1
        )
    made = replace(request, mix=mix(low), min_bits=0.0)
    if request.spare is Spare.KV:
        return made
    choices = [search.cheapest() for search in searches(made)]
    costs = [found[0].cost for found in choices if found]
    if not costs:
        return made
    cost = min(costs)
    if request.objective is Objective.DEVICES:
        bounded = replace(made, max_devices=cost[0])
    else:
        bounded = replace(made, max_dollars=cost[0] / 1e6, max_devices=cost[1])
    best = last_that(lambda bits: fits(replace(bounded, mix=mix(bits))), low, most)
    return replace(made, mix=mix(best))


def _bytes(sensitivities: Sensitivities, index: int) -> int:
    return sum(unit.formats[MIX_FORMATS[index]].bytes for unit in sensitivities.units)


def _check(request: PlanRequest, sensitivities: Sensitivities) -> None:
    measured = [(unit.layer, unit.role, unit.num_weights) for unit in sensitivities.units]
    wanted = [(unit.layer, unit.role, unit.num_weights) for unit in model_units(request.model)]
    if measured != wanted:
        raise PlacementError(
            f"the sensitivities are of {sensitivities.num_layers} layers with "
            f"{sensitivities.num_weights:,} weights, not of this model's: measure it"
        )
    common = common_group_size(request.model)
    if sensitivities.group_size not in (None, common):
        raise PlacementError(
            f"the sensitivities are of groups of {sensitivities.group_size or 'a whole channel'}, "
            f"and the model is served in groups of {common}: measure with --group-size auto"
        )
