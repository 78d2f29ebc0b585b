"""Chooses from a large pool of texts those to calibrate with, by their distance to prototypes.

The measure of Sorscher et al., "Beyond neural scaling laws: beating power law scaling via data
pruning" (arXiv 2206.14486), section 6: samples as vectors of a self-supervised model, here the mean
of the model's own token embeddings; prototypes are the centres of spherical k-means; a sample that
lies near one is easy, one that lies far from all is hard. Every prototype gives an equal share, as
far as it has samples. P pool size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tightfit.workers.checkpoint import Checkpoint, find_prefix
from tightfit.workers.decoder_config import DecoderConfig

NUM_PROTOTYPES: Final = 8
ITERATIONS: Final = 30


def mean_embeddings(
    checkpoint: Checkpoint, config: DecoderConfig, path: str | Path, pool: Sequence[Sequence[int]]
) -> Tensor:
    """The mean of each sample's token embeddings, fp32 [P, D]; only the rows needed are read.

    Raises:
        CheckpointError: there is no embedding.
    """
    prefix = find_prefix(checkpoint, config, path)
    table = checkpoint.read(config.full_name(f"{config.names.embedding}.weight", prefix))
    return torch.stack([table[torch.tensor(sample)].float().mean(0) for sample in pool])


def choose_samples(vectors: Tensor, count: int, *, hardest: bool) -> list[int]:
    """Which samples to take; deterministic.

    Args:
        vectors: [P, D].
        count: how many; all if there are fewer.
        hardest: of each prototype's samples those farthest from it, else the nearest.
    Returns:
        their indices, ascending.
    """
    if count >= len(vectors):
        return list(range(len(vectors)))
    directions = _directions(vectors - vectors.mean(0))
    nearest, similarity = _prototypes(directions, min(NUM_PROTOTYPES, count))
    order = torch.argsort(similarity, descending=not hardest, stable=True).tolist()
    queues: dict[int, list[int]] = {}
    for index in order:
        queues.setdefault(int(nearest[index]), []).append(index)
    chosen: list[int] = []
    for rank in range(len(vectors)):
        for queue in queues.values():
            if rank < len(queue) and len(chosen) < count:
                chosen.append(queue[rank])
    return sorted(chosen)


def _directions(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def _prototypes(directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means, begun with directions far from each other: each sample's prototype, and
    its cosine with it."""
    first = [0]
    similarity = directions @ directions[0]
    for _ in range(count - 1):
        first.append(int(similarity.argmin()))
        similarity = torch.maximum(similarity, directions @ directions[first[-1]])
    prototypes = directions[first]
    for _ in range(ITERATIONS):
        nearest = (directions @ prototypes.t()).argmax(1)
        sums = torch.zeros_like(prototypes).index_add_(0, nearest, directions)
        counts = torch.bincount(nearest, minlength=count)
        prototypes = torch.where(counts[:, None] > 0, _directions(sums), prototypes)
    cosine, nearest = (directions @ prototypes.t()).max(1)
    return nearest, cosine
