"""Intern-S2: Qwen3.5 with experts by other names, without its time series; in Mobius layers take turns at few banks of
experts.

transformers has no class for them: Qwen3.5's is the reference, its layers sharing experts where Mobius's do.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families.making import Checkpoint
from tests.families.qwen import qwen3_5_moe

BANKS = 2
CONFIGURATION = """
from transformers import Qwen3_5MoeConfig


class InternS2Config(Qwen3_5MoeConfig):
    model_type = "{kind}"
"""
"""Such a checkpoint brings its configuration class; this one is ours."""


def _in_banks(name: str) -> str:
    """Name of a layer's weight in Mobius, where those that layers share have one name."""
    found = re.search(r"layers\.(\d+)\.mlp\.((experts|gate)\..*)", name)
    if found is None:
        return name
    return name.replace(found[0], f"meta_mlp.{int(found[1]) % BANKS}.{found[2]}")


def _write(processor: Any, architecture: str, kind: str, model: Any, where: Path) -> None:
    model.config.dtype = torch.float32
    model.config.save_pretrained(where)
    banks = kind == "interns2_mobius"
    weights = {
        _in_banks(name) if banks else name: value.detach().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(where)
    config = json.loads((where / "config.json").read_text()) | dict(
        architectures=[architecture],
        model_type=kind,
        auto_map={"AutoConfig": "configuration_intern_s2.InternS2Config"},
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_intern_s2.py").write_text(CONFIGURATION.format(kind=kind))


def _intern_s2(made: Checkpoint, architecture: str, kind: str) -> Checkpoint:
    write = partial(_write, made.processor, architecture, kind)
    # Words louder than what layers add: less of rounding is passed on from layer to layer.
    return replace(made, options={"trust_remote_code": True}, write=write, embeddings=2.0)


def interns2_preview() -> Checkpoint:
    architecture = "InternS2PreviewForConditionalGeneration"
    return _intern_s2(qwen3_5_moe(), architecture, "intern_s2_preview")


def interns2_mobius() -> Checkpoint:
    # All experts of a bank: where two are about as good, float32 would choose either.
    made = qwen3_5_moe(num_experts_per_tok=4, num_blocks=BANKS)
    layers = made.decoder(made.model).layers
    for index, layer in enumerate(layers):
        bank = layers[index % BANKS].mlp
        layer.mlp.experts, layer.mlp.gate = bank.experts, bank.gate
    return _intern_s2(made, "InternS2MobiusForConditionalGeneration", "interns2_mobius")
