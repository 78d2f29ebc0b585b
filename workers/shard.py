"""A shard: some consecutive layers, with the embedding or the head if it is at an end.

Loading reads this shard's tensors only, layer by layer, straight into their final format: one
layer at most is in memory at full precision. Weights that several layers share are held once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tightfit.kernels.dispatch import (
    DTYPES,
    Linear,
    hold_linear,
    measure_crossover,
    quantize_linear,
)
from tightfit.kernels.formats import Format
from tightfit.workers.api import MicroBatch, StageSpec
from tightfit.workers.batch import BatchBuilder, BatchInputs
from tightfit.workers.checkpoint import Checkpoint
from tightfit.workers.checkpoints.packed import StoredLinear
from tightfit.workers.decoder import DecoderLayer, LayerWeights, NormLayer, block_ops
from tightfit.workers.decoder_config import DecoderConfig, Position
from tightfit.workers.embedding import EmbeddingTable
from tightfit.workers.errors import CheckpointError, StageError
from tightfit.workers.gpu_graphs import DecodeGraphs
from tightfit.workers.kv_cache import KVCache
from tightfit.workers.model_formats import BLOCK_ROLES, ModelFormats, Role, model_formats
from tightfit.workers.shard_bytes import head_is_shared
from tightfit.workers.shard_reader import Progress, ShardReader
from tightfit.workers.shared_weights import shared_linears
from tightfit.workers.workspace import MAX_LOGIT_ROWS


def spec_formats(config: DecoderConfig, spec: StageSpec) -> ModelFormats:
    """The formats that a stage is told to use."""
    return model_formats(
        config,
        spec.layer_formats or spec.format,
        head=spec.head_format,
        kv=spec.kv_format,
        embedding_place=spec.embedding_place,
        outlier_threshold=spec.llm_int8_threshold,
        device=spec.device,
    )


def qkv_rows(config: DecoderConfig) -> Tensor | None:
    """The order in which BLOOM's rows [H, (q, k, v), D] are all q, all k, all v; None: they are."""
    if not config.fused_qkv_by_head:
        return None
    heads, size = config.num_heads, config.head_dim
    return torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).flatten()


def _sum_bytes(*parts: EmbeddingTable | Tensor | NormLayer | Linear | None) -> int:
    return sum(part.nbytes for part in parts if part is not None)


