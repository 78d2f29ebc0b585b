"""A shard: some consecutive layers, with the embedding or the head if it is at an end.

Loading reads this shard's tensors only, layer by layer, straight into their final format: one
layer at most is in memory at full precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from tightfit.kernels.dispatch import (
    DTYPES,
    Linear,
    hold_linear,
    measure_crossover,
    quantize_linear,
)
from tightfit.workers.api import LoadProgress, MicroBatch, StageSpec
from tightfit.workers.batch import BatchBuilder
from tightfit.workers.checkpoint import Checkpoint, find_prefix
from tightfit.workers.checkpoints.packed import StoredLinear, read_stored, stacked
from tightfit.workers.decoder import DecoderLayer, LayerWeights, NormLayer
from tightfit.workers.decoder_config import DecoderConfig, Position
from tightfit.workers.errors import CheckpointError, StageError
from tightfit.workers.kv_cache import KVCache
from tightfit.workers.model_formats import ModelFormats, Role, model_formats
from tightfit.workers.shard_bytes import MAX_LOGIT_ROWS, head_is_shared
from tightfit.workers.stored import StoredScheme

Progress = Callable[[LoadProgress], None]

DERIVED_TENSORS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".weight_shape",
    ".weight_format",
)
"""Ends of the names of tensors that say what the config says too."""


def spec_formats(config: DecoderConfig, spec: StageSpec) -> ModelFormats:
    """The formats that a stage is told to use."""
    return model_formats(config, spec.format, head=spec.head_format, kv=spec.kv_format)


def qkv_rows(config: DecoderConfig) -> Tensor | None:
    """The order in which BLOOM's rows [H, (q, k, v), D] are all q, all k, all v; None: they are."""
    if not config.fused_qkv_by_head:
        return None
    heads, size = config.num_heads, config.head_dim
    return torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).flatten()


class _Reader:
    """A checkpoint seen through a model's names: prefix found, reads counted."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        spec: StageSpec,
        formats: ModelFormats,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._config, self._spec = checkpoint, config, spec
        self._formats, self._report = formats, progress
        self._prefix = find_prefix(checkpoint, config, spec.model_path)
        self._shapes = {linear.name: (linear.n_out, linear.n_in) for linear in config.linears()}
        wanted = [(self._full(name), shape) for name, shape in self._wanted()]
        checkpoint.validate(wanted, {self._full(name) for name in config.integer_tensors()})
        self._refuse_unknown({name for name, _ in wanted})
        self._total = sum(checkpoint.nbytes(name) for name, _ in wanted)
        self._done = 0
        self._started = time.monotonic()

    def _full(self, name: str) -> str:
        return self._config.full_name(name, self._prefix)

    def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config, spec = self._config, self._spec
        if spec.is_first:
            yield from config.embedding_tensors()
        for i in range(spec.first_layer, spec.end_layer):
            yield from config.layer_tensors(i)
        if spec.is_last:
            shared = spec.is_first and head_is_shared(config, self._formats)
            embedding = f"{config.names.embedding}.weight"
            for name, shape in config.head_tensors():
                if not (shared and name == embedding):
                    yield name, shape

    def _refuse_unknown(self, wanted: set[str]) -> None:
        """Refuse a tensor of our layers that nothing would read: the model is not what its config
        says (a bias, a norm of Q and K), and would be computed wrongly without a word."""
        some = self._config.names.attn_norm.partition("{i}")[0]
        layers = range(self._spec.first_layer, self._spec.end_layer)
        ours = tuple(self._full(f"{some}{i}.") for i in layers)
        for name in sorted(self._checkpoint.names() - wanted):
            if name.startswith(ours) and not (
                name.endswith(DERIVED_TENSORS) or self._is_empty_bias(name)
            ):
                raise CheckpointError(
                    self._spec.model_path,
                    name,
                    f"a {self._config.family} layer with this config has no such tensor; the "
                    f"config does not belong to these weights, or the model is not supported",
                )

    def _is_empty_bias(self, name: str) -> bool:
        """As GPTQ's tools write for layers that have none."""
        if self._config.stored is None or not name.endswith(".bias"):
            return False
        return not bool(self._checkpoint.read(name).any())

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        full = self._full(name)
        tensor = self._checkpoint.read(full)
        self._done += self._checkpoint.nbytes(full)
        return tensor

    def stack(self, names: list[str]) -> Tensor:
        """Some tensors one below the other; of those that are copies, one at a time is held."""
        if len(names) == 1:
            return self.read(names[0])
        rows = [self._checkpoint.shape(self._full(name))[0] for name in names]
        stacked: Tensor | None = None
        for first, count, name in zip(accumulate([0, *rows]), rows, names, strict=False):
            part = self.read(name)
            if stacked is None:
                stacked = part.new_empty((sum(rows), *part.shape[1:]))
            stacked[first : first + count] = part
        assert stacked is not None
        return stacked

    def weight(self, names: tuple[str, ...], *, held: bool) -> Tensor | StoredLinear:
        """The weights of some linear layers, one below the other; quantised ones are widened if
        they are not all quantised in one way, or are not to be `held` and can be read widened."""
        schemes = [self._config.stored_scheme(name) for name in names]
        if not held:
            schemes = [None if some and some.is_read_widened else some for some in schemes]
        if not any(schemes):
            return self.stack([f"{name}.weight" for name in names])
        parts = [
            self.read(f"{name}.weight") if scheme is None else self._stored(name, scheme)
            for name, scheme in zip(names, schemes, strict=True)
        ]
        quantized = [part for part in parts if isinstance(part, StoredLinear)]
        whole = stacked(quantized) if len(quantized) == len(parts) else None
        if whole is not None:
            return whole
        return torch.cat(
            [part.dequantize() if isinstance(part, StoredLinear) else part for part in parts]
        )

    def _stored(self, name: str, scheme: StoredScheme) -> StoredLinear:
        n_out, n_in = self._shapes[name]
        if scheme.is_read_widened:
            blocks = {"weight_blocks": self.read(f"{name}.weight_blocks")}
            return read_stored(blocks, scheme, n_out, n_in)
        tensors = {
            full.rpartition(".")[2]: self.read(full)
            for full, _ in scheme.tensors(name, n_out, n_in)
        }
        return read_stored(tensors, scheme, n_out, n_in)

    def note(self, message: str, phase: str = "loading") -> None:
        """Report how far the load has come."""
        if self._report is not None:
            self._report(
                LoadProgress(
                    phase=phase,
                    bytes_done=min(self._done, self._total),
                    bytes_total=self._total,
                    elapsed_s=time.monotonic() - self._started,
                    message=message,
                )
            )


