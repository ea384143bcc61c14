"""Builds tiny random drafters for the tiny LLaVA checkpoints: EAGLE's head, EAGLE-3's, and a small model.

A random drafter is right once in as many times as there are words. These say one of :data:`SAID` whatever they are
given, by their heads (EAGLE's has none and says it through the target's), so that answers in which nothing else is
allowed accept some drafts and refuse others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine import tiny_llava
from tests.engine.tiny_llava import GAINS, IMAGE_TOKEN_ID, VOCAB_SIZE, Shape, build

SAID = (20, 60, IMAGE_TOKEN_ID)
"""Those of :func:`tests.engine.cases.image_token_as_text`."""
READ_LAYERS = (1, 2, 4)
"""Between which layers EAGLE-3 reads; past cliffs, too."""
SMALL_LAYERS = 2
GUESSES = 3


class Weights:
    """Random parameters of one drafter, at the gains of the target's.

    Args:
        shape: of the target, by its heads.
        said: tokens that a head of its own may say.
    """

    def __init__(
        self, shape: Shape, seed: int, vocab: int = VOCAB_SIZE, said: Sequence[int] = SAID
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.shape, self.vocab, self.said = shape, vocab, list(said)
        self.width = shape.heads * shape.head_dim
        self.found = {"embed_tokens.weight": self._noise(vocab, self.width)}

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        """A matrix whose output has the gain as standard deviation for inputs of unit variance."""
        gain = GAINS.get(name.split(".")[-2], gain)
        self.found[name] = matrix = self._noise(rows, columns) * gain / columns**0.5
        return matrix

    def norm(self, name: str) -> None:
        self.found[name] = 1 + 0.1 * self._noise(self.width)

    def layer(self, prefix: str, inputs: int | None = None) -> None:
        """One decoder layer, whose attention may have wider inputs; no norm before it."""
        width, size = self.width, self.shape.head_dim
        for name, heads in (("q", self.shape.heads), ("k", self.shape.kv_heads)):
            self.matrix(f"{prefix}self_attn.{name}_proj.weight", heads * size, inputs or width)
        self.matrix(f"{prefix}self_attn.v_proj.weight", self.shape.kv_heads * size, inputs or width)
        self.matrix(f"{prefix}self_attn.o_proj.weight", width, width)
        for name in ("gate", "up"):
            self.matrix(f"{prefix}mlp.{name}_proj.weight", 2 * width, width)
        self.matrix(f"{prefix}mlp.down_proj.weight", width, 2 * width)
        self.norm(f"{prefix}post_attention_layernorm.weight")

    def head(self, name: str) -> None:
        """One that says nothing but some words."""
        self.found[name] = torch.zeros(self.vocab, self.width)
        loud = self._noise(len(self.said), self.width) * 4 / self.width**0.5
        self.found[name][self.said] = loud


def _eagle(weights: Weights, target: Path) -> dict[str, Any]:
    weights.layer("layers.0.")
    weights.matrix("fc.weight", weights.width, 2 * weights.width)
    # Through the target's head: what the layer adds is a sum of what makes it say one of the words.
    head = load_file(target / "model.safetensors")["language_model.lm_head.weight"][list(SAID)]
    loud = weights.matrix("loud.weight", len(SAID), 2 * weights.width, gain=40)
    del weights.found["loud.weight"]
    found = (head / head.norm(dim=1, keepdim=True)).T @ loud
    weights.found["layers.0.mlp.down_proj.weight"] = found.contiguous()
    return {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]}


def eagle3(weights: Weights, target: Path | None = None) -> dict[str, Any]:
    """Draws EAGLE-3's head; what its configuration says beside the target's language model."""
    weights.layer("midlayer.", inputs=2 * weights.width)
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm"):
        weights.norm(f"{name}.weight")
    weights.matrix("fc.weight", weights.width, len(READ_LAYERS) * weights.width)
    weights.head("lm_head.weight")
    return {
        "num_hidden_layers": 1,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": weights.vocab,
        "eagle_aux_hidden_state_layer_ids": list(READ_LAYERS),
    }


def small(weights: Weights, target: Path | None = None) -> dict[str, Any]:
    """Draws a small model of text; what its configuration says beside the target's language model."""
    for layer in range(SMALL_LAYERS):
        weights.layer(f"model.layers.{layer}.")
        weights.norm(f"model.layers.{layer}.input_layernorm.weight")
    weights.norm("model.norm.weight")
    weights.head("lm_head.weight")
    weights.found["model.embed_tokens.weight"] = weights.found.pop("embed_tokens.weight")
    return {"num_hidden_layers": SMALL_LAYERS, "architectures": ["LlamaForCausalLM"]}


_KINDS = {"eagle": (_eagle, 77), "eagle3": (eagle3, 78), "draft_model": (small, 79)}
METHODS = tuple(_KINDS)


def drafter(method: str, shape: Shape, root: Path, kv_heads: int | None = None) -> Path:
    """The drafter's checkpoint for the target of a shape, written below ``root`` unless it is there.

    Args:
        kv_heads: where it has other heads for keys than the target.
    """
    own = shape if kv_heads is None else replace(shape, kv_heads=kv_heads)
    where = root / f"{method}-{own.name}"
    if (where / "model.safetensors").exists():
        return where
    where.mkdir(parents=True, exist_ok=True)
    make, seed = _KINDS[method]
    weights = Weights(own, seed)
    config = tiny_llava._text_config(own)
    for name, value in make(weights, build(shape, root)).items():
        setattr(config, name, value)
    config.save_pretrained(where)
    tiny_llava._tokenizer().save_pretrained(where)
    save_file(weights.found, where / "model.safetensors", metadata={"format": "pt"})
    return where


def speculation(
    method: str, shape: Shape, root: Path, kv_heads: int | None = None
) -> dict[str, Any]:
    """``speculative_config`` with such a drafter."""
    return {
        "method": method,
        "model": str(drafter(method, shape, root, kv_heads)),
        "num_speculative_tokens": GUESSES,
    }
