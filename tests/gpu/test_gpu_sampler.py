"""Tokens drawn on a GPU beside those drawn on the CPU."""

import random

import pytest
import torch

from tightfit.workers.api import SamplingSpec
from tightfit.workers.sampler import sample

pytestmark = pytest.mark.gpu

ROWS, VOCABULARY = 48, 5_000


def _specs():
    generator = random.Random(0)
    return [
        SamplingSpec(
            temperature=generator.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=generator.choice([0, 0, 1, 5, 100]),
            top_p=generator.choice([1.0, 0.9, 0.5]),
            min_p=generator.choice([0.0, 0.0, 0.1]),
            seed=generator.getrandbits(63),
            logit_bias=[(7, 3.0)] if row % 5 == 0 else [],
            banned_token_ids=[0, 1, 2] if row % 7 == 0 else [],
        )
        for row in range(ROWS)
    ]


def test_a_gpu_draws_the_tokens_that_the_cpu_does():
    """One may differ: where its number falls between two tokens, by the last bits of exp."""
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    specs, positions, ids = _specs(), list(range(ROWS)), list(range(ROWS))
    cpu = [token.token_id for token in sample(logits, specs, positions, ids)]
    gpu = [token.token_id for token in sample(logits.cuda(), specs, positions, ids)]
    assert sum(a == b for a, b in zip(cpu, gpu, strict=True)) >= ROWS - 1
    assert len(set(cpu)) > ROWS // 2