class ShardModel:
    """The layers of one stage, loaded; made by `load`."""

    def __init__(self, config: DecoderConfig, spec: StageSpec) -> None:
        self.config, self.spec = config, spec
        self.formats = spec_formats(config, spec)
        self.dtype = DTYPES[self.formats.activations]
        self.layers: list[DecoderLayer] = []
        self.crossover_tokens: dict[str, int] = {}
        self._embedding: Tensor | None = None
        self._positions: Tensor | None = None
        self._embedding_norm: NormLayer | None = None
        self._project_in: Linear | None = None
        self._project_out: Linear | None = None
        self._final_norm: NormLayer | None = None
        self._head: Linear | None = None
        self._shared_head: Tensor | None = None
        self._cache: KVCache | None = None
        self._builder: BatchBuilder | None = None

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
        reader = _Reader(checkpoint, config, spec, shard.formats, progress)
        with torch.inference_mode():
            if spec.is_first:
                reader.note("embedding")
                shard._load_embedding(reader)
            for i in range(spec.first_layer, spec.end_layer):
                reader.note(f"layer {i}")
                shard.layers.append(
                    DecoderLayer(config, shard._read_layer(reader, i), i - spec.first_layer)
                )
            if spec.is_last:
                reader.note("head")
                shard._load_head(reader)
            reader.note("measuring kernels", phase="calibrating")
            shard._set_crossovers()
        return shard

    def _linear(
        self,
        reader: _Reader,
        role: Role,
        names: tuple[str, ...],
        *,
        layer: int | None = None,
        bias: bool = False,
        rows: Tensor | None = None,
    ) -> Linear:
        """One linear layer out of one or several stacked ones, in its format; `rows`: in what order
        its output features are wanted."""
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
                        device=self.spec.device,
                    )
                weight = weight.dequantize()
            return quantize_linear(
                weight,
                biases,
                scheme.format,
                group_size=scheme.group_size,
                device=self.spec.device,
            )
        except ValueError as error:
            raise CheckpointError(self.spec.model_path, names[0], str(error)) from error

    def _norm(self, reader: _Reader, name: str) -> NormLayer:
        tensors = {
            full.rpartition(".")[2]: reader.read(full).to(self.dtype).clone()
            for full, _ in self.config.norm_tensors(name)
        }
        return NormLayer(self.config, tensors.get("weight"), tensors.get("bias"))

    def _read_layer(self, reader: _Reader, i: int) -> LayerWeights:
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

    def _load_embedding(self, reader: _Reader) -> None:
        config, n = self.config, self.config.names
        self._embedding = self._own(reader.read(f"{n.embedding}.weight"))
        if config.position is Position.LEARNED:
            self._positions = self._own(reader.read(f"{n.position}.weight"))
        if config.embedding_norm:
            self._embedding_norm = self._norm(reader, n.embedding_norm)
        if config.is_projected:
            self._project_in = self._linear(reader, Role.PROJECT_IN, (n.project_in,))

    def _own(self, tensor: Tensor) -> Tensor:
        own = torch.empty(tensor.shape, dtype=self.dtype)
        own.copy_(tensor)
        return own

    def _load_head(self, reader: _Reader) -> None:
        config, n = self.config, self.config.names
        if config.final_norm:
            self._final_norm = self._norm(reader, n.final_norm)
        if config.is_projected:
            self._project_out = self._linear(reader, Role.PROJECT_OUT, (n.project_out,))
        if self.spec.is_first and head_is_shared(config, self.formats):
            self._shared_head = self._embedding
        else:
            name = n.embedding if config.tied_head else n.head
            self._head = self._linear(reader, Role.HEAD, (name,))

    def _linears(self) -> Iterator[tuple[Role, Linear]]:
        for layer in self.layers:
            w = layer.weights
            yield from (
                (Role.QKV, w.qkv), (Role.ATTN_OUT, w.attn_out), (Role.MLP_UP, w.mlp_up),
                (Role.MLP_DOWN, w.mlp_down),
            )  # fmt: skip
        if self._head is not None:
            yield Role.HEAD, self._head

    def _set_crossovers(self) -> None:
        """Measure each kind of linear layer once, on all of its kind in turn: the weights then come
        from memory, as they do in a step."""
        kinds: dict[Role, list[Linear]] = {}
        for kind, linear in self._linears():
            if linear.has_many_op:
                kinds.setdefault(kind, []).append(linear)
        for kind, alike in kinds.items():
            self.crossover_tokens[str(kind)] = measure_crossover(*alike)
            for linear in alike:
                linear.crossover = self.crossover_tokens[str(kind)]

    # -- memory ------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        tensors = (self._embedding, self._positions)
        parts = (
            self._embedding_norm, self._project_in, self._project_out, self._final_norm, self._head,
        )  # fmt: skip
        return (
            sum(layer.weights.nbytes for layer in self.layers)
            + sum(t.nbytes for t in tensors if t is not None)
            + sum(p.nbytes for p in parts if p is not None)
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self._cache.nbytes if self._cache is not None else 0

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV cache; an earlier one is forgotten."""
        config = self.config
        self._cache = KVCache(
            num_layers=len(self.layers),
            num_blocks=num_blocks,
            block_size=self.spec.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            kv_format=self.formats.kv,
        )
        self._builder = BatchBuilder(
            config, dtype=self.dtype, block_size=self.spec.block_size, num_blocks=num_blocks
        )

    # -- computing ---------------------------------------------------------------------------

    def forward(self, batch: MicroBatch, hidden: Tensor | None) -> Tensor:
        """Run this shard's layers.

        Args:
            batch: T tokens.
            hidden: [T, hidden_size] from the stage before, overwritten; None on the first stage.
        Returns:
            [T, hidden_size] after the last layer held, before any final norm.
        Raises:
            StageError: the KV cache is not allocated, or a block table is wrong.
        """
        if self._cache is None or self._builder is None:
            raise StageError("the KV cache has not been allocated")
        inputs = self._builder.build(batch)
        if self._embedding is not None:
            x = self._embed(inputs.token_ids, inputs.positions)
        elif hidden is not None:
            x = hidden
        else:
            raise StageError("a stage that is not the first needs hidden states")
        for layer in self.layers:
            x = layer(x, inputs, self._cache)
        return x

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        assert self._embedding is not None
        x = self._embedding.index_select(0, token_ids)
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
