"""The Triton kernel of farthest first against its reference, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from vllm_flow.engine.worker.choosing.farthest_first import farthest_first_triton, fast_order
from vllm_flow.ranks import RANKS
from vllm_flow.ranks.diversity import DIVERSITY, farthest_first


@pytest.mark.parametrize("tokens", [1, 2, 25, 64, 100])
@pytest.mark.parametrize("kind", ["random", "equal", "pairs"])
def test_the_kernel_is_the_reference(tokens: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(tokens)
    embeddings = torch.randn(tokens, 16, generator=rng)
    if kind == "equal":
        embeddings[:] = embeddings[0].clone()
    elif kind == "pairs":  # every token twice, so that the nearest other one is at no distance
        embeddings = embeddings.repeat_interleave(2, 0)[:tokens]
    for keep in {1, (tokens + 1) // 2, tokens}:
        found = farthest_first_triton(embeddings, keep).tolist()
        assert len(set(found)) == keep
        if kind == "random":
            assert found == farthest_first(embeddings, keep).tolist()


def test_only_cuda_takes_the_kernel() -> None:
    assert fast_order(DIVERSITY, torch.device("cpu")) is DIVERSITY.order
    assert fast_order(DIVERSITY, torch.device("cuda")) is not DIVERSITY.order
    assert DIVERSITY is RANKS["diversity"]
