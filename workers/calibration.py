"""Rounds a model's blocks for the inputs that they really see. T tokens, N out, K in.

Some text goes through the model, block by block. Each linear layer is rounded by GPTQ for the
inputs that the layers before it, rounded already, give it; then the text goes on through the
rounded block. One block is in memory, in fp32, with the Hessian of one of its layers; hidden states
lie in a file. After a block is finished so is the file for the next one: a run that was interrupted
goes on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tightfit.kernels.gptq import (
    DAMPING,
    MAX_DAMPING,
    HessianError,
    factor_hessian,
    fit_grid,
    gptq,
)
from tightfit.kernels.groups import Quantized
from tightfit.workers.blocks import ModelParts, OpenBlock, mapped_states
from tightfit.workers.checkpoint import Checkpoint
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.errors import CheckpointError
from tightfit.workers.model_formats import Role, layer_roles
from tightfit.workers.rounding import held_weight, round_weight
from tightfit.workers.shard import qkv_rows
from tightfit.workers.stored import StoredScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What blocks are rounded for, and how."""

    samples: Sequence[Sequence[int]]
    """Token ids, all of one length."""
    damping: float = DAMPING
    """See `gptq.factor_hessian`."""
    act_order: bool = True
    """See `gptq.factor_hessian`."""

    @property
    def num_tokens(self) -> int:
        """Of one sample."""
        return len(self.samples[0])

    @property
    def digest(self) -> str:
        """SHA-256 of the samples."""
        return samples_digest(self.samples)

    @property
    def identity(self) -> str:
        """The same for the same calibration."""
        return f"{self.digest}, damping {self.damping:g}, act-order {self.act_order}"


