"""What each linear layer of a model loses in each format, as a file. No torch: planning reads it.

A unit is what gets one format: the linear layers of one role in one block, which have the same
input (q, k and v; gate and up). `measuring` fills this in; `cluster.planning.mix` chooses by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from tightfit.kernels.formats import Format, linear_bytes
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.errors import SensitivityError
from tightfit.workers.model_formats import Role, layer_roles

FILE_NAME: Final = "sensitivity.json"
VERSION: Final = 1
MIX_FORMATS: Final = (Format.INT3, Format.INT4, Format.INT8)
"""What a mix is made of, fewest bits first."""

BLOCK_ROLES: Final = (Role.QKV, Role.ATTN_OUT, Role.MLP_UP, Role.MLP_DOWN)
"""Of a block's units, in the order in which it computes them."""

FormatMix = tuple[Mapping[Role, Format], ...]
"""For each block, the format of its linear layers by role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSensitivity:
    """One unit in one format, all others as they were."""

    bytes: int
    """Of the unit as a stage holds it: values, scales and zero points, without bias."""
    loss_increase: float
    """Of the mean negative log-likelihood of the text's tokens, in nats; noise may make it
    negative."""
    divergence: float
    """Mean Kullback-Leibler divergence of the next token's distribution from the model's own, in
    nats: the loss increase that a text of the model's own would have. It is hardly noisy, and never
    negative but for rounding, but is not what a text by others loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSensitivity:
    """One unit in every format."""

    layer: int
    role: Role
    num_weights: int
    formats: dict[Format, FormatSensitivity]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivities:
    """A whole model's, as one file has them."""

    version: int = VERSION
    model: str
    """SHA-256 of what identifies the model; see `model_identity.model_digest`."""
    text: str
    """SHA-256 of the held-out tokens."""
    num_tokens: int
    """Of them."""
    method: str
    """How `int4` and `int3` were rounded: "rtn", "hqq" or "gptq"."""
    group_size: int | None
    """As in `QuantizeJob`."""
    calibration: str | None = None
    """What gptq rounded for; see `Calibration.identity`."""
    base_loss: float
    """Mean negative log-likelihood of the text's tokens by the model as it was, in nats."""
    units: tuple[UnitSensitivity, ...]
    """In the order in which the model computes them."""

    @property
    def num_weights(self) -> int:
        """Of the blocks' linear layers."""
        return sum(unit.num_weights for unit in self.units)

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return 1 + max(unit.layer for unit in self.units)


def save_sensitivities(path: Path, sensitivities: Sensitivities) -> None:
    """Write the file, whole or not at all."""
    fresh = path.with_name(f"{path.name}.part")
    content = msgspec.json.format(msgspec.json.encode(sensitivities), indent=1)
    fresh.write_bytes(content + b"\n")
    os.replace(fresh, path)


def load_sensitivities(path: Path) -> Sensitivities:
    """Read a file.

    Raises:
        SensitivityError: it cannot be read, is of another version, or does not hold every unit of a
            model in every format.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Sensitivities)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SensitivityError(path, f"cannot be read: {error}") from error
    if found.version != VERSION:
        raise SensitivityError(path, f"is of version {found.version}; this reads {VERSION}")
    seen = [(unit.layer, unit.role) for unit in found.units]
    blocks = range(len(seen) // len(BLOCK_ROLES))
    if not seen or seen != [(i, role) for i in blocks for role in BLOCK_ROLES]:
        raise SensitivityError(path, "does not hold the units of whole blocks, in their order")
    for unit in found.units:
        missing = [str(fmt) for fmt in MIX_FORMATS if fmt not in unit.formats]
        if missing:
            where = f"layer {unit.layer}, {unit.role}"
            raise SensitivityError(path, f"{where}: says nothing of {', '.join(missing)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit's place and shape."""

    layer: int
    role: Role
    names: tuple[str, ...]
    """Of its linear layers, without prefix."""
    n_out: int
    """Of all of them."""
    n_in: int

    @property
    def num_weights(self) -> int:
        """Of all of them."""
        return self.n_out * self.n_in

    def nbytes(self, fmt: Format, group_size: int | None) -> int:
        """As a stage holds it, without bias.

        Args:
            fmt: its format.
            group_size: input features that share a scale in `int4` and `int3`; None: all.
        """
        return linear_bytes(fmt, self.n_out, self.n_in, group_size=group_size or self.n_in)


def model_units(config: DecoderConfig) -> tuple[Unit, ...]:
    """All units of a model, in the order in which it computes them."""
    units = []
    for i in range(config.num_layers):
        shapes = {linear.name: linear for linear in config.layer_linears(i)}
        for role, names in layer_roles(config, i).items():
            n_out = sum(shapes[name].n_out for name in names)
            n_in = shapes[names[0]].n_in
            units.append(Unit(layer=i, role=role, names=names, n_out=n_out, n_in=n_in))
    return tuple(units)
