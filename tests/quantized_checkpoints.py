"""Checkpoints quantised as other projects write them, value by value, and what they mean.

Each writer follows the project's description of its layout with plain loops; it shares no code
with what reads it. The transformers model gets the weights that the numbers stand for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import save_file

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(values: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> Any:
    """Rows of small whole numbers to rows of int32 words, the first value lowest."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    rows = []
    for row in values:
        row = row + [0] * (-len(row) % per_word)
        words = []
        for start in range(0, len(row), per_word):
            word = sum(row[start + source] << bits * place for place, source in enumerate(order))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def _grid(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, groups_of: Any) -> Any:
    """(q, scale [N, G], zero point [N, G], meant weight); feature k is in group groups_of[k]."""
    num_groups, top = weight.shape[1] // group, 2**bits - 1
    scale = torch.empty(weight.shape[0], num_groups)
    zero = torch.empty(weight.shape[0], num_groups)
    for g in range(num_groups):
        part = weight[:, groups_of == g]
        if symmetric:
            scale[:, g] = part.abs().amax(1) / (top // 2)
            zero[:, g] = top // 2 + 1
        else:
            least, greatest = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scale[:, g] = (greatest - least) / top
            zero[:, g] = (-least / scale[:, g]).round().clamp(1, top)
    scale = scale.bfloat16().float()  # so that float16 and bfloat16 hold it
    q = (weight / scale[:, groups_of] + zero[:, groups_of]).round().clamp(0, top)
    return q.int(), scale, zero.int(), (q - zero[:, groups_of]) * scale[:, groups_of]


def _gptq(q: Any, scale: Any, zero: Any, bits: int, offset: int, groups_of: Any) -> dict[str, Any]:
    return {
        "qweight": _words(q.tolist(), bits).t().contiguous(),
        "qzeros": _words((zero.t() - int(offset)).tolist(), bits),
        "scales": scale.t().half().contiguous(),
        "g_idx": groups_of.int(),
    }


def _awq(q: Any, scale: Any, zero: Any) -> dict[str, Any]:
    return {
        "qweight": _words(q.t().tolist(), 4, AWQ_ORDER),
        "qzeros": _words(zero.t().tolist(), 4, AWQ_ORDER),
        "scales": scale.t().half().contiguous(),
    }


def _compressed(q: Any, scale: Any, zero: Any, bits: int, symmetric: bool) -> dict[str, Any]:
    tensors = {
        "weight_packed": _words(q.tolist(), bits),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _words(zero.t().tolist(), bits).t().contiguous()
    return tensors


def _dense3(q: Any, scale: Any, zero: Any) -> dict[str, Any]:
    rows = []
    for row in q.tolist():
        row = row + [0] * (-len(row) % 32)
        words = []
        for start in range(0, len(row), 32):
            values = row[start : start + 32]
            low = sum((v & 3) << 2 * i for i, v in enumerate(values[:16]))
            high = sum((v & 3) << 2 * i for i, v in enumerate(values[16:]))
            top = sum((v >> 2) << i for i, v in enumerate(values))
            words += [w - 2**32 if w >= 2**31 else w for w in (low, high, top)]
        rows.append(words)
    return {
        "weight_packed": torch.tensor(rows, dtype=torch.int32),
        "weight_scale": scale.bfloat16(),
        "weight_zero_point": zero.to(torch.uint8),
    }


def _group(bits: int, *, symmetric: bool, group: int | None, kind: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric,
               "strategy": "group" if group else "channel", "group_size": group}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


STYLES: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "gptq-act-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq-v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "checkpoint_format": "gptq_v2",
    },
    "gptq-8bit": {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "compressed": _group(4, symmetric=False, group=GROUP, kind="pack-quantized"),
    "compressed-symmetric": _group(4, symmetric=True, group=GROUP, kind="pack-quantized"),
    "compressed-channel": _group(4, symmetric=False, group=None, kind="pack-quantized"),
    "compressed-8bit": _group(8, symmetric=True, group=None, kind="pack-quantized"),
    "compressed-bytes": _group(8, symmetric=True, group=None, kind="int-quantized"),
    "dense3": _group(3, symmetric=False, group=GROUP, kind="tightfit-dense-3bit"),
}


def _tensors(style: str, weight: torch.Tensor, generator: torch.Generator) -> Any:
    """(tensors by last part of their names, the weight that they mean)."""
    n_in = weight.shape[1]
    if style == "bitsandbytes":
        absmax = weight.abs().amax(1)
        q = (weight * 127 / absmax[:, None]).round()
        return {"weight": q.to(torch.int8), "SCB": absmax}, q * absmax[:, None] / 127
    symmetric = style in ("compressed-symmetric", "compressed-8bit", "compressed-bytes")
    bits = 8 if "8bit" in style or style == "compressed-bytes" else 3 if style == "dense3" else 4
    group = n_in if style in ("compressed-channel", "gptq-8bit") or bits == 8 else GROUP
    groups_of = torch.arange(n_in) // group
    if style == "gptq-act-order":
        groups_of = groups_of[torch.randperm(n_in, generator=generator)]
    q, scale, zero, meant = _grid(weight, bits, group, symmetric=symmetric, groups_of=groups_of)
    if style.startswith("gptq"):
        return _gptq(q, scale, zero, bits, style != "gptq-v2", groups_of), meant
    if style == "awq":
        return _awq(q, scale, zero), meant
    if style == "dense3":
        return _dense3(q, scale, zero), meant
    if style == "compressed-bytes":
        return {"weight": (q - 128).to(torch.int8), "weight_scale": scale.bfloat16()}, meant
    return _compressed(q, scale, zero, bits, symmetric), meant


def build(style: str, variant: str, path: Path) -> tiny_models.TinyModel:
    """Quantise one of `tiny_models.VARIANTS` in one of `STYLES`; head and embedding stay dense."""
    model = tiny_models.build(variant, path).hf
    generator = torch.Generator().manual_seed(5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        tensors, meant = _tensors(style, module.weight.data, generator)
        del state[f"{name}.weight"]
        state.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        module.weight.data.copy_(meant)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file({name: t.contiguous() for name, t in state.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = STYLES[style]
    (path / "config.json").write_text(json.dumps(config))
    return tiny_models.TinyModel(path=path, hf=model)
