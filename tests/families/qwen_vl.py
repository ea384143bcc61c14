"""Qwen-VL's published layout with a tiny vocabulary: ``qwen.tiktoken``, and code beside it that must not run."""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.families.making import MAX_POSITIONS, WORDS, Checkpoint
from tests.families.qwen_vl_reference import QwenVLReference, ReferenceProcessor

TEXT = """The harbour lay quiet before the morning boats returned, and nobody walked along the wall but the
keeper of the light. She counted the lamps, wrote their number into the book beside the door, and looked out
over the grey water, where the first sails came out of the mist one after another. When the bell rang, children
ran down from the houses to see what had been caught; baskets were carried past the chapel, weighed, and sold
before the sun had reached the roofs. Picture after picture of such days hangs in the narrow hall of the inn,
of 1021, 1022, 1023 and 1024."""
"""Also numbers: the vocabulary has pairs of digits, which no text may become."""

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
SIDE, PATCH, WIDTH = 336, 14, 64
MARK = "Picture 1: <img>https://pictures.example/harbour.jpg</img>"
"""As published prompts have it; the URL is the one of nothing."""
REMOTE = 'raise RuntimeError("code of the checkpoint ran")\n'


def ranks() -> dict[bytes, int]:
    """Byte pairs of ``TEXT``: 256 bytes, then merges, in the published order."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    shown = {shown: byte for byte, shown in bytes_shown().items()}
    vocab = made.get_vocab()
    return {
        bytes(shown[char] for char in token): vocab[token] for token in sorted(vocab, key=vocab.get)
    }


def bytes_shown() -> dict[int, str]:
    """Byte -> the character that byte-level vocabularies show for it: itself, or one past 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def config_of(tokens: int) -> dict[str, Any]:
    """``config.json`` as published, for a vocabulary of ``tokens`` ordinary ones.

    Epsilon and rotary base are others, so that one that is not read is seen.
    """
    return dict(
        architectures=["QWenLMHeadModel"],
        attn_dropout_prob=0.0,
        auto_map={
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        bf16=False,
        emb_dropout_prob=0.0,
        fp16=False,
        fp32=True,
        hidden_size=256,
        initializer_range=0.02,
        intermediate_size=1024,
        kv_channels=64,
        layer_norm_epsilon=0.05,
        max_position_embeddings=8192,
        model_type="qwen",
        no_bias=True,
        num_attention_heads=4,
        num_hidden_layers=4,
        onnx_safe=None,
        rotary_emb_base=5000,
        rotary_pct=1.0,
        scale_attn_weights=True,
        seq_length=MAX_POSITIONS,
        tie_word_embeddings=False,
        tokenizer_type="QWenTokenizer",
        torch_dtype="float32",
        transformers_version="4.31.0",
        use_cache=True,
        use_dynamic_ntk=True,
        use_flash_attn="auto",
        use_logn_attn=True,
        visual=dict(
            heads=2,
            image_size=SIDE,
            image_start_id=tokens + SPECIALS.index("<img>"),
            layers=2,
            mlp_ratio=4.9231,
            output_dim=256,
            patch_size=PATCH,
            width=WIDTH,
        ),
        vocab_size=-(-(tokens + len(SPECIALS)) // 64) * 64,
    )


def write_tokenizer(vocab: dict[bytes, int], where: Path, chat: str = "chatml") -> None:
    """Everything published but configuration and weights."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in vocab.items()]
    (where / "qwen.tiktoken").write_text("".join(lines))
    config = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (where / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {
        "chat_format": chat,
        "eos_token_id": len(vocab),
        "pad_token_id": len(vocab),
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.5,
        "transformers_version": "4.31.0",
    }
    (where / "generation_config.json").write_text(json.dumps(generation))
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (where / f"{name}.py").write_text(REMOTE)


def _write(vocab: dict[bytes, int], config: dict[str, Any], model: Any, where: Path) -> None:
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    (where / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(vocab, where)


def qwen_vl() -> Checkpoint:
    """256 tokens a picture, whose patches are more than the learned positions."""
    vocab = ranks()
    config = config_of(len(vocab))
    # A word of the other tests has digits, which are tokens of their own: an answer is made of these.
    longer = [rank for token, rank in vocab.items() if len(token) > 1]
    return Checkpoint(
        model=QwenVLReference(config),
        processor=ReferenceProcessor(vocab, SPECIALS, SIDE),
        vocab=dict(zip(WORDS, longer, strict=False)),
        image=MARK,
        image_ids=(len(vocab) + SPECIALS.index("<imgpad>"),),
        sizes=((SIDE, SIDE), (200, 300)),
        decoder=lambda model: model.transformer,
        options={
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 128 << 20,
            "trust_remote_code": True,
        },
        write=partial(_write, vocab, config),
    )
