"""The peers compute what their papers say, and ours computes what VTW computes."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tests.engine import oracle
from tests.engine.fixtures import OpenEngine
from tests.engine.tiny_llava import Shape, build, picture, words
from vllm_flow.profile import peers
from vllm_flow.profile.ideal import row_count_ideal
from vllm_flow.profile.peers import Batch, Pruning

SHAPE = Shape("llama", layers=6, heads=4, kv_heads=2, head_dim=32, grid=5, seed=1)
TOKENS = 12
PROMPTS = tuple(f"{words(3, seed)} <image> {words(6, seed + 50)}" for seed in (1, 2))
PICTURES = tuple((picture(SHAPE, seed),) for seed in (1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPE, tmp_path_factory.mktemp("peers"))


@functools.lru_cache(maxsize=1)
def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval(), LlavaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(folder: Path) -> Batch:
    return Batch.of(*load(folder), PROMPTS, PICTURES)


def run(folder: Path, batch: Batch, pruning: Pruning) -> peers.PeerRun:
    return peers.generate(load(folder)[0], batch, pruning, TOKENS)


@pytest.mark.parametrize("cliff", [0, 1, 3, 5])
def test_key_mask_and_vtw_give_the_oracles_tokens(folder: Path, batch: Batch, cliff: int) -> None:
    expected = tuple(
        oracle.generate(folder, prompt, pictures, cliff, TOKENS).token_ids
        for prompt, pictures in zip(PROMPTS, PICTURES, strict=True)
    )
    assert run(folder, batch, peers.key_mask(cliff)).tokens == expected
    assert run(folder, batch, peers.vtw(cliff)).tokens == expected


@pytest.mark.parametrize("cliff", [2, 4])
def test_the_engine_gives_vtws_tokens(open_engine: OpenEngine, cliff: int) -> None:
    """Transformers with rows removed, and vLLM with the extension: one batch, equal tokens."""
    from vllm import SamplingParams

    engine = open_engine(SHAPE, 2)
    model, processor = load(engine.model_dir)
    batch = Batch.of(model, processor, PROMPTS, PICTURES)
    answers = engine.llm.generate(
        [
            {"prompt": prompt, "multi_modal_data": {"image": list(pictures)}}
            for prompt, pictures in zip(PROMPTS, PICTURES, strict=True)
        ],
        SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args={"flow_cliff": cliff}
        ),
        use_tqdm=False,
    )
    expected = peers.generate(model, batch, peers.vtw(cliff), TOKENS).tokens
    assert tuple(tuple(answer.outputs[0].token_ids) for answer in answers) == expected


def test_no_pruning_is_generate(folder: Path, batch: Batch) -> None:
    model, processor = load(folder)
    inputs = processor(text=PROMPTS[0], images=list(PICTURES[0]), return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
    assert run(folder, batch, peers.none()).tokens[0] == tuple(out[0, -TOKENS:].tolist())


def test_memory_follows_the_rows(folder: Path, batch: Batch) -> None:
    full = run(folder, batch, peers.none()).kv_bytes
    text = len(batch.is_image_T) - SHAPE.image_tokens + TOKENS - 1
    per_token = full // (SHAPE.layers * (text + SHAPE.image_tokens))
    assert run(folder, batch, peers.key_mask(2)).kv_bytes == full
    assert run(folder, batch, peers.vtw(2)).kv_bytes == per_token * (
        2 * (text + SHAPE.image_tokens) + 4 * text
    )
    half = round(SHAPE.image_tokens / 2)
    assert run(folder, batch, peers.fastv(2, 0.5)).kv_bytes == per_token * (
        2 * (text + SHAPE.image_tokens) + 4 * (text + half)
    )


def test_fastv_keeps_the_rows_that_plain_attention_ranks_highest(
    folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the attention weights that the eager model itself returns."""
    kept: list[torch.Tensor] = []
    choose = peers._rows

    def spy(*args: object) -> torch.Tensor:
        rows = choose(*args)
        kept.append(rows)
        return rows

    monkeypatch.setattr(peers, "_rows", spy)
    run(folder, batch, peers.fastv(3, 0.6))
    model, _ = oracle.load(folder)
    with torch.inference_mode():
        weights = model(
            inputs_embeds=batch.hidden_BTD, output_attentions=True, use_cache=False
        ).attentions[2]
    keep = round(0.4 * SHAPE.image_tokens)
    for row, attention_T in enumerate(weights[:, :, -1].mean(1)):
        attention_T = attention_T.masked_fill(~batch.is_image_T, -1)
        best = set(attention_T.topk(keep).indices.tolist())
        text = set((~batch.is_image_T).nonzero()[:, 0].tolist())
        assert set(kept[0][row].tolist()) == best | text


