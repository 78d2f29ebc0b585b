"""Rounds a model's blocks for the inputs that they really see. T tokens, N out, K in.

Some text goes through the model, block by block. Each linear layer is rounded by GPTQ for the
inputs that the layers before it, rounded already, give it; then the text goes on through the
rounded block. One block is in memory, in fp32, with the Hessian of one of its layers; hidden states
lie in a file. After a block is finished so is the file for the next one: a run that was interrupted
goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.dispatch import Linear
from tightfit.kernels.formats import Format
from tightfit.kernels.gptq import (
    DAMPING,
    MAX_DAMPING,
    HessianError,
    factor_hessian,
    fit_grid,
    gptq,
)
from tightfit.kernels.groups import Quantized, pack_groups
from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.checkpoint import Checkpoint
from tightfit.workers.decoder import LayerWeights
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.errors import CheckpointError
from tightfit.workers.model_formats import Role, layer_roles
from tightfit.workers.shard import ShardModel, qkv_rows

BLOCK_SIZE: Final = 16
FIELDS: Final = {
    Role.QKV: "qkv",
    Role.ATTN_OUT: "attn_out",
    Role.MLP_UP: "mlp_up",
    Role.MLP_DOWN: "mlp_down",
}
"""Of `LayerWeights`, in the order in which a block computes them."""


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
        text = ";".join(",".join(map(str, sample)) for sample in self.samples)
        return hashlib.sha256(text.encode()).hexdigest()


class _Seen(Exception):
    """A layer has shown its input: what comes after it is not needed."""


class _Watched(Linear):
    """A dense linear layer that shows its inputs to `watcher` while there is one."""

    __slots__ = ("watcher",)

    def __init__(self, linear: Linear) -> None:
        assert isinstance(linear.weight, Tensor)
        shape = (linear.n_out, linear.n_in)
        super().__init__(Format.FP32, linear.weight, linear.bias, shape=shape, device=linear.device)
        self.watcher: Callable[[Tensor], object] | None = None

    @property
    def dense(self) -> Tensor:
        """The weight [N, K], which may be changed."""
        assert isinstance(self.weight, Tensor)
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.watcher is not None:
            self.watcher(x)
            raise _Seen
        return super().__call__(x)


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
        self._checkpoint, self._config, self._path = checkpoint, config, str(path)
        self._calibration, self._directory = calibration, directory

    # -- hidden states -----------------------------------------------------------------------

    def has_states(self, layer: int) -> bool:
        """What goes into a block is there, whole."""
        path = self._states_path(layer)
        return path.exists() and path.stat().st_size == self._states_bytes

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

    @property
    def _states_bytes(self) -> int:
        samples, tokens, width = self._states_shape
        return 4 * samples * tokens * width

    def _mapped(self, path: Path) -> Tensor:
        """The file's fp32 [samples, tokens, hidden_size], in the page cache only."""
        flat = torch.from_file(str(path), shared=True, size=self._states_bytes // 4)
        return flat.view(self._states_shape)

    def _write_states(self, layer: int, states: Iterator[Tensor]) -> None:
        """All samples' states, whole or not at all; those of the block before go."""
        path = self._states_path(layer)
        fresh = path.with_name(f"{path.name}.part")
        target = self._mapped(fresh)
        for row, state in zip(target, states, strict=True):
            row.copy_(state)
        del target
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)

    # -- blocks ------------------------------------------------------------------------------

    def start(self) -> None:
        """Make what goes into the first block."""
        with torch.inference_mode():
            embedding = self._load(0, 0, stage=0)
            self._write_states(
                0, (embedding.forward(self._batch(s), None) for s in self._calibration.samples)
            )

    def round_layer(
        self,
        layer: int,
        *,
        bits: int,
        group_size: Callable[[int], int | None],
        note: Callable[[str], None],
    ) -> dict[str, Quantized]:
        """Round one block and take the text through it.

        Args:
            layer: its number; its states are there.
            bits: 4 or 3.
            group_size: K → input features that share a scale; None: a whole channel.
            note: called with what is being done.
        Returns:
            by the names of its linear layers, without prefix; scales in bf16.
        Raises:
            CheckpointError: a layer's inputs are not finite.
        """
        with torch.inference_mode():
            shard = self._load(layer, layer + 1, stage=1)
            watched = self._watch(shard)
            rounded: dict[str, Quantized] = {}
            for role, names in layer_roles(self._config, layer).items():
                note(f"layer {layer}: {role}")
                linear = watched[role]
                size = group_size(linear.n_in)
                whole = self._round(shard, layer, linear, names[0], bits=bits, group_size=size)
                # What the stage will compute with, the rounding of scale and zero included.
                linear.dense.copy_(pack_groups(whole).dequantize())
                rounded.update(self._parts(role, names, whole))
            if layer + 1 < self._config.num_layers:
                note(f"layer {layer}: outputs")
                inputs = self._inputs(layer)
                outputs = (shard.forward(batch, state) for batch, state in inputs)
                self._write_states(layer + 1, outputs)
        return rounded

    def _load(self, first: int, end: int, *, stage: int) -> ShardModel:
        spec = StageSpec(
            model_path=self._path,
            stage_index=stage,
            num_stages=3,
            first_layer=first,
            end_layer=end,
            format=Format.FP32,
            block_size=BLOCK_SIZE,
        )
        shard = ShardModel.load(self._checkpoint, self._config, spec)
        shard.allocate_kv(self._num_blocks)
        return shard

    @property
    def _num_blocks(self) -> int:
        return -(-self._calibration.num_tokens // BLOCK_SIZE)

    def _batch(self, sample: Sequence[int]) -> MicroBatch:
        table = list(range(self._num_blocks))
        part = SequenceSlice(
            sequence_id=0, start_position=0, token_ids=list(sample), block_table=table
        )
        return MicroBatch(epoch=0, step=0, slices=[part])

    def _watch(self, shard: ShardModel) -> dict[Role, _Watched]:
        (block,) = shard.layers
        watched = {role: _Watched(getattr(block.weights, FIELDS[role])) for role in FIELDS}
        fields = {FIELDS[role]: linear for role, linear in watched.items()}
        weights: LayerWeights = dataclasses.replace(block.weights, **fields)  # type: ignore[arg-type]
        block.weights = weights
        return watched

    def _round(
        self,
        shard: ShardModel,
        layer: int,
        linear: _Watched,
        name: str,
        *,
        bits: int,
        group_size: int | None,
    ) -> Quantized:
        """One linear layer, or several with the same input, one below the other."""
        try:
            factor, importance, order = self._factor(shard, layer, linear)
            scale, zero_point = fit_grid(
                linear.dense, importance, bits=bits, group_size=group_size or linear.n_in
            )
            return gptq(linear.dense, factor, order, bits=bits, scale=scale, zero_point=zero_point)
        except ValueError as error:
            raise CheckpointError(self._path, name, str(error)) from error

    def _factor(
        self, shard: ShardModel, layer: int, linear: _Watched
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The Hessian's factor, its diagonal, and the order of features."""
        damping = self._calibration.damping
        while True:
            hessian = self._hessian(shard, layer, linear)
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

    def _hessian(self, shard: ShardModel, layer: int, linear: _Watched) -> Tensor:
        """Σ xᵀ x [K, K] of the layer's inputs x over all samples."""
        hessian = torch.zeros(linear.n_in, linear.n_in)
        linear.watcher = lambda x: hessian.addmm_(x.t(), x)
        for sample, state in self._inputs(layer):
            with contextlib.suppress(_Seen):
                shard.forward(sample, state)
        linear.watcher = None
        return hessian

    def _inputs(self, layer: int) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Every sample with a block's input [tokens, hidden_size], which may be overwritten."""
        states = self._mapped(self._states_path(layer))
        for sample, state in zip(self._calibration.samples, states, strict=True):
            yield self._batch(sample), state.clone()

    def _parts(
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
