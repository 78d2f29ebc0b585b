"""Bytes of shards, from shapes alone. No torch: the planner and the stage share these formulas."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from tightfit.kernels.formats import (
    BYTES_PER_ELEMENT,
    Format,
    kv_vector_bytes,
    linear_bytes,
)
from tightfit.workers.decoder_config import DecoderConfig, Norm, Position
from tightfit.workers.model_formats import BLOCK_ROLES, ModelFormats, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """Weights of a whole model, by where they go."""

    embedding: int
    """Embedding, position table and their norm and projection: on the first stage."""
    layers: tuple[int, ...]
    """Each layer."""
    head: int
    """Final norm, projection and LM head: on the last stage, unless shared with the embedding."""
    head_shared: bool
    """A single stage holds embedding and head once, because they are the same tensor."""


def gpu_reserve_bytes(total_bytes: int) -> int:
    """What a stage leaves of a GPU with so much memory: 512 MiB and 2 %, for graphs, cuBLAS and the
    allocator's fragments."""
    return 512 * 2**20 + total_bytes // 50


def act_bytes(formats: ModelFormats) -> int:
    """Bytes of one element of hidden state, norm or embedding."""
    return BYTES_PER_ELEMENT[formats.activations]


def _norm_bytes(config: DecoderConfig, formats: ModelFormats) -> int:
    if not config.norm_affine:
        return 0
    vectors = 2 if config.norm is Norm.LAYER and config.norm_bias else 1
    return vectors * config.hidden_size * act_bytes(formats)


def _linear_bytes(
    formats: ModelFormats,
    role: Role,
    n_out: int,
    n_in: int,
    *,
    layer: int | None = None,
    bias: bool = False,
) -> int:
    scheme = formats.scheme(role, layer)
    return linear_bytes(
        scheme.format,
        n_out,
        n_in,
        group_size=scheme.group_size,
        bias=bias,
        is_tiled=formats.on_gpu,
    )


def layer_bytes(
    config: DecoderConfig,
    formats: ModelFormats,
    layer: int,
    shared: Container[tuple[int, Role]] = (),
) -> int:
    """Weights of one layer, but for those that are `shared`: an earlier layer holds them."""
    return 2 * _norm_bytes(config, formats) + sum(
        _linear_bytes(formats, role, n_out, n_in, layer=layer, bias=bias)
        for role, n_out, n_in, bias in linear_shapes(config)
        if (layer, role) not in shared
    )


def layer_format_bytes(
    config: DecoderConfig, formats: ModelFormats, layer: int
) -> dict[Format, int]:
    """The linear layers' part of `layer_bytes`, by format."""
    found: dict[Format, int] = {}
    for role, n_out, n_in, bias in linear_shapes(config):
        fmt = formats.scheme(role, layer).format
        size = _linear_bytes(formats, role, n_out, n_in, layer=layer, bias=bias)
        found[fmt] = found.get(fmt, 0) + size
    return found


def head_format_bytes(config: DecoderConfig, formats: ModelFormats) -> dict[Format, int]:
    """The linear layers' part of `head_bytes`, by format; shared or not, a step reads them."""
    shapes = [(Role.HEAD, config.vocab_size, config.embedding_size)]
    if config.is_projected:
        shapes.append((Role.PROJECT_OUT, config.embedding_size, config.hidden_size))
    found: dict[Format, int] = {}
    for role, n_out, n_in in shapes:
        fmt = formats.scheme(role).format
        found[fmt] = found.get(fmt, 0) + _linear_bytes(formats, role, n_out, n_in)
    return found


def linear_shapes(config: DecoderConfig) -> tuple[tuple[Role, int, int, bool], ...]:
    """(role, N, K, has a bias) of a block's linear layers."""
    attn, hidden, mlp = config.num_heads * config.head_dim, config.hidden_size, config.mlp_bias
    return (
        (Role.QKV, config.qkv_out, hidden, config.qkv_bias),
        (Role.ATTN_OUT, hidden, attn, config.attn_out_bias),
        (Role.MLP_UP, config.mlp_up_out, hidden, mlp),
        (Role.MLP_DOWN, hidden, config.intermediate_size, mlp),
    )


