"""Draws tokens. n rows, V vocabulary.

Order of operations (vLLM's, so that users find the same meaning): log-probabilities from the
unmodified logits; bias and bans; penalties; temperature; min_p; top_k; top_p.

The draw is by inverse transform: the kept tokens in order of their ids, and one uniform number from
Philox keyed by (sequence seed, position). It depends on nothing else, so a replayed position gives
the same token in any batch, and a filter that removes nothing changes nothing. Among equally
probable tokens the lower id is the more probable one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tightfit.workers.api import SampledToken, SamplingSpec
from tightfit.workers.errors import StageError

MASK64 = 2**64 - 1
LEAST_TEMPERATURE = 1e-30
"""Its reciprocal, by which CUDA multiplies, is finite in fp32; the draw is greedy long before."""
NUCLEUS_FLOORS = (1e-2, 1e-4, 1e-8)
"""Weights relative to the largest, tried in turn: only tokens above the first floor whose mass
reaches top_p are sorted."""
MAX_SCORE_ELEMENTS = 2**22
"""Logits reduced at once by `score`; bounds its workspace to 16 MiB."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one sequence (Philox 4x64, Salmon et al. 2011)."""
    key = np.array([seed & MASK64, position & MASK64], dtype=np.uint64)
    # The top 53 bits, as a double holds. `random_raw` is fixed for all versions of NumPy.
    return float(np.random.Philox(key=key).random_raw() >> 11) * 2.0**-53


def sample(
    logits: Tensor,
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    sequence_ids: Sequence[int],
) -> list[SampledToken]:
    """One token per row.

    Args:
        logits: [n, V] fp32; not changed.
        specs: how each row is drawn.
        positions: index in its sequence of the token to be drawn.
        sequence_ids: whose rows they are.
    Raises:
        StageError: a row's logits are NaN or infinite.
    """
    best = logits.argmax(dim=-1)
    # argmax takes a NaN for the largest, so the winners tell about whole rows.
    finite = logits.gather(1, best[:, None]).isfinite().flatten()
    if not bool(finite.all()):
        _refuse(sequence_ids[finite.tolist().index(False)])
    chosen: list[int] = best.tolist()
    draws: dict[int, Tensor] = {}
    for i, spec in enumerate(specs):
        is_adjusted = bool(spec.logit_bias or spec.banned_token_ids or spec.history_token_ids)
        row = _adjusted(logits[i], spec) if is_adjusted else logits[i]
        if spec.temperature > 0:
            draws[i] = row
        elif is_adjusted:
            chosen[i] = int(row.argmax())
    if draws:
        numbers = [uniform(specs[i].seed, positions[i]) for i in draws]
        drawn = _draw_all(list(draws.values()), [specs[i] for i in draws], numbers)
        for i, token in zip(draws, drawn, strict=True):
            chosen[i] = token
    return [
        SampledToken(sequence_id=sequence_ids[i], token_id=chosen[i])
        if spec.num_logprobs is None
        else _with_logprobs(sequence_ids[i], chosen[i], logits[i], spec.num_logprobs)
        for i, spec in enumerate(specs)
    ]


