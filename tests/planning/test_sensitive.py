"""Plans by measured sensitivities."""

from dataclasses import replace

import pytest

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.inventory import Device, Inventory, read_device_types
from tightfit.cluster.planning.mix import mix_loss
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.planning.sensitive import with_best_mix
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.sensitivity import (
    MIX_FORMATS,
    FormatSensitivity,
    Sensitivities,
    UnitSensitivity,
    model_units,
)

MIB = 2**20
MODEL = decoder_config(
    {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 1000, "max_position_embeddings": 256,
    }
)  # fmt: skip


def sensitivities(losses=(0.09, 0.03, 0.001)):
    """The first layers lose most."""
    units = tuple(
        UnitSensitivity(
            layer=unit.layer, role=unit.role, num_weights=unit.num_weights,
            formats={
                fmt: FormatSensitivity(
                    bytes=unit.nbytes(fmt, 128),
                    loss_increase=loss / (1 + unit.layer), divergence=0.0,
                )
                for fmt, loss in zip(MIX_FORMATS, losses, strict=True)
            },
        )
        for unit in model_units(MODEL)
    )  # fmt: skip
    return Sensitivities(
        model="", text="", num_tokens=1, method="rtn", group_size=None, base_loss=1.0, units=units
    )


def request_for(*free_mib, **options):
    host = replace(read_device_types()["t4"], name="host", kind="cpu")
    devices = tuple(
        Device(
            device_id=f"n:{number}", node="n", type=host, total_bytes=2**30,
            free_bytes=size * MIB, price=1.0,
        )
        for number, size in enumerate(free_mib)
    )  # fmt: skip
    return PlanRequest(
        model=MODEL, inventory=Inventory(devices=devices), context=128, max_batch_tokens=16,
        room_grain_bytes=1, **options,
    )  # fmt: skip


def test_a_bound_on_loss_is_kept_with_as_few_bits_as_the_best_mix_needs():
    measured = sensitivities()
    for bound in (0.2, 0.5):
        made = with_best_mix(request_for(400), measured, bound)
        assert mix_loss(measured, made.mix) <= bound
        bits = make_plan("m", made).bits_per_weight
        tighter = with_best_mix(request_for(400), measured, bound / 2)
        assert make_plan("m", tighter).bits_per_weight > bits


def test_layers_that_lose_most_get_most_bits():
    made = with_best_mix(request_for(400, min_bits=4.5), sensitivities())
    wide = [sum(MIX_FORMATS.index(fmt) for fmt in layer.values()) for layer in made.mix]
    assert wide == sorted(wide, reverse=True)
    assert wide[0] > wide[-1]


def test_spare_memory_goes_to_the_layers_that_lose_most_and_costs_no_device_more():
    for sizes, num_stages in (((54, 54), 1), ((50, 50, 50), 2)):
        lean = with_best_mix(request_for(*sizes), sensitivities())
        rich = with_best_mix(request_for(*sizes, spare=Spare.QUALITY), sensitivities())
        assert solve(lean).score.cost == solve(rich).score.cost == (num_stages, 0)
        assert mix_loss(sensitivities(), rich.mix) < 0.6 * mix_loss(sensitivities(), lean.mix)
        # A tenth of a bit more, and it does not fit.
        bits = make_plan("m", rich).bits_per_weight
        more = request_for(*sizes, min_bits=bits + 0.1, max_devices=num_stages)
        assert solve(with_best_mix(more, sensitivities())) is None


@pytest.mark.parametrize(
    ("options", "bound", "complaint"),
    [
        ({"min_bits": 9.0}, None, "9 bits per weight are asked for, and int8 alone has 8.0"),
        ({}, 0.0001, "a loss of 0.0001 is asked for at most, and int8 alone loses"),
    ],
)
def test_what_no_mix_can_do_is_refused(options, bound, complaint):
    with pytest.raises(PlacementError, match=complaint):
        with_best_mix(request_for(400, **options), sensitivities(), bound)


def test_another_models_sensitivities_are_refused():
    other = replace(MODEL, num_layers=11)
    request = replace(request_for(400), model=other)
    with pytest.raises(PlacementError, match="not of this model's: measure it"):
        with_best_mix(request, sensitivities())


def test_sensitivities_of_other_groups_are_refused():
    measured = replace(sensitivities(), group_size=64)
    with pytest.raises(PlacementError, match="are of groups of 64, and the model is served"):
        with_best_mix(request_for(400), measured)
