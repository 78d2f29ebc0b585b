"""Draws tokens. n rows, V vocabulary.

Order of operations (vLLM's, so that users find the same meaning): log-probabilities from the
unmodified logits; bias and bans; penalties; temperature; min_p; top_k; top_p. The draw is by
inverse transform with one uniform number from Philox keyed by (sequence seed, position): it
depends on nothing else, so a replayed position gives the same token in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tightfit.workers.api import SampledToken, SamplingSpec
from tightfit.workers.errors import StageError

MASK64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one sequence (Philox 4x64, Salmon et al. 2011)."""
    key = np.array([seed & MASK64, position & MASK64], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(
    logits: Tensor,
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    sequence_ids: Sequence[int],
) -> list[SampledToken]:
    """One token per row.

    Args:
        logits: [n, V] fp32; changed in place where a row asks for it.
        specs: how each row is drawn.
        positions: index in its sequence of the token to be drawn.
        sequence_ids: whose rows they are.
    Raises:
        StageError: a row has NaN logits.
    """
    _refuse_nan(logits, sequence_ids)
    raw = {
        i: torch.log_softmax(logits[i], dim=-1)
        for i, spec in enumerate(specs)
        if spec.num_logprobs is not None
    }
    for i, spec in enumerate(specs):
        _adjust(logits[i], spec)
    chosen = logits.argmax(dim=-1).tolist()
    for i, spec in enumerate(specs):
        if spec.temperature > 0:
            chosen[i] = _draw(logits[i], spec, positions[i])
    return [
        _token(sequence_ids[i], chosen[i], raw.get(i), spec.num_logprobs or 0)
        for i, spec in enumerate(specs)
    ]


def score(logits: Tensor, targets: Sequence[int]) -> list[float]:
    """Log-probability of one token per row.

    Args:
        logits: [n, V] fp32.
        targets: n token ids.
    """
    picked = logits.gather(1, torch.tensor(targets)[:, None]).flatten()
    scores: list[float] = (picked - logits.logsumexp(dim=-1)).tolist()
    return scores


def _refuse_nan(logits: Tensor, sequence_ids: Sequence[int]) -> None:
    # One reduction over the batch; a NaN anywhere makes the sum NaN.
    if not bool(torch.isnan(logits.sum())):
        return
    for row, sequence_id in zip(logits, sequence_ids, strict=True):
        if bool(torch.isnan(row).any()):
            raise StageError(
                f"sequence {sequence_id}: the logits are not numbers; the weights or the KV "
                "cache are damaged, or the format overflows on this model"
            )


def _adjust(row: Tensor, spec: SamplingSpec) -> None:
    """Bias, bans and penalties, in place on one row [V]."""
    if spec.logit_bias:
        ids, values = zip(*spec.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(ids), torch.tensor(values, dtype=row.dtype))
    if spec.banned_token_ids:
        row[torch.tensor(spec.banned_token_ids)] = float("-inf")
    if not spec.history_token_ids:
        return
    history = torch.tensor(spec.history_token_ids)
    if spec.repetition_penalty != 1.0:
        seen = torch.unique(history)
        values_seen = row[seen]
        row[seen] = torch.where(
            values_seen > 0,
            values_seen / spec.repetition_penalty,
            values_seen * spec.repetition_penalty,
        )
    output = history[spec.num_prompt_tokens :]
    if output.numel():
        ids_out, counts = torch.unique(output, return_counts=True)
        row[ids_out] -= spec.frequency_penalty * counts + spec.presence_penalty


def _draw(row: Tensor, spec: SamplingSpec, position: int) -> int:
    """Inverse transform over the kept tokens, most probable first, equal ones by id."""
    count = min(spec.top_k, row.numel()) if spec.top_k else row.numel()
    scaled = (row / spec.temperature).double()
    if count == row.numel() and spec.top_p >= 1.0 and spec.min_p == 0.0:
        return _pick(torch.softmax(scaled, dim=-1), spec.seed, position)
    order = torch.sort(scaled, descending=True, stable=True)
    probabilities = torch.softmax(order.values, dim=-1)
    kept = torch.ones(row.numel(), dtype=torch.bool)
    kept[count:] = False
    if spec.min_p > 0.0:
        kept &= probabilities >= spec.min_p * probabilities[0]
    if spec.top_p < 1.0:
        left = torch.where(kept, probabilities, 0.0)
        left /= left.sum()
        # A token stays while those before it have not reached top_p: the set is never empty.
        kept &= left.cumsum(0) - left < spec.top_p
    return int(order.indices[_pick(torch.where(kept, probabilities, 0.0), spec.seed, position)])


def _pick(probabilities: Tensor, seed: int, position: int) -> int:
    cumulative = probabilities.cumsum(0)
    threshold = uniform(seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return min(index, int(probabilities.nonzero()[-1]))


def _token(sequence_id: int, token_id: int, log_probs: Tensor | None, num_top: int) -> SampledToken:
    if log_probs is None:
        return SampledToken(sequence_id=sequence_id, token_id=token_id)
    top: list[tuple[int, float]] = []
    if num_top:
        best = log_probs.topk(min(num_top, log_probs.numel()))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return SampledToken(
        sequence_id=sequence_id,
        token_id=token_id,
        logprob=float(log_probs[token_id]),
        top_logprobs=top,
    )
