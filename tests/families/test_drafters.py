"""Drafters beside other families: EAGLE-3 over positions of three axes, and a layer that predicts the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.engine.test_speculative import counted
from tests.engine.tiny_drafters import GUESSES, Weights, eagle3, small
from tests.engine.tiny_llava import Shape
from tests.families import next_token
from tests.families.asking import Ask, every_cliff
from tests.families.llama4 import SEEN
from tests.families.making import Checkpoint, text_settings
from tests.families.running import Engine, Judge

pytestmark = pytest.mark.long
TOKENS = 12


class FewWords(Checkpoint):
    """A checkpoint whose answers are made of three words, of which a drafter says one."""

    @property
    def word_ids(self) -> list[int]:
        return super().word_ids[:3]


def of_few_words(checkpoint: Checkpoint) -> FewWords:
    own = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.init}
    return FewWords(**own)


def asks_of(checkpoint: Checkpoint) -> list[Ask]:
    return every_cliff(checkpoint, [None, *range(checkpoint.num_layers)])


def drafter(checkpoint: Checkpoint, where: Path, method: str) -> dict[str, Any]:
    """``speculative_config`` with a drafter, written there, that says the checkpoint's words."""
    weights = Weights(Shape(), 83, len(checkpoint.vocab), checkpoint.word_ids)
    own = {"eagle3": eagle3, "draft_model": small}[method](weights)
    settings = text_settings(checkpoint.vocab) | {"head_dim": 32} | own
    LlamaConfig(**settings).save_pretrained(where)
    save_file(weights.found, where / "model.safetensors", metadata={"format": "pt"})
    return {"method": method, "model": str(where), "num_speculative_tokens": GUESSES}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_eagle3_is_exact_on_positions_of_three_axes(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, family: str, asynchronous: bool
) -> None:
    checkpoint = of_few_words(checkpoint_of(family))
    engine = Engine(
        checkpoint,
        1,
        speculative_config=drafter(checkpoint, tmp_path, "eagle3"),
        async_scheduling=asynchronous,
        max_num_batched_tokens=80,
    )
    asks = asks_of(checkpoint)
    with counted(scheduler_of(engine)) as drafted:
        outputs = engine.run(asks, TOKENS)
    Judge(engine).assert_exact(asks, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    engine.check_idle()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_layer_that_predicts_the_next_token_is_exact(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, asynchronous: bool
) -> None:
    """GLM-OCR's, which comes with the model."""
    checkpoint = of_few_words(checkpoint_of("glm_ocr"))
    engine = Engine(
        next_token.glm_ocr(checkpoint, tmp_path / "mtp"),
        5,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        async_scheduling=asynchronous,
    )
    engine.checkpoint = checkpoint
    asks = asks_of(checkpoint)
    with counted(scheduler_of(engine)) as drafted:
        outputs = engine.run(asks, TOKENS)
    Judge(engine).assert_exact(asks, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    engine.check_idle()


def test_hidden_states_are_not_read_beside_chunks_of_local_attention(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """vLLM turns off what storage groups stand on; what is refused is the drafter, with what to draft by instead."""
    checkpoint = checkpoint_of("llama4")
    with pytest.raises(ValueError, match="hidden states beside chunks .* to 'ngram' or 'draft_m"):
        Engine(checkpoint, 1, speculative_config=drafter(checkpoint, tmp_path, "eagle3"))


@pytest.mark.parametrize(
    ("method", "asynchronous"), [("ngram", False), ("draft_model", False), ("draft_model", True)]
)
def test_chunks_of_local_attention_count_drafts_that_were_kept(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, method: str, asynchronous: bool
) -> None:
    """Chunks of kept tokens end among drafts, of which some are refused; the device knows how many."""
    checkpoint = of_few_words(checkpoint_of("llama4"))
    from_text = {"method": "ngram", "num_speculative_tokens": GUESSES}
    from_text |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    of_text = method == "ngram"
    engine = Engine(
        checkpoint,
        2 if of_text else 3,  # the drafter's layers among them
        speculative_config=from_text if of_text else drafter(checkpoint, tmp_path, method),
        async_scheduling=asynchronous,
        max_num_batched_tokens=80,
    )
    asks = asks_of(checkpoint)
    with counted(scheduler_of(engine)) as drafted:
        outputs = engine.run(asks, 2 * SEEN)
    Judge(engine).assert_exact(asks, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    engine.check_idle()


def scheduler_of(engine: Engine) -> Any:
    """As :func:`counted` looks for it."""
    core = engine.llm.llm_engine.engine_core.engine_core
    return type("Scheduling", (), {"scheduler": core.scheduler})
