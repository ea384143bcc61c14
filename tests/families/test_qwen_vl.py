"""Qwen-VL's published files without an engine: tokens are tiktoken's, pictures have their place, limits are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, Qwen2Config

from tests.families import qwen_vl
from tests.families.making import picture
from tests.families.qwen_vl_reference import ReferenceProcessor
from vllm_flow import models
from vllm_flow.models.qwen_vl_config import QwenVLConfig, check
from vllm_flow.models.qwen_vl_tokenizer import QWenTokenizer, read_ranks

RANKS = qwen_vl.ranks()
REFERENCE = ReferenceProcessor(RANKS, qwen_vl.SPECIALS, qwen_vl.SIDE)
START, END, PAD = REFERENCE.start, REFERENCE.end, REFERENCE.pad
CONFIG = qwen_vl.config_of(len(RANKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published, but for its weights."""
    where = tmp_path_factory.mktemp("qwen_vl")
    (where / "config.json").write_text(json.dumps(CONFIG))
    qwen_vl.write_tokenizer(RANKS, where)
    models.register_with_transformers()
    return where


@pytest.fixture(scope="module", params=[False, True], ids=["code refused", "code allowed"])
def tokenizer(folder: Path, request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=request.param)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(qwen_vl.TEXT.split()),
        st.sampled_from(qwen_vl.SPECIALS),
        st.sampled_from(
            ("1023", "\n\n", "  ", " \r\n", "don't", "IT'LL", "e\u0301", "港口", "🌊", "_-!")
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


@given(text=TEXTS)
def test_tokens_are_tiktokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == REFERENCE.encode(text)


def test_text_comes_back_without_special_tokens(tokenizer: Any) -> None:
    text = "<|im_start|>The 港口 lay<ref>quiet</ref>\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The 港口 layquiet\n"
    assert len(tokenizer) == len(RANKS) + len(qwen_vl.SPECIALS)


def test_the_published_ids() -> None:
    """151643 tokens of the published vocabulary come before the special ones."""
    named = {name: 151643 + index for index, name in enumerate(qwen_vl.SPECIALS)}
    assert named["<|endoftext|>"] == 151643 and named["<|im_end|>"] == 151645
    assert (named["<img>"], named["</img>"], named["<imgpad>"]) == (151857, 151858, 151859)
    from vllm_flow.models.qwen_vl_tokenizer import SPECIALS

    assert SPECIALS == qwen_vl.SPECIALS


IMAGE: dict[str, Any] = {"type": "image"}
ASKED = [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Which one?"}]}]
PICTURES = "Picture 1: <img></img>\nPicture 2: <img></img>\nWhich one?"


def test_a_chat_is_chatml_and_ends_with_its_turn(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    found = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert found == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{PICTURES}<|im_end|>\n<|im_start|>assistant\n"
    )
    more = [
        {"role": "system", "content": "Be brief."},
        *ASKED,
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [{"type": "text", "text": "And here? "}, IMAGE]},
    ]
    assert tokenizer.apply_chat_template(more, tokenize=False) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{PICTURES}<|im_end|>\n"
        "<|im_start|>assistant\nThe first.<|im_end|>\n"
        "<|im_start|>user\nAnd here? Picture 3: <img></img>\n<|im_end|>\n"
    )


def test_the_model_that_is_no_chat_model_gets_plain_text(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    qwen_vl.write_tokenizer(RANKS, tmp_path, chat="raw")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.eos_token == "<|endoftext|>"
    shown = found.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert shown == PICTURES


def test_a_tokenizer_that_transformers_saved_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, QWenTokenizer)
    text = f"{qwen_vl.TEXT} <|im_end|> 1023 {PICTURES}"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token == tokenizer.eos_token and again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["IQ== 0", "%%% 1"], "line 2: b'%%% 1' is not a token"),
        (["IQ== 0", "Ig=="], "line 2: b'Ig==' is not a token"),
        (["IQ== 0", "Ig== 2"], "ranks are missing or used twice"),
        (["IQ== 0", "Ig== 0"], "ranks are missing or used twice"),
    ],
)
def test_a_spoilt_vocabulary_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_ranks(str(file))