def samples_digest(samples: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids."""
    text = ";".join(",".join(map(str, sample)) for sample in samples)
    return hashlib.sha256(text.encode()).hexdigest()


class CalibratedRounding:
    """Rounds the blocks of one checkpoint, from the first to the last.

    Args:
        checkpoint, config, path: the model, not quantised.
        calibration: samples that fit its context.
        directory: where hidden states are kept between blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        path: str | Path,
        calibration: Calibration,
        directory: Path,
    ) -> None:
        self._config, self._path = config, str(path)
        self._calibration, self._directory = calibration, directory
        self._parts = ModelParts(checkpoint, config, path, calibration.num_tokens)

    # -- hidden states -----------------------------------------------------------------------

    def has_states(self, layer: int) -> bool:
        """What goes into a block is there, whole."""
        path = self._states_path(layer)
        wanted = 4 * torch.Size(self._states_shape).numel()
        return path.exists() and path.stat().st_size == wanted

    def drop_states(self, before: int | None = None) -> None:
        """Remove the hidden states of the blocks before one, or all."""
        for layer in range(self._config.num_layers if before is None else before):
            self._states_path(layer).unlink(missing_ok=True)

    def _states_path(self, layer: int) -> Path:
        return self._directory / f"calibration-{layer:05}.states"

    @property
    def _states_shape(self) -> tuple[int, int, int]:
        calibration = self._calibration
        return (len(calibration.samples), calibration.num_tokens, self._config.hidden_size)

    def _write_states(self, layer: int, states: Iterable[Tensor]) -> None:
        """All samples' states, whole or not at all."""
        path = self._states_path(layer)
        fresh = path.with_name(f"{path.name}.part")
        target = mapped_states(fresh, self._states_shape)
        for row, state in zip(target, states, strict=True):
            row.copy_(state)
        del target
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)

    def _inputs(self, layer: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Every sample with a block's input [tokens, hidden_size], which may be overwritten."""
        states = mapped_states(self._states_path(layer), self._states_shape)
        for sample, state in zip(self._calibration.samples, states, strict=True):
            yield sample, state.clone()

    # -- blocks ------------------------------------------------------------------------------

    def start(self) -> None:
        """Make what goes into the first block."""
        with torch.inference_mode():
            self._write_states(0, self._parts.embed(self._calibration.samples))

    def round_layer(
        self, layer: int, schemes: Mapping[Role, StoredScheme], note: Callable[[str], None]
    ) -> dict[str, Quantized]:
        """Round one block and take the text through it.

        Args:
            layer: its number; its states are there.
            schemes: how its linear layers are to be stored; 8 bits are rounded to nearest.
            note: called with what is being done.
        Returns:
            by the names of its linear layers, without prefix; scales in bf16.
        Raises:
            CheckpointError: a layer's inputs are not finite.
        """
        with torch.inference_mode():
            block = self._parts.block(layer)
            rounded: dict[str, Quantized] = {}
            for role, names in layer_roles(self._config, layer).items():
                note(f"layer {layer}: {role}")
                (whole,) = self.round_role(block, layer, role, [schemes[role]])
                # What the stage will compute with, the rounding of scale and zero included.
                block.linears[role].dense.copy_(held_weight(whole))
                rounded.update(self._single(role, names, whole))
            note(f"layer {layer}: outputs")
            self.pass_on(block, layer)
        return rounded

    def pass_on(self, block: OpenBlock, layer: int) -> None:
        """Take the text through a block as it is now; after the last nothing is kept."""
        if layer + 1 < self._config.num_layers:
            outputs = (block(sample, state) for sample, state in self._inputs(layer))
            self._write_states(layer + 1, outputs)

    def round_role(
        self, block: OpenBlock, layer: int, role: Role, schemes: Sequence[StoredScheme]
    ) -> list[Quantized]:
        """One linear layer, or several with the same input one below the other, rounded in some
        ways for the inputs that the block as it is now gives it.

        Raises:
            CheckpointError: its inputs are not finite.
        """
        weight = block.linears[role].dense
        try:
            if all(scheme.bits == 8 for scheme in schemes):
                return [round_weight(weight, scheme) for scheme in schemes]
            factor, importance, order = self._factor(block, layer, role)
            return [
                round_weight(weight, scheme)
                if scheme.bits == 8
                else _gptq(weight, scheme, factor, importance, order)
                for scheme in schemes
            ]
        except ValueError as error:
            name = layer_roles(self._config, layer)[role][0]
            raise CheckpointError(self._path, name, str(error)) from error

    def _factor(self, block: OpenBlock, layer: int, role: Role) -> tuple[Tensor, Tensor, Tensor]:
        """The Hessian's factor, its diagonal, and the order of features."""
        damping = self._calibration.damping
        while True:
            hessian = block.hessian(role, self._inputs(layer))
            diagonal = hessian.diagonal().clone()
            try:
                factor, order = factor_hessian(
                    hessian, damping=damping, act_order=self._calibration.act_order
                )
            except HessianError:
                damping = max(10 * damping, DAMPING)
                if damping > MAX_DAMPING:
                    raise
            else:
                return factor, diagonal, order

    def _single(
        self, role: Role, names: tuple[str, ...], whole: Quantized
    ) -> Iterator[tuple[str, Quantized]]:
        """The layers that lie one below the other in `whole`, as the checkpoint has them."""
        rows = qkv_rows(self._config) if role is Role.QKV else None
        if rows is not None:
            whole = whole.rows(torch.argsort(rows))
        shapes = {linear.name: linear.n_out for linear in self._config.linears()}
        first = 0
        for name in names:
            end = first + shapes[name]
            yield name, whole.rows(torch.arange(first, end))
            first = end


def _gptq(
    weight: Tensor, scheme: StoredScheme, factor: Tensor, importance: Tensor, order: Tensor
) -> Quantized:
    scale, zero_point = fit_grid(
        weight, importance, bits=scheme.bits, group_size=scheme.group_size or weight.shape[1]
    )
    return gptq(weight, factor, order, bits=scheme.bits, scale=scale, zero_point=zero_point)
