"""The planner against a solver of integer programmes, on cases too large for brute force."""

from random import Random

import numpy as np
import pytest

from tightfit.cluster.planning.inventory import Device, DeviceType, Inventory
from tightfit.cluster.planning.pace import pace_of
from tightfit.cluster.planning.planner import searches, solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.rates import NO_RATES, Rates
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import model_formats
from tightfit.workers.workspace import workspace_bytes

TOTAL = 2**31
BYTES = 1024
"""Unit of the programmes' numbers, so that rounding stays far below a byte."""


def request_of(seed):
    draw = Random(seed)
    model = decoder_config(
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": draw.randint(12, 40),
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": draw.choice([500, 3000]),
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        }
    )
    workspace = max(
        workspace_bytes(model, model_formats(model, name, kv="int8", device="cuda"), 16)
        for name in ("int3", "int4", "int8")
    )
    kinds = [
        (
            draw.randint(800_000, 5_000_000),
            draw.randint(1, 9),
            draw.choice([1.0, 1.5, 3.0]),
            rates_of(draw) if draw.random() < 0.5 else NO_RATES,
        )
        for _ in range(draw.randint(2, 4))
    ]
    devices = []
    for number in range(draw.randint(7, 12)):
        room, speed, price, rates = draw.choice(kinds)
        kind = DeviceType(
            name="t", memory_bytes=TOTAL, gb_per_s=speed, fp16_tflops=1.0, int8_tops=1.0,
            price=price, watts=1.0, rates=rates,
        )  # fmt: skip
        free = 512 * 2**20 + TOTAL // 50 + workspace + room
        devices.append(
            Device(
                device_id=f"n:{number}", node="n", type=kind, total_bytes=TOTAL, free_bytes=free,
                price=price,
            )
        )  # fmt: skip
    return PlanRequest(
        model=model,
        inventory=Inventory(devices=tuple(devices)),
        sequences=draw.randint(1, 4),
        context=draw.choice([64, 256]),
        formats=draw.choice([("int4", "int8"), ("int3", "int4"), ("int4",)]),
        is_mixed=True,
        kv_formats=("int8",),
        embedding_places=(draw.choice(["host", "device"]),),
        spare=draw.choice(list(Spare)),
        objective=draw.choice(list(Objective)),
        max_batch_tokens=16,
        room_grain_bytes=1,
    )


def rates_of(draw):
    """Of one token and of many; on some kinds fewer bits are slower than more."""
    return Rates(
        tuple(
            (name, ((1, draw.uniform(0.1, 1)), (8, draw.uniform(1, 3))))
            for name in ("int3", "int4", "int8")
        )
    )


