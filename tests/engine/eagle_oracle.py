"""What EAGLE's head must propose first: its one layer over the target's last hidden states, by Hugging Face's modules.

Rows of image tokens that have left the target reach it as zeros. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tests.engine import kept_oracle, oracle


@torch.inference_mode()
def last_hidden(
    model_dir: Path, prompt: oracle.Prompt, output: Sequence[int], cliff: int, late: bool
) -> torch.Tensor:
    """[T, D] after the final norm, zeros where rows have left; none have that leave after the prefill."""
    model, _ = oracle.load(model_dir)
    kept: list[torch.Tensor] = []
    hook = model.model.language_model.norm.register_forward_hook(
        lambda _module, _args, result: kept.append(result[0])
    )
    try:
        if late:
            kept_oracle.forward_late(model_dir, prompt, output, f"{cliff}:0")
        else:
            oracle.forward_removed(model_dir, prompt, output, cliff)
    finally:
        hook.remove()
    if late:
        return kept[0]
    is_text_T = ~torch.tensor([*prompt.is_image_T, *[False] * len(output)])
    alive_T = is_text_T if cliff < oracle.num_layers(model_dir) else torch.ones_like(is_text_T)
    found_TD = torch.zeros(len(alive_T), kept[0].shape[-1])
    found_TD[alive_T] = kept[0]
    return found_TD


@torch.inference_mode()
def first_drafts(
    model_dir: Path,
    drafter: Path,
    prompt: str,
    images: Sequence[Image.Image],
    cliff: int | None,
    token_ids: Sequence[int],
    late: bool = False,
) -> list[tuple[int, float]]:
    """For each token of an answer but the last, the draft that follows it, and how far it leads in logits.

    Args:
        token_ids: the answer.
        late: image tokens leave after the prefill.
    """
    model, _ = oracle.load(model_dir)
    encoded = oracle.encode(model_dir, prompt, images)
    depth = oracle.num_layers(model_dir) if cliff is None else cliff
    hidden_TD = last_hidden(model_dir, encoded, token_ids[:-1], depth, late)
    config, weights = AutoConfig.from_pretrained(drafter), load_file(drafter / "model.safetensors")
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0)
    layer.input_layernorm = nn.Identity()
    prefix = "layers.0."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    layer.load_state_dict(own)
    # Beside each hidden state the token that it was found to lead to.
    next_T = torch.tensor([*encoded.ids, *token_ids])[1:]
    embedded_TD = weights["embed_tokens.weight"][next_T]
    given_TD = torch.cat((embedded_TD, hidden_TD), dim=-1) @ weights["fc.weight"].T
    positions = torch.arange(len(given_TD))[None]
    found_TD = layer(
        given_TD[None],
        attention_mask=oracle.causal(len(given_TD)),
        position_ids=positions,
        position_embeddings=LlamaRotaryEmbedding(config)(given_TD[None], positions),
    )[0]
    top = model.lm_head(found_TD[len(encoded.ids) - 1 :]).topk(2)
    gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
    return list(zip(top.indices[:, 0].tolist(), gaps, strict=True))
