"""A model's parts in fp32, one at a time, for text to go through. T tokens, N out, K in.

Each part is read when it is wanted, and forgotten with the object: of a large model one block is in
memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.dispatch import Linear
from tightfit.kernels.formats import Format
from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.checkpoint import Checkpoint
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import Role
from tightfit.workers.shard import ShardModel

BLOCK_SIZE: Final = 16


class _Seen(Exception):
    """A layer has shown its input: what comes after it is not needed."""


class OpenLinear(Linear):
    """A dense linear layer that can be changed, and shows its inputs to `watcher` while there is
    one."""

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


class OpenBlock:
    """One block whose linear layers are open."""

    def __init__(self, shard: ShardModel, num_blocks: int) -> None:
        self._shard, self._table = shard, list(range(num_blocks))
        (block,) = shard.layers
        w = block.weights
        self.linears = {
            Role.QKV: OpenLinear(w.qkv),
            Role.ATTN_OUT: OpenLinear(w.attn_out),
            Role.MLP_UP: OpenLinear(w.mlp_up),
            Role.MLP_DOWN: OpenLinear(w.mlp_down),
        }
        """Those with the same input are one; Q, K and V lie in that order."""
        block.weights = dataclasses.replace(
            w,
            qkv=self.linears[Role.QKV],
            attn_out=self.linears[Role.ATTN_OUT],
            mlp_up=self.linears[Role.MLP_UP],
            mlp_down=self.linears[Role.MLP_DOWN],
        )

    def __call__(self, sample: Sequence[int], state: Tensor) -> Tensor:
        """One sample's hidden states [T, hidden_size] through the block; `state` is overwritten."""
        return self._shard.forward(_batch(sample, self._table), state)

    def hessian(self, role: Role, inputs: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
        """Σ xᵀ x [K, K] of a layer's inputs x over samples with their hidden states, which are
        overwritten."""
        linear = self.linears[role]
        hessian = torch.zeros(linear.n_in, linear.n_in)
        linear.watcher = lambda x: hessian.addmm_(x.t(), x)
        for sample, state in inputs:
            with contextlib.suppress(_Seen):
                self(sample, state)
        linear.watcher = None
        return hessian


class ModelParts:
    """Reads the parts of one checkpoint, which is not quantised.

    Args:
        checkpoint, config, path: the model.
        num_tokens: of the longest sample that goes through it.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: DecoderConfig, path: str | Path, num_tokens: int
    ) -> None:
        self._checkpoint, self._config, self._path = checkpoint, config, str(path)
        self._num_blocks = -(-num_tokens // BLOCK_SIZE)

    def embed(self, samples: Iterable[Sequence[int]]) -> Iterable[Tensor]:
        """What goes into the first block, [T, hidden_size] for each sample."""
        shard = self._load(0, 0, stage=0)
        table = list(range(self._num_blocks))
        return (shard.forward(_batch(sample, table), None) for sample in samples)

    def block(self, layer: int) -> OpenBlock:
        """One block."""
        return OpenBlock(self._load(layer, layer + 1, stage=1), self._num_blocks)

    def head(self) -> ShardModel:
        """Final norm and LM head: for its `logits`."""
        num_layers = self._config.num_layers
        return self._load(num_layers, num_layers, stage=2)

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


def _batch(sample: Sequence[int], table: list[int]) -> MicroBatch:
    part = SequenceSlice(sequence_id=0, start_position=0, token_ids=list(sample), block_table=table)
    return MicroBatch(epoch=0, step=0, slices=[part])


def mapped_states(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file's fp32 numbers, in the page cache only; the file is made if it is not there."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size).view(shape)
