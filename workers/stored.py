"""How a checkpoint that is already quantised stores its linear layers. No torch: planning reads it.

N output features, K input features, G groups. What `config.json` says under `quantization_config`
becomes one `StoredScheme` for each linear layer; the tensors themselves are read by
`checkpoints/packed.py`. A GGUF file's config is ours, with the types of its tensors.

Sources: compressed-tensors 0.20 (`pack-quantized`, `int-quantized`), AutoGPTQ and GPTQModel
(`qweight`, `qzeros`, `scales`, `g_idx`), AutoAWQ (`gemm`), bitsandbytes (`SCB`), llama.cpp
(`ggml-common.h`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tightfit.kernels.formats import Format
from tightfit.workers.errors import UnsupportedModelError

WORD_BITS = 32
DENSE_3_WORDS = 3
REAL_ZERO_DTYPE = "torch.bfloat16"
"""What `zp_dtype` says, in the words of compressed-tensors, where zero points are real."""


class Packing(Enum):
    """Where the integers lie."""

    WORDS = "pack-quantized"
    """compressed-tensors: int32 words along K, lowest bits first, offset to be unsigned."""
    BYTES = "int-quantized"
    """compressed-tensors: int8 values [N, K]."""
    DENSE_3 = "tightfit-dense-3bit"
    """Ours: 32 values of 3 bits in 3 words, as `kernels.groups` has them; zero points not packed:
    whole ones as bytes, real ones in bf16."""
    DENSE_4 = "tightfit-dense-4bit"
    """Ours: WORDS of 4 bits, with zero points as DENSE_3 has them."""
    GPTQ = "gptq"
    """int32 words along K, transposed: [K, N]."""
    AWQ = "awq"
    """int32 words along N, transposed, the eight of a word in the order 0 2 4 6 1 3 5 7."""
    BITSANDBYTES = "bitsandbytes"
    """int8 values [N, K] with the largest magnitude of each row."""
    GGUF = "gguf"
    """llama.cpp's blocks of 32 values along K: a scale in fp16, without `is_symmetric` the value of
    0 in fp16, then 16 bytes: byte j has value j in its low half and value 16 + j in its high one.
    The checkpoint has them twice: `weight`, widened, and `weight_blocks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScheme:
    """How one linear layer is stored."""

    packing: Packing
    bits: int
    group_size: int | None
    """Input features that share a scale; None: one scale per output channel."""
    is_symmetric: bool = False
    """There are no zero points: they are the middle integer."""
    has_order: bool = False
    """Each feature's group is stored (GPTQ's `g_idx`), because groups are not runs of features."""
    has_real_zero: bool = False
    """Zero points are no whole numbers."""
    zero_offset: int = 0
    """Added to the stored zero points (1 in GPTQ's first format)."""

    @property
    def format(self) -> Format | None:
        """The format that holds the same numbers; None: they have to be widened first."""
        if self.bits == 8 and self.is_symmetric and self.group_size is None:
            return Format.INT8
        return {4: Format.INT4, 3: Format.INT3}.get(self.bits)

    @property
    def integer_suffixes(self) -> tuple[str, ...]:
        """Last parts of the names of tensors that hold whole numbers."""
        names = ["weight_packed", "qweight", "qzeros", "g_idx", "weight_g_idx"]
        if not self.has_real_zero:
            names.append("weight_zero_point")
        is_bytes = self.packing in (Packing.BYTES, Packing.BITSANDBYTES)
        return (*names, "weight") if is_bytes else tuple(names)

    @property
    def is_read_widened(self) -> bool:
        """The checkpoint gives the layer's weight in full precision, too."""
        return self.packing is Packing.GGUF

    @property
    def is_dense(self) -> bool:
        """It is one of our own layouts, whose zero points are not packed."""
        return self.packing in (Packing.DENSE_3, Packing.DENSE_4)

    def num_groups(self, n_in: int) -> int:
        """G.

        Raises:
            UnsupportedModelError: the groups do not divide K.
        """
        size = self.group_size or n_in
        if n_in % size:
            raise UnsupportedModelError(
                f"config.json: quantization_config: groups of {size} do not divide a layer's "
                f"{n_in} input features"
            )
        return n_in // size

    def tensors(self, name: str, n_out: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of what the checkpoint has for one layer, its bias aside."""
        for suffix, shape in self._tensors(n_out, n_in):
            yield f"{name}.{suffix}", shape

    def _tensors(self, n_out: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        groups, per_word = self.num_groups(n_in), WORD_BITS // self.bits
        match self.packing:
            case Packing.GGUF:
                yield "weight", (n_out, n_in)
            case Packing.BITSANDBYTES:
                yield from (("weight", (n_out, n_in)), ("SCB", (n_out,)))
            case Packing.GPTQ:
                yield "qweight", (n_in // per_word, n_out)
                yield "qzeros", (groups, n_out // per_word)
                yield "scales", (groups, n_out)
                if self.has_order:
                    yield "g_idx", (n_in,)
            case Packing.AWQ:
                yield "qweight", (n_in, n_out // per_word)
                yield "qzeros", (groups, n_out // per_word)
                yield "scales", (groups, n_out)
            case _:
                yield from self._compressed_tensors(n_out, n_in, groups)

    def _compressed_tensors(
        self, n_out: int, n_in: int, groups: int
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        per_word = WORD_BITS // self.bits
        yield "weight_scale", (n_out, groups)
        if self.packing is Packing.BYTES:
            yield "weight", (n_out, n_in)
            if not self.is_symmetric:
                yield "weight_zero_point", (n_out, groups)
            return
        if self.packing is Packing.DENSE_3:
            yield "weight_packed", (n_out, -(-n_in // WORD_BITS) * DENSE_3_WORDS)
        else:
            yield "weight_packed", (n_out, -(-n_in // per_word))
        if not self.is_symmetric:
            rows = n_out if self.is_dense else -(-n_out // per_word)
            yield "weight_zero_point", (rows, groups)
        if self.has_order:
            yield "weight_g_idx", (n_in,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which layers have a scheme."""

    targets: tuple[str, ...]
    """Names, "re:…" patterns of names, or "Linear" for all."""
    scheme: StoredScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantization:
    """A whole checkpoint's `quantization_config`."""

    method: str
    """As config.json names it."""
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    """As targets; these are stored as they were."""
    ignores_parts: bool = False
    """`ignored` are parts of names, not whole ones (GPTQ, AWQ, bitsandbytes)."""

    @property
    def is_read_widened(self) -> bool:
        """The checkpoint gives all weights in full precision, too."""
        return all(rule.scheme.is_read_widened for rule in self.rules)

    def scheme(self, name: str) -> StoredScheme | None:
        """Of the linear layer of this name in the checkpoint; None: it is not quantised."""
        if self.ignores_parts:
            if any(part in name for part in self.ignored):
                return None
        elif _matches(name, self.ignored):
            return None
        by_name = (rule for rule in self.rules if _matches(name, rule.targets))
        everything = (rule for rule in self.rules if "Linear" in rule.targets)
        rule = next(by_name, None) or next(everything, None)
        return rule.scheme if rule is not None else None


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else name == target
        for target in targets
    )


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """What config.json says of how its weights are quantised; None: they are not.

    Raises:
        UnsupportedModelError: a method or a setting that is not supported, by its name.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise _unsupported(f"is {section!r}, not an object")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "gguf": _gguf,
    }
    method = section.get("quant_method")
    if method not in readers:
        raise _unsupported(f"quant_method is {method!r}; supported are {', '.join(readers)}")
    return readers[method](section)


def _unsupported(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: quantization_config: {problem}. The model's 16-bit checkpoint can be served "
        "instead, with a --format"
    )


def _whole(section: Mapping[str, Any], key: str, *allowed: int) -> int:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or (allowed and value not in allowed):
        choices = f"; supported are {', '.join(map(str, allowed))}" if allowed else ""
        raise _unsupported(f"{key} is {value!r}{choices}")
    return value


def _group_size(section: Mapping[str, Any]) -> int | None:
    size = _whole(section, "group_size")
    if size == -1:
        return None
    if size <= 0:
        raise _unsupported(f"group_size is {size}, neither positive nor -1 for one per channel")
    return size


def _names(section: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = section.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _unsupported(f"{key} is {names!r}, not a list of names")
    return tuple(names)


def _compressed_tensors(section: Mapping[str, Any]) -> StoredQuantization:
    if section.get("quantization_status") not in (None, "compressed"):
        raise _unsupported(f"quantization_status is {section['quantization_status']!r}")
    for key in ("sparsity_config", "transform_config"):
        if section.get(key):
            raise _unsupported(f"{key} is not supported")
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unsupported(f"config_groups is {groups!r}")
    rules = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise _unsupported(f"config_groups: {name} says nothing of weights")
        packing = group.get("format") or section.get("format")
        scheme = _compressed_scheme(group["weights"], packing, name)
        rules.append(Rule(targets=_names(group, "targets"), scheme=scheme))
    return StoredQuantization(
        method="compressed-tensors", rules=tuple(rules), ignored=_names(section, "ignore")
    )


CT_BITS = {
    Packing.WORDS: (4, 8), Packing.BYTES: (8,), Packing.DENSE_3: (3,), Packing.DENSE_4: (4,),
}  # fmt: skip
"""Supported bits of the layouts of compressed-tensors and of ours, which its configs describe."""


def _compressed_scheme(weights: Mapping[str, Any], packing: object, name: str) -> StoredScheme:
    known = (Packing.WORDS, Packing.BYTES, Packing.DENSE_3, Packing.DENSE_4)
    kinds = {str(kind.value): kind for kind in known}
    if packing not in kinds:
        raise _unsupported(f"config_groups: {name}: format is {packing!r}; supported are "
                           f"{', '.join(kinds)}")  # fmt: skip
    if weights.get("type") != "int" or weights.get("dynamic"):
        raise _unsupported(f"config_groups: {name}: weights are not static whole numbers")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise _unsupported(f"config_groups: {name}: strategy is {strategy!r}; supported are group "
                           "and channel")  # fmt: skip
    kind = kinds[packing]
    bits = _whole(weights, "num_bits", *CT_BITS[kind])
    return StoredScheme(
        packing=kind,
        bits=bits,
        group_size=_group_size(weights) if strategy == "group" else None,
        is_symmetric=bool(weights.get("symmetric", True)),
        has_order=weights.get("actorder") == "group",
        has_real_zero=kind in (Packing.DENSE_3, Packing.DENSE_4)
        and weights.get("zp_dtype") == REAL_ZERO_DTYPE,
    )


def _gptq(section: Mapping[str, Any]) -> StoredQuantization:
    kind = section.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise _unsupported(f"checkpoint_format is {kind!r}; supported are gptq and gptq_v2")
    scheme = StoredScheme(
        packing=Packing.GPTQ,
        bits=_whole(section, "bits", 4, 8),
        group_size=_group_size(section),
        has_order=True,
        zero_offset=1 if kind == "gptq" else 0,
    )
    ignored = () if section.get("lm_head") else ("lm_head",)
    return StoredQuantization(
        method="gptq",
        rules=(Rule(targets=("Linear",), scheme=scheme),),
        ignored=ignored,
        ignores_parts=True,
    )


def _awq(section: Mapping[str, Any]) -> StoredQuantization:
    version = str(section.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported(f"version is {version!r}; supported is gemm")
    key = "bits" if "bits" in section else "w_bit"
    size = section.get("group_size", section.get("q_group_size"))
    scheme = StoredScheme(
        packing=Packing.AWQ,
        bits=_whole(section, key, 4),
        group_size=_group_size({"group_size": size}),
    )
    return StoredQuantization(
        method="awq",
        rules=(Rule(targets=("Linear",), scheme=scheme),),
        ignored=(*_names(section, "modules_to_not_convert"), "lm_head"),
        ignores_parts=True,
    )


def _bitsandbytes(section: Mapping[str, Any]) -> StoredQuantization:
    if not section.get("load_in_8bit"):
        raise _unsupported("load_in_4bit is not supported, load_in_8bit is")
    scheme = StoredScheme(packing=Packing.BITSANDBYTES, bits=8, group_size=None, is_symmetric=True)
    return StoredQuantization(
        method="bitsandbytes",
        rules=(Rule(targets=("Linear",), scheme=scheme),),
        ignored=_names(section, "llm_int8_skip_modules") or ("lm_head",),
        ignores_parts=True,
    )


GGUF_GROUP_SIZE = 32
GGUF_SYMMETRIC = {"Q4_0": True, "Q4_1": False}
"""The types whose numbers a format of ours holds, and whether they have no zero points."""


def gguf_section(types: Mapping[str, str]) -> dict[str, Any]:
    """What the config of a GGUF file says under `quantization_config`.

    Args:
        types: llama.cpp's name of the type, by the linear layer's name.
    """
    return {"quant_method": "gguf", "types": dict(types)}


def _gguf(section: Mapping[str, Any]) -> StoredQuantization:
    types = section.get("types")
    if not isinstance(types, Mapping):
        raise _unsupported("quant_method is 'gguf', but this is no GGUF file")
    rules = []
    for kind, is_symmetric in GGUF_SYMMETRIC.items():
        scheme = StoredScheme(
            packing=Packing.GGUF,
            bits=4,
            group_size=GGUF_GROUP_SIZE,
            is_symmetric=is_symmetric,
            has_real_zero=not is_symmetric,
        )
        targets = tuple(name for name, found in types.items() if found == kind)
        rules.append(Rule(targets=targets, scheme=scheme))
    return StoredQuantization(method="gguf", rules=tuple(rules))
