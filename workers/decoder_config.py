"""The one decoder's configuration. No torch here: the planner reads it too.

Roles name the tensors of a checkpoint independently of its family; a family file maps them to the
checkpoint's names. L layers, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

from tightfit.workers.errors import UnsupportedModelError
from tightfit.workers.stored import StoredQuantization, StoredScheme, stored_quantization

HFConfig = Mapping[str, Any]


class Position(Enum):
    """How positions enter."""

    ALIBI = "alibi"
    LEARNED = "learned"
    ROTARY = "rotary"


class Norm(Enum):
    """Kind of normalisation."""

    LAYER = "layer"
    RMS = "rms"


class Activation(Enum):
    """Nonlinearity of the MLP."""

    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"


MAX_INTEGER: Final = 2**31 - 1
MAX_LAYERS: Final = 10_000
"""More is a config that is damaged or means harm: plans and stages go through all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding and its scaling (names as in Hugging Face's rope_parameters)."""

    theta: float
    kind: str = "default"
    """"default", "linear", "dynamic", "llama3" or "yarn"."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Role → name in the checkpoint, without ".weight"/".bias"; "{i}" is the layer's number."""

    prefixes: tuple[str, ...]
    """What may stand before every name but `head`; the first that the checkpoint has is used."""
    embedding: str
    position: str = ""
    embedding_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    final_norm: str = ""
    head: str = "lm_head"
    attn_norm: str
    qkv: tuple[str, ...]
    """One fused name, or q, k, v."""
    attn_out: str
    mlp_norm: str
    mlp_up: tuple[str, ...]
    """One name, or gate, up."""
    mlp_down: str


class LinearShape(NamedTuple):
    """One linear layer of a checkpoint."""

    name: str
    """Without prefix."""
    n_out: int
    n_in: int
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Everything that the decoder does differently from model to model."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    """Longest context, prompt and output together, in tokens."""
    position: Position
    norm: Norm
    norm_eps: float
    norm_bias: bool = True
    """LayerNorm has weight and bias (RMSNorm never has a bias)."""
    norm_affine: bool = True
    """The norms have weights at all."""
    pre_norm: bool = True
    """Norm before attention and MLP; else after the residual sum (OPT-350m)."""
    final_norm: bool = True
    embedding_norm: bool = False
    residual_from_norm: bool = False
    """The residual is taken after the norm (BLOOM's apply_residual_connection_post_layernorm)."""
    activation: Activation
    gated_mlp: bool = False
    qkv_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    fused_qkv_by_head: bool = False
    """The fused weight's rows are ordered [H, (q, k, v), D] (BLOOM)."""
    embedding_size: int
    """Width of the embedding; projected to hidden_size when it differs (OPT-350m)."""
    learned_positions: int = 0
    """Rows of the learned position table."""
    position_offset: int = 0
    """Added to a position before the table is read (OPT: 2)."""
    rope: Rope | None = None
    tied_head: bool
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    names: TensorNames
    stored: StoredQuantization | None = None
    """How the checkpoint's linear layers are quantised already, if they are."""
    notes: tuple[str, ...] = ()
    """What the operator should know, such as a context cut to the sliding window."""

    @property
    def qkv_out(self) -> int:
        """Output features of the merged Q, K and V."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def mlp_up_out(self) -> int:
        """Output features of the merged gate and up."""
        return self.intermediate_size * (2 if self.gated_mlp else 1)

    @property
    def is_projected(self) -> bool:
        """The embedding is narrower than the hidden states."""
        return self.embedding_size != self.hidden_size

    @property
    def largest_layer_elements(self) -> int:
        """Parameters of the linear layers of one block."""
        attention = self.hidden_size * (self.qkv_out + self.num_heads * self.head_dim)
        return attention + self.hidden_size * (self.mlp_up_out + self.intermediate_size)

    # -- what a checkpoint must hold ---------------------------------------------------------

    def full_name(self, name: str, prefix: str) -> str:
        """A tensor's or layer's name with the prefix, which an untied head never has."""
        is_head = name == self.names.head or name.startswith(f"{self.names.head}.")
        return name if is_head else prefix + name

    def stored_scheme(self, name: str) -> StoredScheme | None:
        """How the linear layer of this name, without prefix, is quantised in the checkpoint."""
        if self.stored is None or name == self.names.embedding:  # of a tied head
            return None
        return self.stored.scheme(self.full_name(name, self.names.prefixes[0]))

    def linears(self) -> Iterator[LinearShape]:
        """Every linear layer of the model that can be quantised."""
        yield from self.outer_linears()
        for i in range(self.num_layers):
            yield from self.layer_linears(i)

    def outer_linears(self) -> Iterator[LinearShape]:
        """Those outside the blocks."""
        n = self.names
        if self.is_projected:
            yield LinearShape(n.project_in, self.hidden_size, self.embedding_size, False)
            yield LinearShape(n.project_out, self.embedding_size, self.hidden_size, False)
        if not self.tied_head:
            yield LinearShape(n.head, self.vocab_size, self.embedding_size, False)

    def layer_linears(self, i: int) -> Iterator[LinearShape]:
        """Those of layer `i`."""
        n, hidden, attn = self.names, self.hidden_size, self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        widths = (self.qkv_out,) if len(n.qkv) == 1 else (attn, kv, kv)
        for name, width in zip(n.qkv, widths, strict=True):
            yield LinearShape(name.format(i=i), width, hidden, self.qkv_bias)
        yield LinearShape(n.attn_out.format(i=i), hidden, attn, self.attn_out_bias)
        for name in n.mlp_up:
            yield LinearShape(name.format(i=i), self.intermediate_size, hidden, self.mlp_bias)
        yield LinearShape(n.mlp_down.format(i=i), hidden, self.intermediate_size, self.mlp_bias)

    def integer_tensors(self) -> Iterator[str]:
        """Names, without prefix, of all tensors that hold quantised whole numbers."""
        for linear in self.linears():
            scheme = self.stored_scheme(linear.name)
            if scheme is not None:
                yield from (f"{linear.name}.{suffix}" for suffix in scheme.integer_suffixes)

    def linear_tensors(self, linear: LinearShape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of one linear layer, without prefix."""
        scheme = self.stored_scheme(linear.name)
        if scheme is None:
            yield f"{linear.name}.weight", (linear.n_out, linear.n_in)
        else:
            yield from scheme.tensors(linear.name, linear.n_out, linear.n_in)
        if linear.has_bias:
            yield f"{linear.name}.bias", (linear.n_out,)

    def layer_tensors(self, i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of layer `i`, without prefix."""
        n = self.names
        yield from self.norm_tensors(n.attn_norm.format(i=i))
        yield from self.norm_tensors(n.mlp_norm.format(i=i))
        for linear in self.layer_linears(i):
            yield from self.linear_tensors(linear)

    def embedding_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of what the first stage holds besides layers, without prefix."""
        n = self.names
        yield f"{n.embedding}.weight", (self.vocab_size, self.embedding_size)
        if self.position is Position.LEARNED:
            yield f"{n.position}.weight", (self.learned_positions, self.hidden_size)
        if self.embedding_norm:
            yield from self.norm_tensors(n.embedding_norm)
        yield from self._outer_tensors(n.project_in)

    def head_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of what the last stage holds besides layers, without prefix.

        An untied head's own name (`names.head`) never has a prefix.
        """
        n = self.names
        if self.final_norm:
            yield from self.norm_tensors(n.final_norm)
        yield from self._outer_tensors(n.project_out)
        if self.tied_head:
            yield f"{n.embedding}.weight", (self.vocab_size, self.embedding_size)
        yield from self._outer_tensors(n.head)

    def _outer_tensors(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of the linear layer outside the blocks that has this name, if there is one."""
        for linear in self.outer_linears():
            if linear.name == name:
                yield from self.linear_tensors(linear)

    def norm_tensors(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of one norm's tensors."""
        if self.norm_affine:
            yield f"{name}.weight", (self.hidden_size,)
            if self.norm is Norm.LAYER and self.norm_bias:
                yield f"{name}.bias", (self.hidden_size,)


class ConfigReader:
    """Typed look-ups in a config.json, with errors that name the key."""

    def __init__(self, config: HFConfig) -> None:
        self._config = config

    def integer(self, *keys: str, default: int | None = None, at_most: int = MAX_INTEGER) -> int:
        """The first key that is there, a positive integer."""
        for key in keys:
            value = self._config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise UnsupportedModelError(
                    f"config.json: {key} is {value!r}, not a positive integer"
                )
            if value > at_most:
                raise UnsupportedModelError(
                    f"config.json: {key} is over {at_most:,}, which no model has"
                )
            return value
        if default is None:
            raise UnsupportedModelError(f"config.json has no {' or '.join(keys)}")
        return default

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._config.get(key)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, not a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, not true or false")
        return value

    def activation(self, key: str, default: str) -> Activation:
        """A supported nonlinearity by Hugging Face's name."""
        name = self._config.get(key) or default
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: {key} is {name!r}; supported are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def only(self, key: str, *allowed: object) -> None:
        """Refuse any other value than these, or absence."""
        value = self._config.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModelError(
                f"config.json: {key} is {value!r}, which is not supported "
                f"(supported: {', '.join(map(repr, allowed)) or 'absent'})"
            )

    def eos_token_ids(self) -> frozenset[int]:
        """One id or a list of them."""
        value = self._config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return frozenset(self._token_id("eos_token_id", i) for i in ids)

    def bos_token_id(self) -> int | None:
        """The token that starts a text, if there is one."""
        value = self._config.get("bos_token_id")
        return None if value is None else self._token_id("bos_token_id", value)

    def _token_id(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UnsupportedModelError(f"config.json: {key} has {value!r}, which is no token id")
        return value


ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


NOT_DONE = (
    "attn_logit_softcapping", "final_logit_softcapping", "num_local_experts", "num_experts",
    "n_routed_experts", "use_qk_norm", "qk_layernorm", "logit_scale", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "no_rope_layers", "attention_chunk_size",
    "clip_qkv", "parallel_attn",
)  # fmt: skip
"""Settings of relatives of the supported families, which change what is computed: any value but
null or false is refused."""


def families() -> dict[str, Callable[[HFConfig], DecoderConfig]]:
    """model_type → its family's mapping. A new family is one file and one line here."""
    from tightfit.workers.families import bloom, llama, opt

    return {
        "bloom": bloom.from_config,
        "opt": opt.from_config,
        "llama": llama.from_config,
        "mistral": llama.from_mistral_config,
        "qwen2": llama.from_qwen2_config,
    }


def decoder_config(config: HFConfig) -> DecoderConfig:
    """The decoder's configuration out of a checkpoint's config.json.

    Raises:
        UnsupportedModelError: an unknown family or setting, by its name, with what is supported.
    """
    known = families()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise UnsupportedModelError(
            f"config.json: model_type is {model_type!r}; supported are {', '.join(sorted(known))}"
        )
    _check_architecture(model_type, config.get("architectures"))
    read = ConfigReader(config)
    for key in NOT_DONE:
        read.only(key, False)
    decoder = known[model_type](config)
    if decoder.num_heads % decoder.num_kv_heads:
        raise UnsupportedModelError(
            f"config.json: {decoder.num_heads} heads do not divide into "
            f"{decoder.num_kv_heads} KV heads"
        )
    return replace(decoder, stored=stored_quantization(config))


def _check_architecture(model_type: str, architectures: object) -> None:
    """Refuse classifiers, embedders and relatives that share the family's model_type."""
    if not architectures:
        return
    names = architectures if isinstance(architectures, list) else [architectures]
    supported = {f"{model_type}{head}" for head in ("forcausallm", "model")}
    if not any(str(name).lower() in supported for name in names):
        raise UnsupportedModelError(
            f"config.json: architectures is {architectures!r}; of model_type {model_type!r} the "
            f"causal language model (…ForCausalLM) is supported"
        )