class Programme:
    """Devices j: layers n_j, of them h_j better; used u_j, first f_j, last l_j; slowest time t."""

    def __init__(self, request, parts, blocks, num_stages=1):
        self.devices = request.inventory.devices
        self.num_layers = len(parts.layers)
        self.size = len(self.devices)
        self.rows, self.lower, self.upper = [], [], []
        per_layer = parts.layers[0] + blocks * parts.kv_block
        for total, kind in ((self.num_layers, "n"), (1, "f"), (1, "l")):
            self.add({(kind, j): 1 for j in range(self.size)}, total, total)
        for j, device in enumerate(self.devices):
            room = request.inventory.usable(device) - parts.workspace
            self.add({("n", j): 1, ("u", j): -self.num_layers}, -np.inf, 0)
            self.add({("n", j): 1, ("u", j): -1}, 0, np.inf)
            self.add({("h", j): 1, ("n", j): -1}, -np.inf, 0)
            self.add({("f", j): 1, ("u", j): -1}, -np.inf, 0)
            self.add({("l", j): 1, ("u", j): -1}, -np.inf, 0)
            held = {
                ("n", j): per_layer, ("h", j): parts.step, ("f", j): parts.embedding,
                ("l", j): parts.head,
            }  # fmt: skip
            self.add({key: value / BYTES for key, value in held.items()}, -np.inf, room / BYTES)
            pace = pace_of(
                parts, device.type, read_blocks=request.needed_blocks,
                tokens=request.step_tokens(num_stages),
            )  # fmt: skip
            (layer,), better = pace.layers, pace.better or pace.layers
            time = {("n", j): layer, ("h", j): better[0] - layer, ("l", j): pace.head}
            time = {key: value / BYTES for key, value in time.items()}
            self.add({**time, ("t", 0): -1}, -np.inf, 0)
            for other in range(self.size):
                if other != j:  # only a lone stage is both first and last
                    self.add({("f", j): 1, ("l", j): 1, ("u", other): 1}, -np.inf, 2)

    def index(self, kind, j):
        return 5 * self.size if kind == "t" else "nhufl".index(kind) * self.size + j

    def add(self, terms, lower, upper):
        row = np.zeros(5 * self.size + 1)
        for (kind, j), value in terms.items():
            row[self.index(kind, j)] = value
        self.rows.append(row)
        self.lower.append(lower)
        self.upper.append(upper)

    def least(self, terms):
        """Least value of a sum; None: there is no way at all."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        goal = np.zeros(5 * self.size + 1)
        for (kind, j), value in terms.items():
            goal[self.index(kind, j)] = value
        upper = np.ones(5 * self.size + 1)
        upper[: 2 * self.size], upper[-1] = self.num_layers, np.inf
        whole = np.ones(5 * self.size + 1)
        whole[-1] = 0
        found = milp(
            goal,
            constraints=LinearConstraint(np.array(self.rows), self.lower, self.upper),
            bounds=Bounds(np.zeros(5 * self.size + 1), upper),
            integrality=whole,
            options={"mip_rel_gap": 0},
        )
        assert found.status in (0, 2), found.message
        return found.fun if found.status == 0 else None

    def cost(self, objective):
        is_counted = objective is Objective.DEVICES
        return {
            ("u", j): 1 if is_counted else device.price for j, device in enumerate(self.devices)
        }

    def all_of(self, kind, sign=1):
        return {(kind, j): sign for j in range(self.size)}


def check(request):
    """Each objective in its turn, the earlier ones held."""
    found = solve(request)
    if found is None:
        (search,) = searches(request)
        assert Programme(request, search.parts, request.needed_blocks).least({}) is None
        return False
    parts, blocks = found.packer.parts, found.kv_blocks
    better = sum(run.num_better for run in found.runs)
    is_quality = request.spare is Spare.QUALITY

    loose = Programme(request, parts, request.needed_blocks)
    cost = loose.cost(request.objective)
    is_counted = request.objective is Objective.DEVICES
    spent = found.score.cost[0] if is_counted else found.score.cost[0] / 1e6
    if found.score.quality[0] == 0:  # else cost is that of a lower level
        assert loose.least(cost) == pytest.approx(spent, abs=1e-6)
    loose.add(cost, -np.inf, spent + 1e-6)
    # Of the same dollars, the fewest devices.
    assert loose.least(loose.all_of("u")) == pytest.approx(len(found.runs), abs=1e-6)
    loose.add(loose.all_of("u"), 0, len(found.runs))
    if is_quality and parts.step:
        assert loose.least(loose.all_of("h", -1)) == pytest.approx(-better, abs=1e-6)

    tight = [Programme(request, parts, blocks + more, len(found.runs)) for more in (0, 1)]
    for programme in tight:
        programme.add(cost, -np.inf, spent + 1e-6)
        programme.add(programme.all_of("u"), 0, len(found.runs))
        if is_quality:
            programme.add(programme.all_of("h"), better, np.inf)
    assert tight[1].least({}) is None
    slowest = tight[0].least({("t", 0): 1})
    assert found.score.slowest_ns == pytest.approx(slowest * BYTES, abs=1.5)
    return True


def test_the_solver_of_integer_programmes_finds_nothing_better():
    assert sum(check(request_of(seed)) for seed in range(6)) >= 3


@pytest.mark.slow
def test_the_solver_of_integer_programmes_finds_nothing_better_in_many_cases():
    assert sum(check(request_of(seed)) for seed in range(100, 180)) >= 50
