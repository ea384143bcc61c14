"""What is remembered of a picture from request to request is forgotten with its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.cases import NEXT, Ask, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact, params_of
from tests.engine.tiny_llava import build

STAGES = ("0:30% diversity, 2:0", "0:30% cls_attention, 2:0")


@pytest.fixture
def engine(open_engine: OpenEngine) -> Engine:
    """Without vLLM's cache of processed pictures, as large servers run it."""
    return open_engine(NEXT, 2, enable_prefix_caching=True, mm_processor_cache_gb=0)


def evict_pictures(engine: Engine) -> None:
    """As if others had taken their places in the encoder's cache."""
    cache = engine.scheduler.encoder_cache_manager
    gone = list(cache.cached)
    cache.reset()
    cache.freed.extend(gone)  # told to the worker with the next step


@pytest.mark.parametrize("stages", STAGES)
def test_a_clients_name_for_two_pictures(engine: Engine, stages: str) -> None:
    """Of different sizes: the second is put in order anew, and the engine goes on."""
    for seed in (1, 2):  # a wide one, a tall one
        ask = replace(one_image(seed), stages=stages)
        prompt = engine.prompt(ask) | {"multi_modal_uuids": {"image": [f"a client's {stages}"]}}
        outputs = engine.llm.generate([prompt], params_of(ask), use_tqdm=False)
        assert_exact(engine, [ask], outputs)
        evict_pictures(engine)


@contextmanager
def weights_of(engine: Engine, other: Path) -> Iterator[None]:
    """Serve another checkpoint's weights, as after a step of training."""
    own, model = engine.model_dir, engine.llm.llm_engine.vllm_config.model_config
    try:
        for path in (other, own):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            model.model = str(own)  # in another process, the front end would not have noticed
            engine.model_dir = path
            engine.llm.llm_engine.reset_encoder_cache()
            assert engine.reset_prefix_cache()
            if path == other:
                yield
    finally:
        engine.model_dir = own


def test_other_weights_put_pictures_in_another_order(engine: Engine, tmp_path: Path) -> None:
    asks: list[Ask] = [replace(one_image(5), stages=stages) for stages in STAGES]
    asks += [one_image(5, 2), one_image(5)]
    assert_exact(engine, asks, engine.run(asks))
    with weights_of(engine, build(replace(NEXT, seed=99), tmp_path)):
        assert_exact(engine, asks, engine.run(asks))
    assert_exact(engine, asks, engine.run(asks))
