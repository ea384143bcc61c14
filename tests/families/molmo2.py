"""Molmo 2: the picture whole and its tiles, which see one another in both directions, around Qwen3 or OLMo 3.

transformers has no class for the layout: tower and pooling are drawn here under the checkpoint's names, and the
language model alone is the reference, from the embeddings that vLLM made, with the masks of `mutual_ranges`. Such a
checkpoint brings its configuration and processor as code; these are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import decoders

from tests.families.making import (
    BASE,
    MAX_POSITIONS,
    WORDS,
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    write_weights,
)
from tests.families.molmo import MORE, as_molmo, write_with_code
from tests.families.molmo2_code import CONFIGURATION, PROCESSING
from tests.word_tokenizer import word_tokenizer

WIDTH, PATCH, SIDE, LAYERS, HIDDEN, FEED = 64, 14, 56, 3, 128, 256
IMAGE, VIDEO = "<|image|>", "<|video|>"
SMALL, START, END, FRAME, FRAME_END = (
    *("<low_res_im_start>", "<im_start>", "<im_end>"),
    *("<frame_start>", "<frame_end>"),
)
OTHERS = ("<im_patch>", "<im_col>", "<im_low>")
MARKS = (SMALL, START, END, FRAME, FRAME_END, *OTHERS)
"""What a picture is made of: in vLLM embeddings, all of them."""
PARTS = {
    **dict.fromkeys(("att_proj", "attn_out", "q_norm", "k_norm"), "self_attn"),
    **dict.fromkeys(("ff_proj", "ff_out"), "mlp"),
}
"""Part of a layer -> the module that has it."""


def mutual_ranges(vocab: Mapping[str, int], ids: Sequence[int]) -> list[tuple[int, int]]:
    """What of a prompt sees itself in both directions: a picture, small and in tiles, or one frame of a video."""
    small, end, frame, frame_end = (vocab[word] for word in (SMALL, END, FRAME, FRAME_END))
    found = []
    for start, token in enumerate(ids):
        if token == small:
            of_small = ids.index(end, start)
            found.append((start, ids.index(end, of_small + 1) + 1))
        elif token == frame:
            found.append((start, ids.index(frame_end, start) + 1))
    return found


def _tower() -> dict[str, torch.Tensor]:
    """Tower, pooling and projector, under the names of the layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "image_vit.positional_embedding": ((SIDE // PATCH) ** 2, WIDTH),
        **linear("image_vit.patch_embedding", WIDTH, 3 * PATCH**2),
        **linear("image_projector.w1", FEED, WIDTH, bias=False),
        **linear("image_projector.w3", FEED, WIDTH, bias=False),
        **linear("image_projector.w2", HIDDEN, FEED, bias=False),
    }
    attentions = {f"image_vit.transformer.resblocks.{n}.attention": WIDTH for n in range(LAYERS)}
    for name, columns in {**attentions, "image_pooling_2d": 2 * WIDTH}.items():
        for part in ("wq", "wk", "wv"):
            shapes |= linear(f"{name}.{part}", WIDTH, columns)
        shapes |= linear(f"{name}.wo", WIDTH, WIDTH)
    for layer in range(LAYERS):
        name = f"image_vit.transformer.resblocks.{layer}."
        shapes |= linear(f"{name}feed_forward.w1", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{name}feed_forward.w2", WIDTH, 2 * WIDTH)
        shapes |= norm(f"{name}attention_norm", WIDTH) | norm(f"{name}ffn_norm", WIDTH)
    return {f"model.vision_backbone.{name}": value for name, value in drawn(shapes, 3).items()}


def as_molmo2(name: str) -> str:
    """A weight's name in Molmo's layout -> in Molmo 2's, whose layers have modules."""
    if name.startswith("model.transformer.ff_out."):
        return name.replace("model.transformer.ff_out", "lm_head")
    front, part, last = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", name)
    return f"{front}.{PARTS[part]}.{part}.{last}" if part in PARTS else name


def _write(
    made: Any, vocab: Mapping[str, int], more: dict[str, Any], model: Any, where: Path
) -> None:
    text = model.config
    weights = {
        as_molmo2(name): value
        for name, value in as_molmo(model, norm_after=more["norm_after"]).items()
    }
    write_weights(weights | _tower(), where / "model.safetensors")
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=WIDTH // 2)
    config = dict(
        architectures=["Molmo2ForConditionalGeneration"],
        model_type="molmo2",
        auto_map={"AutoConfig": "configuration_molmo2.Molmo2Config"},
        text_config=dict(
            model_type="molmo2_text",
            vocab_size=text.vocab_size - MORE,
            additional_vocab_size=MORE,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            max_position_embeddings=MAX_POSITIONS,
            layer_norm_eps=text.rms_norm_eps,
            hidden_act="silu",
            qkv_bias=False,
            use_qk_norm=True,
            tie_word_embeddings=False,
            torch_dtype="float32",
        )
        | more,
        vit_config=dict(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            image_default_input_size=(SIDE, SIDE),
            image_patch_size=PATCH,
            image_num_pos=(SIDE // PATCH) ** 2,
        )
        | heads,
        adapter_config=dict(
            vit_layers=(-1, -3),
            pooling_attention_mask=True,
            hidden_size=WIDTH,
            hidden_act="silu",
            intermediate_size=FEED,
            text_hidden_size=HIDDEN,
        )
        | heads,
        low_res_image_start_token_id=vocab[SMALL],
        image_start_token_id=vocab[START],
        image_end_token_id=vocab[END],
        frame_start_token_id=vocab[FRAME],
        frame_end_token_id=vocab[FRAME_END],
        **dict(
            zip(
                ("image_patch_id", "image_col_id", "image_low_res_id"),
                map(vocab.__getitem__, OTHERS),
                strict=True,
            )
        ),
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    write_with_code("Molmo2", made, config, (CONFIGURATION, PROCESSING), where)


def _molmo2(kind: str, settings: dict[str, Any], more: dict[str, Any]) -> Checkpoint:
    """The picture's tokens stand in the second table of embeddings, which the output layer has no rows for."""
    known = (*BASE, *WORDS)
    vocab = {word: index for index, word in enumerate((*known, *MARKS, IMAGE, VIDEO))}
    made = word_tokenizer(
        vocab,
        (*BASE, *MARKS, IMAGE, VIDEO),
        {},
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
    )
    # A video's tokens go through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    usual = dict(vocab_size=len(known) + MORE, rms_norm_eps=1e-5)
    config = getattr(hf, f"{kind}Config")(**text_settings(vocab, **usual, **settings))
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    model.lm_head = torch.nn.Linear(HIDDEN, len(known), bias=False)
    return Checkpoint(
        model=model,
        processor=None,
        vocab=vocab,
        image=IMAGE,
        image_ids=tuple(vocab[word] for word in MARKS),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True, "disable_chunked_mm_input": True},
        write=partial(_write, made, vocab, more),
        attention="TRITON_ATTN",
        mutual=partial(mutual_ranges, vocab),
    )


def molmo2_qwen3() -> Checkpoint:
    """Molmo2-4B and 8B."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    settings = dict(head_dim=HIDDEN // 4, rope_parameters=rope)
    more = dict(norm_after=False, qk_norm_type="qwen3", rope_theta=5000.0, rope_parameters=rope)
    return _molmo2("Qwen3", settings, more | {"rope_scaling_layers": None})


def molmo2_video() -> Checkpoint:
    """The same, asked about videos, each frame of which sees itself."""
    return replace(molmo2_qwen3(), video=VIDEO)


def molmo2_olmo3() -> Checkpoint:
    """Molmo2-O-7B: norms after attention and MLP, and of queries and keys across heads; layers without a residual, of
    which some have positions scaled."""
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    scaled = plain | {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": MAX_POSITIONS // 4,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    # No layer of vLLM's has a window: one here is wider than any prompt.
    settings = dict(
        rope_parameters={kinds[0]: plain, kinds[1]: scaled},
        layer_types=kinds,
        sliding_window=MAX_POSITIONS,
    )
    more = dict(norm_after=True, qk_norm_type="olmo", rope_theta=5000.0, rope_parameters=scaled)
    layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return _molmo2("Olmo3", settings, more | {"rope_scaling_layers": layers})