def score(logits: Tensor, targets: Sequence[int]) -> list[float]:
    """Natural log-probability of one token per row.

    Args:
        logits: [n, V] fp32.
        targets: n token ids.
    Raises:
        StageError: a row's logits are NaN or infinite.
    """
    ids = torch.tensor(targets, device=logits.device)
    picked = logits.gather(1, ids[:, None]).flatten()
    rows = max(1, MAX_SCORE_ELEMENTS // logits.shape[1])
    totals = torch.cat([part.logsumexp(dim=-1) for part in torch.split(logits, rows)])
    scores: list[float] = (picked - totals).tolist()
    for i, value in enumerate(scores):
        if value != value:
            raise StageError(f"row {i} of {len(scores)} to score: {NOT_NUMBERS}")
    return scores


NOT_NUMBERS = (
    "the logits are NaN or infinite; the weights or the KV cache are damaged, or the format "
    "overflows on this model"
)


def _refuse(sequence_id: int) -> None:
    raise StageError(f"sequence {sequence_id}: {NOT_NUMBERS}")


def _adjusted(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """A copy of one row [V] with bias, bans and penalties."""
    row, device = logits.clone(), logits.device
    if spec.logit_bias:
        ids, values = zip(*spec.logit_bias, strict=True)
        bias = torch.tensor(values, dtype=row.dtype, device=device)
        row.index_add_(0, torch.tensor(ids, device=device), bias)
    if spec.banned_token_ids:
        row[torch.tensor(spec.banned_token_ids, device=device)] = float("-inf")
    if not spec.history_token_ids:
        return row
    history = torch.tensor(spec.history_token_ids, device=device)
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
    return row


def _draw_all(
    rows: Sequence[Tensor], specs: Sequence[SamplingSpec], numbers: Sequence[float]
) -> list[int]:
    """The token of each row [V] at its number; on a GPU of all rows at once, as every question that
    the host asks of it waits for all that is under way."""
    if not rows[0].is_cuda:
        return [_draw(*one) for one in zip(rows, specs, numbers, strict=True)]
    from tightfit.kernels import sampling  # imports Triton, which a CPU host need not have

    logits = torch.stack(tuple(rows))
    make = partial(torch.tensor, device=logits.device)
    temperatures = [max(spec.temperature, LEAST_TEMPERATURE) for spec in specs]
    drawn = sampling.sample(
        logits,
        temperature=make(temperatures, dtype=torch.float32),
        top_k=make([spec.top_k for spec in specs], dtype=torch.int32),
        top_p=make([spec.top_p for spec in specs], dtype=torch.float64),
        min_p=make([spec.min_p for spec in specs], dtype=torch.float32),
        uniform=make(numbers, dtype=torch.float64),
    )
    token_ids: list[int] = drawn.token_ids.tolist()
    return token_ids


def _draw(row: Tensor, spec: SamplingSpec, number: float) -> int:
    """The token of row [V] at `number` of the kept tokens' distribution function."""
    # Relative to the largest, so that nothing overflows however small the temperature.
    weights = ((row - row.max()) / max(spec.temperature, LEAST_TEMPERATURE)).exp()
    is_cut = spec.min_p > 0.0 or 0 < spec.top_k < row.numel() or spec.top_p < 1.0
    if not is_cut:
        return _invert(weights, number)
    ids = _kept(weights, spec)
    return int(ids[_invert(weights[ids], number)])


def _kept(weights: Tensor, spec: SamplingSpec) -> Tensor:
    """Token ids that min_p, top_k and top_p leave, ascending.

    Args:
        weights: [V], probabilities up to a factor, the largest 1.
    """
    if 0 < spec.top_k < weights.numel():
        least = weights.topk(spec.top_k, sorted=False).values.min()
        least = least.clamp(min=spec.min_p)
        ids = (weights >= least).nonzero().flatten()
        if ids.numel() > spec.top_k:  # equally probable ones at the border
            ids = _by_weight(weights, ids)[: spec.top_k]
    elif spec.min_p > 0.0:
        ids = (weights >= spec.min_p).nonzero().flatten()
    else:
        ids = _nucleus_candidates(weights, spec.top_p)
    if spec.top_p < 1.0:
        ids = _by_weight(weights, ids)
        mass = weights[ids].cumsum(0, dtype=torch.float64)
        is_whole = 0 < spec.top_k < weights.numel() or spec.min_p > 0.0
        total = mass[-1] if is_whole else weights.sum(dtype=torch.float64)
        # A token stays while those before it have not reached top_p: the set is never empty.
        ids = ids[: 1 + int((mass[:-1] < spec.top_p * total).sum())]
    return ids.sort().values


def _by_weight(weights: Tensor, ids: Tensor) -> Tensor:
    """`ids`, which ascend, most probable first; equally probable ones by id."""
    return ids[weights[ids].sort(descending=True, stable=True).indices]


def _nucleus_candidates(weights: Tensor, top_p: float) -> Tensor:
    """Ids of tokens among which the most probable ones reach `top_p`, ascending: sorting a whole
    vocabulary takes some milliseconds, and the nucleus is mostly small."""
    wanted = top_p * weights.sum(dtype=torch.float64)
    for floor in NUCLEUS_FLOORS:
        ids = (weights >= floor).nonzero().flatten()
        if weights[ids].sum(dtype=torch.float64) >= wanted:
            return ids
    return torch.arange(weights.numel(), device=weights.device)


def _invert(weights: Tensor, number: float) -> int:
    """Index at which the running share of `weights` first exceeds `number`."""
    mass = weights.cumsum(0, dtype=torch.float64)
    # `number` is at most 1 - 2**-53: the product is below the total even when rounded, so that the
    # index exists and its weight is not 0.
    return int(torch.searchsorted(mass, mass[-1:] * number, right=True))


def _with_logprobs(sequence_id: int, token_id: int, row: Tensor, num_top: int) -> SampledToken:
    """A token with its log-probability in row [V], and those of the `num_top` most probable."""
    total = row.logsumexp(dim=-1)
    top: list[tuple[int, float]] = []
    if num_top:
        best = row.topk(min(num_top, row.numel()))
        top = list(zip(best.indices.tolist(), (best.values - total).tolist(), strict=True))
    return SampledToken(
        sequence_id=sequence_id,
        token_id=token_id,
        logprob=float(row[token_id] - total),
        top_logprobs=top,
    )
