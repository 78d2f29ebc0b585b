"""Choosing calibration samples by their distance to prototypes."""

import pytest
import tiny_models
import torch

from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.sample_choice import choose_samples, mean_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")


def _clusters(sizes, spread, dims=16):
    """Samples around some directions, cluster by cluster, each farther from its middle than the one
    before."""
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for number, size in enumerate(sizes):
        middle = 10.0 * torch.eye(dims)[number]
        for rank in range(size):
            away = torch.randn(dims, generator=generator)
            away[: len(sizes)] = 0
            vectors.append(middle + spread * (rank + 1) / size * away / away.norm())
    return torch.stack(vectors)


@pytest.mark.parametrize("hardest", [True, False])
def test_every_prototype_gives_its_nearest_or_farthest(hardest):
    chosen = choose_samples(_clusters([20] * 8, spread=2.0), 24, hardest=hardest)
    ranks = [index % 20 for index in chosen]
    assert [index // 20 for index in chosen] == [number for number in range(8) for _ in range(3)]
    assert all(rank >= 15 if hardest else rank < 8 for rank in ranks)


def test_a_small_cluster_gives_what_it_has_and_the_others_the_rest():
    chosen = choose_samples(
        _clusters([2, 30, 30, 30, 30, 30, 30, 30], spread=1.0), 80, hardest=True
    )
    assert len(chosen) == len(set(chosen)) == 80
    assert {0, 1} <= set(chosen)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_samples_than_prototypes_are_possible(count):
    assert len(choose_samples(_clusters([5] * 8, spread=1.0), count, hardest=False)) == count


def test_a_pool_that_is_no_larger_is_taken_whole():
    vectors = _clusters([2, 2], spread=1.0)
    assert choose_samples(vectors, 4, hardest=True) == [0, 1, 2, 3]
    assert choose_samples(vectors, 9, hardest=True) == [0, 1, 2, 3]


def test_equal_samples_do_not_disturb_it():
    assert choose_samples(torch.ones(10, 4), 3, hardest=True) == [0, 1, 2]


@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
def test_a_sample_is_the_mean_of_its_tokens_embeddings(tmp_path, variant):
    model = tiny_models.build(variant, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    pool = [[1, 5, 5, 9], [3, 2, 1, 0]]
    vectors = mean_embeddings(checkpoint, decoder_config(checkpoint.config), tmp_path, pool)
    table = model.hf.get_input_embeddings().weight.detach()
    torch.testing.assert_close(vectors, torch.stack([table[sample].mean(0) for sample in pool]))