def format_label(
    config: DecoderConfig, formats: ModelFormats, first_layer: int = 0, end_layer: int | None = None
) -> str:
    """How the linear layers of some blocks are held: "int4", or where formats differ
    "int3/int4 mixed, 3.60 bits", of each weight, scales and zero points included."""
    layers = range(first_layer, config.num_layers if end_layer is None else end_layer)
    held = {formats.scheme(role, i).format for i in layers for role in BLOCK_ROLES}
    if len(held) == 1:
        return held.pop()
    names = "/".join(fmt for fmt in reversed(Format) if fmt in held)
    return f"{names} mixed, {bits_per_weight(config, formats, layers):.2f} bits"


def bits_per_weight(config: DecoderConfig, formats: ModelFormats, layers: Iterable[int]) -> float:
    """Mean of the linear layers of some blocks: scales and zero points counted, biases and a GPU's
    padding not."""
    num_bytes = num_weights = 0
    for layer in layers:
        for role, n_out, n_in, _ in linear_shapes(config):
            scheme = formats.scheme(role, layer)
            num_bytes += linear_bytes(scheme.format, n_out, n_in, group_size=scheme.group_size)
            num_weights += n_out * n_in
    return 8 * num_bytes / num_weights


def table_bytes(config: DecoderConfig, formats: ModelFormats) -> int:
    """The embedding's table, in the dtype of the activations."""
    return config.vocab_size * config.embedding_size * act_bytes(formats)


def embedding_bytes(config: DecoderConfig, formats: ModelFormats) -> int:
    """What the first stage holds besides its layers."""
    total = 0 if formats.embedding_on_host else table_bytes(config, formats)
    if config.position is Position.LEARNED:
        total += config.learned_positions * config.hidden_size * act_bytes(formats)
    if config.embedding_norm:
        total += _norm_bytes(config, formats)
    if config.is_projected:
        total += _linear_bytes(formats, Role.PROJECT_IN, config.hidden_size, config.embedding_size)
    return total


def head_is_shared(config: DecoderConfig, formats: ModelFormats) -> bool:
    """A stage that holds both ends keeps the tied tensor once: when both want it in the same
    format, and in the stage's memory."""
    return config.tied_head and formats.has_dense_head and not formats.embedding_on_host


def head_bytes(config: DecoderConfig, formats: ModelFormats, *, shared: bool = False) -> int:
    """What the last stage holds besides its layers."""
    total = _norm_bytes(config, formats) if config.final_norm else 0
    if config.is_projected:
        total += _linear_bytes(formats, Role.PROJECT_OUT, config.embedding_size, config.hidden_size)
    if shared:
        return total
    return total + _linear_bytes(formats, Role.HEAD, config.vocab_size, config.embedding_size)


def model_bytes(config: DecoderConfig, formats: ModelFormats) -> ModelBytes:
    """Weights of the whole model."""
    return ModelBytes(
        embedding=embedding_bytes(config, formats),
        layers=tuple(layer_bytes(config, formats, i) for i in range(config.num_layers)),
        head=head_bytes(config, formats),
        head_shared=head_is_shared(config, formats),
    )


def shard_bytes(
    config: DecoderConfig,
    formats: ModelFormats,
    first_layer: int,
    end_layer: int,
    *,
    has_embedding: bool,
    has_head: bool,
    shared: Container[tuple[int, Role]] = (),
) -> int:
    """Weights of one shard; equals what a loaded shard's tensors occupy.

    `shared`: linear layers that an earlier layer of the shard holds (`shared_weights.py`).
    """
    layers = range(first_layer, end_layer)
    total = sum(layer_bytes(config, formats, i, shared) for i in layers)
    if has_embedding:
        total += embedding_bytes(config, formats)
    if has_head:
        is_tied = has_embedding and head_is_shared(config, formats)
        total += head_bytes(config, formats, shared=is_tied)
    return total


def kv_block_bytes(
    config: DecoderConfig, formats: ModelFormats, num_layers: int, block_size: int
) -> int:
    """One KV block on a shard of `num_layers` layers: keys and values of `block_size` tokens, with
    their scales."""
    per_token = 2 * config.num_kv_heads * kv_vector_bytes(formats.kv, config.head_dim)
    return num_layers * block_size * per_token
