"""Process settings and the two engines that the profile's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.fixtures import engine_store, open_engine, prepare_process

__all__ = ["engine_store", "open_engine"]

prepare_process()

SHAPE = "layers=4,hidden=128,heads=4,kv_heads=2,mlp=256,image_tokens=64,vocab=500,context=2048"


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A stock engine and one with the extension on dummy weights, in one process."""
    from vllm_flow.profile import engines, rounds
    from vllm_flow.profile.load import Limits
    from vllm_flow.profile.shape import LlavaShape, write_folder
    from vllm_flow.profile.subject import subject_of

    folder: Path = write_folder(
        LlavaShape.parse(SHAPE), tmp_path_factory.mktemp("shape"), "float32"
    )
    options = engines.EngineOptions(
        str(folder), "float32", "dummy", max_model_len=512, max_num_batched_tokens=2048,
        kv_cache_bytes=3 << 20, block_size=32, group_layers=1, images=2,
        prefix_caching=True,
    )  # fmt: skip
    stock, flow = (engines.open_engine(options, extension=on, num_layers=4) for on in (False, True))
    systems = engines.parse_systems("baseline,cliff=2,cliff=L/4", 4)
    subject = subject_of(str(folder), "float32")
    work = rounds.workload_of(stock, 20, 6, subject, subject.image_tokens)
    yield rounds.Bench(stock, flow, systems, subject, work, 20, Limits(60_000, 60_000))
