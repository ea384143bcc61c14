"""Shapes from a line of numbers, and the checkpoint folder written from them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.profile.shape import LlavaShape, shape_of, write_folder, write_weights

TINY = LlavaShape.parse(
    "layers=3,hidden=64,heads=2,kv_heads=1,mlp=96,image_tokens=16,vocab=64,patch=4,context=256"
)


@given(st.integers(1, 64), st.integers(1, 8), st.sampled_from((1, 2, 4)), st.integers(1, 40))
def test_what_is_printed_reads_back(layers: int, per_kv: int, kv_heads: int, grid: int) -> None:
    heads = per_kv * kv_heads
    shape = LlavaShape(
        layers=layers, hidden=heads * 32, heads=heads, kv_heads=kv_heads, image_tokens=grid**2
    )
    assert LlavaShape.parse(f"shape:{shape}") == shape


@pytest.mark.parametrize(
    "text, named",
    [
        ("layer=3", "layer=3"),
        ("layers=x", "layers=x"),
        ("layers=0", "layers=0"),
        ("image_tokens=500", "image_tokens=500"),
        ("heads=7", "heads=7"),
        ("kv_heads=3", "kv_heads=3"),
        ("vocab=2", "vocab=2"),
    ],
)
def test_impossible_shapes_are_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LlavaShape.parse(text)


def test_folder_loads_and_has_the_shape(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = write_folder(TINY, tmp_path, "bfloat16")
    found = shape_of(AutoConfig.from_pretrained(folder), "bfloat16")
    for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "vocab"):
        assert getattr(found, name) == getattr(TINY, name)
    assert found.head_dim == 32 and found.value_bytes == 2
    assert found.tower is not None and found.tower.patches == 16 and found.tower.layers == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "w3 w58 w0"
    assert tokenizer.decode(tokenizer(words).input_ids, skip_special_tokens=True) == words
    assert {f.name for f in fields(LlavaShape)} >= {"patch", "tower_layers"}


def test_weights_are_all_there_and_follow_the_seed(tmp_path: Path) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    def load(seed: int, where: Path) -> torch.nn.Module:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            write_weights(TINY, where, "float32", seed), output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return model

    first, again, other = load(0, tmp_path / "a"), load(0, tmp_path / "b"), load(1, tmp_path / "c")
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
