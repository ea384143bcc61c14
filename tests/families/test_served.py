"""Model classes of our own over HTTP, with a policy: the published layout, a chat, the oracle's tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import oracle
from tests.families.making import Checkpoint, picture, words
from tests.families.running import TIE
from tests.server.requests import CHAT, data_url, with_policy
from tests.server.serving import NAME, serve

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nPicture 1: <img></img>\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = {"qwen_vl": CHATML}
"""What a chat becomes where the checkpoint brings its template; else it is served with `TEMPLATE`."""
CLIFF = 2


@pytest.mark.skipif("VLLM_FLOW_FAMILIES" not in os.environ, reason="make test-families")
@pytest.mark.parametrize("name", ["instructblip", "shikra", "qwen_vl"])
def test_a_chat_about_a_picture_is_exact(
    name: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name)
    shown, question = picture(1, checkpoint.sizes[0]), words(7, 501)
    part = {"type": "image_url", "image_url": {"url": data_url(shown)}}
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "add_special_tokens": True,
        "allowed_token_ids": checkpoint.word_ids,
        "return_token_ids": True,
    }
    arguments = [
        *("--max-model-len", "512", "--kv-cache-memory-bytes", str(16 << 20)),
        *("--limit-mm-per-prompt", json.dumps({"image": 1}), "--skip-mm-profiling"),
        *(() if name in PROMPTS else ("--chat-template", TEMPLATE)),
        *("--additional-config", json.dumps({"vllm_flow": {"group_layers": 2}})),
    ]
    with serve(checkpoint.where, arguments, tmp_path / "server.log") as server:
        found = server.post(CHAT, with_policy(body, CLIFF)).json()
    text = PROMPTS.get(name, f"{checkpoint.image}\n{{question}}".strip()).format(question=question)
    prompt = oracle.encode(checkpoint, text, (shown,))
    assert found["prompt_token_ids"] == prompt.ids
    tokens = found["choices"][0]["token_ids"]
    assert len(tokens) == 8
    expected = oracle.logprobs(checkpoint, prompt, tokens[:-1], CLIFF)
    best = expected[:, checkpoint.word_ids].max(1).values
    assert float((best - expected[range(8), tokens]).max()) <= TIE
    full = oracle.logprobs(checkpoint, prompt, tokens[:-1], checkpoint.num_layers)
    assert float((full - expected).abs().max()) > 0.01, "the picture hardly matters"