def test_a_vocabulary_that_changed_is_read_again(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    qwen_vl.write_tokenizer(RANKS, tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    fewer = dict(list(RANKS.items())[:-1])
    (last,) = RANKS.keys() - fewer.keys()
    qwen_vl.write_tokenizer(fewer, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert len(before) == len(after) + 1
    assert len(before.encode(last.decode())) == 1 < len(after.encode(last.decode()))


@pytest.mark.parametrize("trusted", [False, True])
def test_the_configuration_is_a_qwen2_decoder(folder: Path, trusted: bool) -> None:
    found = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    assert isinstance(found, QwenVLConfig)
    text = found.get_text_config()
    assert (text.model_type, text.num_hidden_layers, text.hidden_size) == ("qwen2", 4, 256)
    assert text.intermediate_size == 512, "config.json counts gate and up together"
    assert text.num_key_value_heads == text.num_attention_heads == 4
    assert text.max_position_embeddings == CONFIG["seq_length"]
    assert text.rms_norm_eps == CONFIG["layer_norm_epsilon"] != Qwen2Config().rms_norm_eps
    assert text.rope_parameters["rope_theta"] == CONFIG["rotary_emb_base"] == 5000
    assert (found.image_start_id, found.image_token_id, found.image_tokens) == (START, PAD, 256)
    again = QwenVLConfig.from_dict(found.to_dict())
    assert again.to_dict() == found.to_dict()


def config(**changes: Any) -> QwenVLConfig:
    return QwenVLConfig(**(CONFIG | changes))


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 2049, "trained on, Qwen-VL scales .* set --max-model-len to 2048 or less, it is 2049"),
        ({"use_logn_attn": False}, 2049, "dynamic NTK"),
        ({"use_dynamic_ntk": False}, 2049, "LogN"),
        ({"visual": None}, 1024, "no 'visual' in its config.json"),
        ({"rotary_pct": 0.5}, 1024, "but config.json has rotary_pct 0.5"),
        ({"no_bias": False}, 1024, "no_bias false"),
        ({"kv_channels": 128}, 1024, "kv_channels 128 beside 64"),
    ],
)
def test_what_is_not_served_is_refused(changes: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(**changes), length)


def test_lengths_that_need_no_scaling_are_served() -> None:
    check(config(), 2048)
    plain = config(use_logn_attn=False, use_dynamic_ntk=False)
    check(plain, 8192)
    assert plain.get_text_config().max_position_embeddings == 8192


PROMPTS = st.lists(st.sampled_from((1, 2, START, END, PAD)), max_size=30)


@given(prompt=PROMPTS)
def test_nothing_is_left_between_marks(prompt: list[int]) -> None:
    from vllm_flow.models.qwen_vl_processing import without_content

    left, pairs = without_content(prompt, START, END)
    assert without_content(left, START, END) == (left, pairs)
    assert [token for token in left if token in (1, 2)] == list(_outside(prompt))
    places = sum(two == (START, END) for two in zip(left, left[1:], strict=False))
    assert places == pairs


def _outside(prompt: list[int]) -> Iterator[int]:
    """Text that no pair of marks encloses; a start without an end encloses nothing."""
    at = 0
    while at < len(prompt):
        if prompt[at] == START and END in prompt[at:]:
            at = prompt.index(END, at)
        elif prompt[at] in (1, 2):
            yield prompt[at]
        at += 1


def test_pixels_are_as_published() -> None:
    from vllm_flow.models.qwen_vl_processing import QwenVLImages

    pictures = [picture(1, (200, 300)), picture(2, (400, 90)).convert("L")]
    found = QwenVLImages(qwen_vl.SIDE)(pictures)["pixel_values"]
    expected = REFERENCE(["<img></img>" * 2], pictures, "pt")["pixel_values"]
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_published_prompts_have_between_marks_never_reaches_the_model(folder: Path) -> None:
    """vLLM's processor as the server calls it."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    from vllm_flow.profile.picture_cost import read_config

    processor = MULTIMODAL_REGISTRY.create_processor(read_config(str(folder), max_model_len=1024))
    text, shown = f"The harbour {qwen_vl.MARK} lay quiet", picture(1, (200, 300))
    expected = REFERENCE([text], [shown], "pt")["input_ids"][0].tolist()
    assert expected.count(PAD) == 256
    items = processor.info.parse_mm_data({"image": [shown]})
    asked = ProcessorInputs(REFERENCE.encode(text), items)
    found = processor.apply(asked, TimingContext(enabled=False))
    assert found["prompt_token_ids"] == expected
