"""The adapter: what it refuses, where boxes land, how answers become tokens."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.analysis.conftest import PROMPT, SHAPE
from vllm_flow.analysis.cam import Settings, heat_maps
from vllm_flow.analysis.seen_kinds import Unsupported, check_config
from vllm_flow.analysis.vlm import Encoded, Vlm, tokens_of


def config(architecture: str, decoder: str = "llama", tower: str = "clip_vision_model"):
    return SimpleNamespace(
        architectures=[architecture],
        text_config=SimpleNamespace(model_type=decoder),
        vision_config=SimpleNamespace(model_type=tower),
    )


@pytest.mark.parametrize(
    ("refused", "names"),
    [
        (config("QWenLMHeadModel"), "^QWenLMHeadModel is not .*: its image tokens are queries"),
        (
            config("InternVLChatModel"),
            "^InternVLChatModel is not .*: use a checkpoint .* end in -hf",
        ),
        (
            config("Phi3VForCausalLM"),
            "^Phi3VForCausalLM is not supported here: Phi-3-vision, .* evict",
        ),
        (config("SomeModel"), "^SomeModel is not supported here: .*It reads LLaVA-1.5, .*InternVL"),
        (config("LlavaForConditionalGeneration", decoder="gemma"), "gemma.*llama, mistral, qwen2"),
        (config("InternVLForConditionalGeneration", decoder="gpt_oss"), "gpt_oss decoder"),
        (config("LlavaForConditionalGeneration", tower="dinov2"), "a dinov2 tower"),
    ],
)
def test_other_models_are_refused_by_name(refused: SimpleNamespace, names: str) -> None:
    with pytest.raises(Unsupported, match=names):
        check_config(refused)


def test_a_model_that_is_code_is_refused_before_its_code_is_asked_for(tmp_path: Path) -> None:
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
              "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="names that end in -hf"):
        Vlm.load(str(tmp_path))


def test_a_class_token_among_image_tokens_leaves_no_grid(
    tiny: Vlm, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.model.config, "vision_feature_select_strategy", "full")
    monkeypatch.setattr(tiny.processor, "vision_feature_select_strategy", "full")
    encoded = tiny.encode(PROMPT, picture)
    assert len(encoded.image_P) == 4**2 + 1
    with pytest.raises(Unsupported, match="class token .* 'default'"):
        heat_maps(tiny, encoded, [20], Settings((0,), samples=0))


def coverage(vlm: Vlm, box: tuple[float, ...], image: Image.Image) -> np.ndarray:
    """Share of each patch inside a box."""
    (part,) = vlm.encode(PROMPT, image).parts
    return part.shares(vlm.box_in_views(box, image)[0])  # type: ignore[arg-type]


def test_encoding_finds_the_image(tiny: Vlm, encoded: Encoded) -> None:
    assert encoded.image_P.tolist() == list(range(3, 3 + 4**2))  # <s> w1 w2
    assert encoded.picture.pixels.shape == (3, 16, 16)
    with pytest.raises(Unsupported, match="exactly once"):
        tiny.encode("w1 <image> w2 <image>", Image.new("RGB", (16, 16)))


def test_the_view_is_the_picture(tiny: Vlm, encoded: Encoded, picture: Image.Image) -> None:
    assert (
        np.asarray(tiny.views(encoded)[0]) == np.asarray(picture)
    ).all()  # no resampling at this size


def test_the_answer_is_tokenised_after_the_prompt(tiny: Vlm) -> None:
    ids = tiny.answer_ids(PROMPT, " w7 w9")
    assert ids == tiny.processor.tokenizer.convert_tokens_to_ids(["w7", "w9"])
    with pytest.raises(ValueError, match="empty"):
        tiny.answer_ids(PROMPT, "")


def test_generation_equals_the_model_s_own_choice(tiny: Vlm, encoded: Encoded) -> None:
    first = tiny.generate(encoded, 1)
    with torch.no_grad():
        logits = tiny.model(
            input_ids=encoded.ids_T[None], pixel_values=encoded.picture.pixels[None].double()
        ).logits
    assert first == [int(logits[0, -1].argmax())]


@settings(deadline=None)
@given(
    corners=st.tuples(*[st.integers(0, 15)] * 2, *[st.integers(1, 16)] * 2).filter(
        lambda c: c[0] < c[2] and c[1] < c[3]
    )
)
def test_a_box_covers_its_pixels(tiny: Vlm, corners: tuple[int, int, int, int]) -> None:
    """At the model's own size nothing is resampled: coverage is a count of pixels."""
    left, top, right, bottom = corners
    pixels = np.zeros((16, 16))
    pixels[top:bottom, left:right] = 1
    counted = pixels.reshape(4, SHAPE.patch, 4, SHAPE.patch).mean((1, 3))
    found = coverage(tiny, (left, top, right, bottom), Image.new("RGB", (16, 16)))
    np.testing.assert_allclose(found, counted, atol=1e-6)


def test_a_box_follows_the_crop(tiny: Vlm) -> None:
    """A wide picture loses its sides: the box of its middle square is all that is seen."""
    wide = Image.new("RGB", (64, 32))
    np.testing.assert_allclose(coverage(tiny, (16, 0, 48, 32), wide), 1, atol=0.05)
    np.testing.assert_allclose(coverage(tiny, (16, 0, 32, 32), wide)[:, :2], 1, atol=0.1)
    assert coverage(tiny, (16, 0, 32, 32), wide)[:, 2:].max() < 0.1
    with pytest.raises(ValueError, match="nothing of the box"):
        coverage(tiny, (0, 0, 10, 32), wide)
    with pytest.raises(ValueError, match="64 x 32"):
        coverage(tiny, (0, 0, 65, 32), wide)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["A", "dog", " dog", " do", "g", ",", " cat", "s", " a"]), max_size=8)
)
def test_tokens_of_a_word_spell_it(words: list[str]) -> None:
    text = "".join(words)
    if "dog" not in re.split(r"\W+", text):
        with pytest.raises(ValueError, match="does not contain the word 'dog'"):
            tokens_of(words, "dog")
        return
    found = tokens_of(words, "DOG")
    starts = [0, *accumulate(map(len, words))]
    spelled = text[starts[found[0]] : starts[found[-1] + 1]]
    assert "dog" in spelled
    assert len(found) == 1 or all("dog" not in words[token] for token in found)
    assert found == list(range(found[0], found[-1] + 1))
