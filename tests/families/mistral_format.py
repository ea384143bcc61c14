"""Pixtral as Mistral publishes it: params.json, one file of weights, and a tokenizer of mistral-common.

transformers has no tower that reads this layout: it is drawn here under the layout's names, and the language
model alone is the reference, from the embeddings that vLLM made. A prompt is a chat that mistral-common
writes, since the picture's tokens come from its tokenizer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from PIL import Image

from tests.families.making import (
    MAX_POSITIONS,
    WORDS,
    Checkpoint,
    drawn,
    linear,
    text_settings,
    write_weights,
)

WIDTH, PATCH, SIDE, LAYERS, FEED = 64, 16, 128, 2, 128
SPECIALS, BYTES, FIRST_WORD = 20, 256, 100
IMAGE = 10
"""The id of [IMG]; those of rows' ends are 12 and 13, as in every tokenizer of this kind."""
WAYS = {"version": "v3", "pattern": r"[^\s]+|\s+", "num_vocab_tokens": BYTES}


def _tokens() -> dict[str, Any]:
    """A token per byte behind the special ones that the format has by itself."""
    vocab = [
        {
            "rank": byte,
            "token_bytes": base64.b64encode(bytes([byte])).decode(),
            "token_str": chr(byte) if byte < 128 else None,
        }
        for byte in range(BYTES)
    ]
    sizes = {"default_vocab_size": BYTES + SPECIALS, "default_num_special_tokens": SPECIALS}
    image = {"image_patch_size": PATCH, "max_image_size": SIDE}
    return {"config": WAYS | sizes, "vocab": vocab, "image": image}


@cache
def _tokenizer() -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    with TemporaryDirectory() as folder:
        file = Path(folder) / "tekken.json"
        file.write_text(json.dumps(_tokens()))
        return MistralTokenizer.from_file(str(file))


def chat(text: str, pictures: Sequence[Image.Image]) -> list[int]:
    """Ids of a user's turn: text with ``[IMG]`` where a picture stands."""
    from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    first, *rest = text.split("[IMG]")
    parts: list[Any] = [TextChunk(text=first)]
    for picture, more in zip(pictures, rest, strict=True):
        parts += [ImageChunk(image=picture), TextChunk(text=more)]
    request = ChatCompletionRequest(messages=[UserMessage(content=parts)])
    ids: list[int] = _tokenizer().encode_chat_completion(request).tokens
    return ids


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_conv.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_encoder.ln_pre.weight": (WIDTH,),
        **linear("vision_language_adapter.w_in", hidden, WIDTH),
        **linear("vision_language_adapter.w_out", hidden, hidden),
    }
    for layer in range(LAYERS):
        name = f"vision_encoder.transformer.layers.{layer}."
        for part in ("wq", "wk", "wv", "wo"):
            shapes |= linear(f"{name}attention.{part}", WIDTH, WIDTH, bias=False)
        for part, rows, columns in (("w1", FEED, WIDTH), ("w2", WIDTH, FEED), ("w3", FEED, WIDTH)):
            shapes |= linear(f"{name}feed_forward.{part}", rows, columns, bias=False)
        shapes |= {f"{name}{part}_norm.weight": (WIDTH,) for part in ("attention", "ffn")}
    return drawn(shapes, 3)


NAMES = {
    "lm_head.": "output.",
    "model.embed_tokens.": "tok_embeddings.",
    "model.": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.": "attention.",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def as_mistral(model: Any) -> dict[str, torch.Tensor]:
    """transformers' weights in Mistral's layout, whose rotary pairs are neighbours."""
    found = {}
    for name, value in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:
            rows = value.view(-1, 2, model.config.head_dim // 2, value.shape[-1])
            value = rows.transpose(1, 2).reshape(value.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        for part in "qkvo":
            name = name.replace(f"{part}_proj", f"w{part}")
        found[name] = value
    return found


def _write(model: Any, where: Path) -> None:
    text = model.config
    weights = _tower(text.hidden_size) | as_mistral(model)
    write_weights(weights, where / "consolidated.safetensors")
    (where / "tekken.json").write_text(json.dumps(_tokens()))
    params = dict(
        dim=text.hidden_size,
        n_layers=text.num_hidden_layers,
        head_dim=text.head_dim,
        hidden_dim=text.intermediate_size,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        rope_theta=10000.0,
        norm_eps=text.rms_norm_eps,
        vocab_size=text.vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        vision_encoder=dict(
            hidden_size=WIDTH,
            num_channels=3,
            image_size=SIDE,
            patch_size=PATCH,
            rope_theta=10000.0,
            intermediate_size=FEED,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            adapter_bias=True,
            image_token_id=IMAGE,
        ),
    )
    (where / "params.json").write_text(json.dumps(params, indent=1))


def pixtral_mistral() -> Checkpoint:
    vocab = {word: SPECIALS + FIRST_WORD + index for index, word in enumerate(WORDS)}
    config = hf.MistralConfig(
        **text_settings(vocab, head_dim=32, sliding_window=None, vocab_size=BYTES + SPECIALS)
    )
    return Checkpoint(
        model=hf.MistralForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="[IMG]",
        image_ids=(IMAGE,),
        sizes=((SIDE, SIDE), (64, 96)),
        decoder=lambda model: model.model,
        options={"tokenizer_mode": "mistral"},
        write=_write,
        write_ids=chat,
    )