class ShardModel:
    """The layers of one stage, loaded; made by `load`."""

    def __init__(self, config: DecoderConfig, spec: StageSpec) -> None:
        self.config, self.spec = config, spec
        self.formats = spec_formats(config, spec)
        self.dtype = DTYPES[self.formats.activations]
        self._ops = block_ops(config, spec.device, self.dtype)
        self.layers: list[DecoderLayer] = []
        self._linears: dict[tuple[int | None, Role], Linear] = {}
        self._shared: dict[tuple[int, Role], int] = {}
        self.crossover_tokens: dict[str, int] = {}
        self._embedding: EmbeddingTable | None = None
        self._table_is_copy = False
        """The embedding is on the host, and could not stay in its file."""
        self._positions: Tensor | None = None
        self._embedding_norm: NormLayer | None = None
        self._project_in: Linear | None = None
        self._project_out: Linear | None = None
        self._final_norm: NormLayer | None = None
        self._head: Linear | None = None
        self._shared_head: Tensor | None = None
        self._cache: KVCache | None = None
        self._builder: BatchBuilder | None = None
        self._graphs: DecodeGraphs | None = None

    # -- loading -----------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        spec: StageSpec,
        *,
        progress: Progress | None = None,
    ) -> ShardModel:
        """Read and quantise this shard.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is not finite. Presence and
            shapes
                are checked before anything is read.
        """
        shard = cls(config, spec)
        shard._shared = shared_linears(checkpoint, config, shard.formats, spec)
        reader = ShardReader(checkpoint, config, spec, shard.formats, shard._shared, progress)
        with torch.inference_mode():
            if spec.is_first:
                reader.note("embedding")
                shard._load_embedding(reader)
            for i in range(spec.first_layer, spec.end_layer):
                reader.note(f"layer {i}")
                shard.layers.append(
                    DecoderLayer(
                        config, shard._read_layer(reader, i), i - spec.first_layer, shard._ops
                    )
                )
            if spec.is_last:
                reader.note("head")
                shard._load_head(reader)
            reader.note("measuring kernels", phase="calibrating")
            shard._set_crossovers()
        return shard

    def _linear(
        self,
        reader: ShardReader,
        role: Role,
        names: tuple[str, ...],
        *,
        layer: int | None = None,
        bias: bool = False,
        rows: Tensor | None = None,
    ) -> Linear:
        """One linear layer out of one or several stacked ones, in its format, or the one that an
        earlier layer has in the same place; `rows`: in what order its output features are
        wanted."""
        key = (layer, role)
        if layer is not None and (layer, role) in self._shared:
            self._linears[key] = self._linears[self._shared[layer, role], role]
        else:
            self._linears[key] = self._read_linear(reader, role, names, layer, bias, rows)
        return self._linears[key]

    def _read_linear(
        self,
        reader: ShardReader,
        role: Role,
        names: tuple[str, ...],
        layer: int | None,
        bias: bool,
        rows: Tensor | None,
    ) -> Linear:
        """The same, out of the checkpoint."""
        biases = reader.stack([f"{name}.bias" for name in names]) if bias else None
        if biases is not None and rows is not None:
            biases = biases[rows]
        scheme = self.formats.scheme(role, layer)
        try:
            is_held = self.formats.is_held(role, layer)
            weight = reader.weight(names, held=is_held)
            if rows is not None:
                weight = weight[rows] if isinstance(weight, Tensor) else weight.rows(rows)
            if isinstance(weight, StoredLinear):
                if is_held:
                    return hold_linear(
                        weight.weight,
                        biases,
                        scheme.format,
                        order=weight.order,
                        outlier_threshold=self.formats.outlier_threshold,
                        device=self.spec.device,
                    )
                weight = weight.dequantize()
            return quantize_linear(
                weight,
                biases,
                scheme.format,
                group_size=scheme.group_size,
                outlier_threshold=self.formats.outlier_threshold,
                device=self.spec.device,
            )
        except ValueError as error:
            raise CheckpointError(self.spec.model_path, names[0], str(error)) from error

    def _norm(self, reader: ShardReader, name: str) -> NormLayer:
        tensors = {
            full.rpartition(".")[2]: self._own(reader.read(full))
            for full, _ in self.config.norm_tensors(name)
        }
        return self._ops.norm(tensors.get("weight"), tensors.get("bias"))

    def _read_layer(self, reader: ShardReader, i: int) -> LayerWeights:
        config, n = self.config, self.config.names
        qkv_names = tuple(name.format(i=i) for name in n.qkv)
        mlp_names = tuple(name.format(i=i) for name in n.mlp_up)
        linear = partial(self._linear, reader, layer=i)
        return LayerWeights(
            attn_norm=self._norm(reader, n.attn_norm.format(i=i)),
            qkv=linear(Role.QKV, qkv_names, bias=config.qkv_bias, rows=qkv_rows(config)),
            attn_out=linear(Role.ATTN_OUT, (n.attn_out.format(i=i),), bias=config.attn_out_bias),
            mlp_norm=self._norm(reader, n.mlp_norm.format(i=i)),
            mlp_up=linear(Role.MLP_UP, mlp_names, bias=config.mlp_bias),
            mlp_down=linear(Role.MLP_DOWN, (n.mlp_down.format(i=i),), bias=config.mlp_bias),
        )

    def _load_embedding(self, reader: ShardReader) -> None:
        config, n = self.config, self.config.names
        self._embedding = self._table(reader, f"{n.embedding}.weight")
        if config.position is Position.LEARNED:
            self._positions = self._own(reader.read(f"{n.position}.weight"))
        if config.embedding_norm:
            self._embedding_norm = self._norm(reader, n.embedding_norm)
        if config.is_projected:
            self._project_in = self._linear(reader, Role.PROJECT_IN, (n.project_in,))

    def _table(self, reader: ShardReader, name: str) -> EmbeddingTable:
        tensor = reader.read(name)
        if not self.formats.embedding_on_host:
            tensor = self._own(tensor)
        elif not reader.stays_in_file(name):
            tensor, self._table_is_copy = self._own(tensor, "cpu"), True
        return EmbeddingTable(tensor, dtype=self.dtype, device=self.spec.device)

    def _own(self, tensor: Tensor, device: str | None = None) -> Tensor:
        """A copy in the activations' dtype, on the shard's device if no other is given."""
        device = self.spec.device if device is None else device
        return torch.empty(tensor.shape, dtype=self.dtype, device=device).copy_(tensor)

    def _load_head(self, reader: ShardReader) -> None:
        config, n = self.config, self.config.names
        if config.final_norm:
            self._final_norm = self._norm(reader, n.final_norm)
        if config.is_projected:
            self._project_out = self._linear(reader, Role.PROJECT_OUT, (n.project_out,))
        if self.spec.is_first and head_is_shared(config, self.formats):
            assert self._embedding is not None
            self._shared_head = self._embedding.table
        else:
            name = n.embedding if config.tied_head else n.head
            self._head = self._linear(reader, Role.HEAD, (name,))

    def _set_crossovers(self) -> None:
        """Measure each kind of linear layer once, on all of its kind in turn: the weights then come
        from memory, as they do in a step. Where the formats of a role differ, each is a kind."""
        kinds: dict[Role, dict[Format, list[Linear]]] = {}
        for (layer, role), linear in self._linears.items():
            is_measured = layer is not None or role is Role.HEAD
            if is_measured and linear.has_many_op and (layer, role) not in self._shared:
                kinds.setdefault(role, {}).setdefault(linear.format, []).append(linear)
        for role, formats in kinds.items():
            for fmt, alike in formats.items():
                kind = str(role) if len(formats) == 1 else f"{role}, {fmt}"
                self.crossover_tokens[kind] = measure_crossover(*alike)
                for linear in alike:
                    linear.crossover = self.crossover_tokens[kind]

    # -- memory ------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held; of those that layers share, once."""
        repeated = sum(self._linears[key].nbytes for key in self._shared)
        layers = sum(layer.weights.nbytes for layer in self.layers)
        return layers - repeated + self.embedding_bytes + self.head_bytes

    @property
    def embedding_bytes(self) -> int:
        """Of the weights, what only a first stage has."""
        table = None if self.formats.embedding_on_host else self._embedding
        return _sum_bytes(table, self._positions, self._embedding_norm, self._project_in)

    @property
    def head_bytes(self) -> int:
        """Of the weights, what only a last stage has; a shared head is the embedding's."""
        return _sum_bytes(self._project_out, self._final_norm, self._head)

    @property
    def host_bytes(self) -> int:
        """Of an embedding on the host that is not a view of its file."""
        return self._embedding.nbytes if self._embedding and self._table_is_copy else 0

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self._cache.nbytes if self._cache is not None else 0

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV cache; an earlier one is forgotten. On a GPU decodes are captured as graphs,
        too."""
        config = self.config
        self._cache = KVCache(
            num_layers=len(self.layers),
            num_blocks=num_blocks,
            block_size=self.spec.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            kv_format=self.formats.kv,
            device=self.spec.device,
        )
        self._builder = BatchBuilder(
            config,
            dtype=self.dtype,
            block_size=self.spec.block_size,
            num_blocks=num_blocks,
            device=self.spec.device,
        )
        if self.spec.device.startswith("cuda"):
            self._graphs = DecodeGraphs(
                self._run_layers,
                self._builder,
                hidden_size=config.hidden_size,
                dtype=self.dtype,
                max_position=config.max_position,
                max_tokens=self.spec.max_batch_tokens,
                device=self.spec.device,
            )
            with torch.inference_mode():
                self._graphs.capture()

    def clear_kv(self, layers: Sequence[int]) -> None:
        """Forget what some layers' caches hold."""
        assert self._cache is not None
        for layer in layers:
            self._cache.clear(layer)

    # -- computing ---------------------------------------------------------------------------

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """One layer of each combination of formats, as indices within the shard."""
        first = self.spec.first_layer
        kinds: dict[tuple[Format, ...], int] = {}
        for index in range(len(self.layers)):
            formats = tuple(self.formats.scheme(role, first + index).format for role in BLOCK_ROLES)
            kinds.setdefault(formats, index)
        return tuple(kinds.values())

    def forward(
        self, batch: MicroBatch, hidden: Tensor | None, *, only: Sequence[int] | None = None
    ) -> Tensor:
        """Run this shard's layers.

        Args:
            batch: T tokens.
            hidden: [T, hidden_size] from the stage before, overwritten; None on the first stage.
            only: run these layers, without a GPU's graphs; None: all.
        Returns:
            [T, hidden_size] after the last layer held, before any final norm.
        Raises:
            StageError: the KV cache is not allocated, or a block table is wrong.
        """
        if self._builder is None:
            raise StageError("the KV cache has not been allocated")
        numbers = self._builder.numbers(batch)
        if self._embedding is not None:
            x = self._embed(numbers[0], numbers[1])
        elif hidden is not None:
            x = hidden
        else:
            raise StageError("a stage that is not the first needs hidden states")
        if self._graphs is not None and only is None and self._graphs.takes(batch):
            return self._graphs(batch, x, numbers[1:])
        return self._run_layers(x, self._builder.build(batch, numbers), only)

    def _run_layers(
        self, x: Tensor, inputs: BatchInputs, only: Sequence[int] | None = None
    ) -> Tensor:
        assert self._cache is not None
        layers = self.layers if only is None else [self.layers[index] for index in only]
        for layer in layers:
            x = layer(x, inputs, self._cache)
        return x

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        assert self._embedding is not None
        x = self._embedding(token_ids)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None:
            x = x + self._positions.index_select(0, positions + self.config.position_offset)
        return self._embedding_norm(x) if self._embedding_norm is not None else x

    def logits(self, rows: Tensor) -> Tensor:
        """Final norm and LM head: [n, hidden_size] → [n, vocab_size] fp32. Last stage only."""
        if rows.shape[0] > MAX_LOGIT_ROWS:
            raise StageError(f"{rows.shape[0]} rows of logits at once; at most {MAX_LOGIT_ROWS}")
        x = self._final_norm(rows) if self._final_norm is not None else rows
        if self._project_out is not None:
            x = self._project_out(x)
        if self._shared_head is not None:
            return torch.nn.functional.linear(x, self._shared_head).float()
        if self._head is None:
            raise StageError("this stage does not hold the LM head")
        return self._head(x.contiguous()).float()
