"""Qwen2.5-Omni and Qwen3-Omni: the part that sees, hears and writes, asked about pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families.making import Checkpoint, text_settings, tokenizer
from tests.families.qwen import DEEPSTACK_TOWER, INTERLEAVED, ROPE

SOUND = dict(
    num_mel_bins=128,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    d_model=64,
    output_dim=128,
)
"""Of a tower that nobody asks."""


def _write(processor: Any, architecture: str, model: Any, where: Path) -> None:
    """The part alone: the published file holds one that speaks, too, which vLLM leaves out."""
    model.save_pretrained(where)
    file = where / "model.safetensors"
    weights = {f"thinker.{name}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    thinker = json.loads((where / "config.json").read_text())
    config = dict(
        architectures=[architecture],
        model_type=thinker["model_type"].removesuffix("_thinker"),
        enable_audio_output=False,
        thinker_config=thinker | {"dtype": "float32"},
        dtype="float32",
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    processor.save_pretrained(where)


def _omni(
    kind: str, named: dict[str, str], text: dict[str, Any], tower: dict[str, Any]
) -> Checkpoint:
    made, vocab = tokenizer(tuple(named.values()), named)
    patch = tower["patch_size"]
    ids = {name: vocab[named[f"{name}_token"]] for name in ("image", "video", "audio")}
    suffix = "index" if kind == "Qwen2_5Omni" else "id"
    config = getattr(hf, f"{kind}ThinkerConfig")(
        text_config=text_settings(vocab, **text),
        vision_config=tower,
        audio_config=SOUND,
        audio_start_token_id=vocab[named["audio_bos_token"]],
        audio_end_token_id=vocab[named["audio_eos_token"]],
        vision_start_token_id=vocab[named["vision_bos_token"]],
        vision_end_token_id=vocab[named["vision_eos_token"]],
        tie_word_embeddings=False,
        **{f"{name}_token_{suffix}": found for name, found in ids.items()},
    )
    unit = 2 * patch
    size = {"shortest_edge": unit * unit, "longest_edge": unit * unit * 200}
    pictures = dict(patch_size=patch, size=size)
    processor = getattr(hf, f"{kind}Processor")(
        image_processor=hf.Qwen2VLImageProcessor(**pictures),
        video_processor=hf.Qwen2VLVideoProcessor(**pictures),
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=128),
        tokenizer=made,
    )
    seen = f"{named['vision_bos_token']}{named['image_token']}{named['vision_eos_token']}"
    return Checkpoint(
        model=getattr(hf, f"{kind}ThinkerForConditionalGeneration")(config),
        processor=processor,
        vocab=vocab,
        image=seen,
        image_ids=(ids["image"],),
        sizes=((7 * unit, 6 * unit), (6 * unit, 4 * unit)),
        decoder=lambda model: model.model,
        options={"limit_mm_per_prompt": {"image": 2, "video": 0, "audio": 0}},
        write=partial(_write, processor, f"{kind}ForConditionalGeneration"),
    )


def qwen2_5_omni() -> Checkpoint:
    named = dict(
        image_token="<|IMAGE|>",
        video_token="<|VIDEO|>",
        audio_token="<|AUDIO|>",
        vision_bos_token="<|vision_bos|>",
        vision_eos_token="<|vision_eos|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
    )
    tower = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=128,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[1],
    )
    text = dict(rope_parameters=dict(ROPE, mrope_section=[4, 6, 6]))
    return _omni("Qwen2_5Omni", named, text, tower)


def qwen3_omni() -> Checkpoint:
    """A mixture of experts, with features injected into the first three of six layers."""
    named = dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        audio_token="<|audio_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
        audio_bos_token="<|audio_start|>",
        audio_eos_token="<|audio_end|>",
    )
    text = dict(
        head_dim=32,
        num_hidden_layers=6,
        rope_parameters=INTERLEAVED,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )
    tower = dict(
        DEEPSTACK_TOWER,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        image_size=128,  # of the table of positions, 8 x 8
        apply_vit_abs_pos_embed=True,
    )
    return _omni("Qwen3OmniMoe", named, text, tower)