def test_keeping_everything_changes_nothing(folder: Path, batch: Batch) -> None:
    nothing_dropped = replace(peers.fastv(2, 0.0), name="all kept")
    assert run(folder, batch, nothing_dropped).tokens == run(folder, batch, peers.none()).tokens


def test_pyramid_drop_halves_at_three_borders(folder: Path, batch: Batch) -> None:
    assert peers.pyramid_drop(16).stages == ((4, 0.5), (8, 0.25), (12, 0.125))
    run_ = run(folder, batch, peers.pyramid_drop(SHAPE.layers))
    text = len(batch.is_image_T) - SHAPE.image_tokens + TOKENS - 1
    shares = [1.0, 0.5, 0.5, 0.25, 0.125, 0.125]
    rows = sum(text + round(share * SHAPE.image_tokens) for share in shares)
    full = run(folder, batch, peers.none()).kv_bytes
    assert run_.kv_bytes == full * rows // (SHAPE.layers * (text + SHAPE.image_tokens))


@pytest.mark.parametrize(
    "stages, mask, said",
    [
        (((4, 0.5), (2, 0.2)), False, "ascending"),
        (((2, 0.2), (4, 0.5)), False, "fall"),
        (((0, 0.5),), False, "rank"),
        (((2, 0.5),), True, "whole image"),
    ],
)
def test_impossible_prunings_are_refused(stages: object, mask: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pruning("x", stages, mask)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.data())
def test_vtws_equal_work_is_its_own_layer_where_layers_run_whole(
    layers: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layers))
    assert peers.vtw(layer).equal_work_cliff(layers, key_share=1.0) == layer
    assert peers.none().equal_work_cliff(layers, key_share=1.0) == layers


@given(st.integers(4, 40), st.floats(0.01, 0.5), st.floats(0.05, 0.95), st.data())
def test_no_other_cliff_costs_more_nearly_what_fastv_does(
    layers: int, key_share: float, dropped: float, data: st.DataObject
) -> None:
    """Time in proportion to rows and layers, as :func:`row_count_ideal` has it."""
    layer = data.draw(st.integers(1, layers - 1))
    fastv = layers / (layer + (1 - dropped) * (layers - layer))

    def ours(cliff: int) -> float:
        return row_count_ideal(
            num_layers=layers, cliff=cliff, prompt_tokens=1, image_tokens=1, key_share=key_share
        )

    found = peers.fastv(layer, dropped).equal_work_cliff(layers, key_share)
    off = [abs(1 / fastv - 1 / ours(cliff)) for cliff in range(1, layers + 1)]
    assert off[found - 1] <= min(off) + 1e-9


def test_equal_work_of_published_settings() -> None:
    """FastV: 2 layers and half of 14; PyramidDrop: 4 x (1 + 1/2 + 1/4 + 1/8)."""
    assert peers.fastv(2, 0.5).image_row_cost(16) == 9
    assert peers.pyramid_drop(16).image_row_cost(16) == 7.5
    assert peers.fastv(2, 0.5).equal_work_cliff(16, key_share=0.16) == 10  # 9.16 layers
    assert peers.pyramid_drop(16).equal_work_cliff(16, key_share=0.16) == 8  # 7.16
    assert peers.key_mask(4).equal_work_cliff(16, key_share=0.16) == 16


def test_prompts_of_different_length_are_refused(folder: Path) -> None:
    prompts = (PROMPTS[0], f"{PROMPTS[1]} {words(1, 9)}")
    with pytest.raises(ValueError, match="different lengths"):
        Batch.of(*load(folder), prompts, PICTURES)


def test_attention_that_needs_a_mask_is_refused(folder: Path, batch: Batch) -> None:
    with pytest.raises(ValueError, match="sdpa"):
        peers.generate(oracle.load(folder)[0], batch, peers.none(), 2)
