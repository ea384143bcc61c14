"""H2OVL-Mississippi and NVLM-D: InternVL's layout with tiles of their own.

As in `internvl_chat`, the language model alone is the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families import internvl_chat
from tests.families.internvl_chat import LAYERS, SIDE, WIDTH
from tests.families.making import Checkpoint, drawn, linear, norm, text_settings, tokenizer

SPARE_HEADS = 7
"""vLLM gives NVLM-D's tower so many more heads than the configuration says, as the checkpoint has them."""
TILES = tuple(f"<tile_{number}>" for number in range(1, 7))
NVLM_MARKS = ("<Image>", "</Image>", "<|vision_pad|>", "<tile_global_thumbnail>", *TILES)


def _write(made: Any, architecture: str, model: Any, where: Path) -> None:
    internvl_chat.write(made, False, architecture, model, where)
    config = json.loads((where / "config.json").read_text()) | {"use_msac": True}
    if architecture == "NVLM_D":
        file = where / "model.safetensors"
        rows = (2 + SPARE_HEADS) * WIDTH // 2
        hidden, inner = model.config.hidden_size, model.config.intermediate_size
        shapes = (
            norm("mlp1.0", 4 * WIDTH)
            | linear("mlp1.1", inner, 4 * WIDTH, bias=False)
            | linear("mlp1.3", hidden, inner, bias=False)
        )
        for layer in range(LAYERS):
            attention = f"vision_model.encoder.layers.{layer}.attn."
            shapes |= linear(f"{attention}qkv", 3 * rows, WIDTH)
            shapes |= {f"{attention}proj.weight": (WIDTH, rows)}
        kept = {key: value for key, value in load_file(file).items() if "mlp1." not in key}
        save_file(kept | drawn(shapes, 5), file, metadata={"format": "pt"})
    (where / "config.json").write_text(json.dumps(config, indent=1))


def h2ovl() -> Checkpoint:
    """Two sets of tiles of one picture, and one of each where there are more."""
    made = internvl_chat.chat("Llama")
    return replace(made, write=partial(_write, made.saved, "H2OVLChatModel"))


def nvlm_d() -> Checkpoint:
    made, vocab = tokenizer((*NVLM_MARKS, "<image>", "\n"))
    config = hf.Qwen2Config(architectures=["Qwen2ForCausalLM"], **text_settings(vocab))
    return Checkpoint(
        model=hf.Qwen2ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<image>\n",
        image_ids=(vocab["<|vision_pad|>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, "NVLM_D"),
    )
