"""Qwen3.5's layer of multi-token prediction, put behind a tiny checkpoint: what it proposes is right now and then."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file

from tests.families.making import Checkpoint


def with_next_token_layer(checkpoint: Checkpoint, where: Path) -> Checkpoint:
    """A copy with Qwen3.5's layer for drafts: one that attends, like the model's last one, behind a projection."""
    copytree(checkpoint.where, where)
    path = where / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    path = where / "model.safetensors"
    found = load_file(path)
    last = f"model.language_model.layers.{checkpoint.num_layers - 1}."
    own = {
        f"mtp.layers.0.{name.removeprefix(last)}": value.clone()
        for name, value in found.items()
        if name.startswith(last)
    }
    generator = torch.Generator().manual_seed(85)
    width = found["lm_head.weight"].shape[1]
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        own[f"mtp.{name}.weight"] = torch.zeros(width)
    own["mtp.fc.weight"] = torch.randn(width, 2 * width, generator=generator) / (2 * width) ** 0.5
    # Through the model's head it says one of the words, by what its MLP adds, loudly.
    head = found["lm_head.weight"][checkpoint.word_ids]
    down = "mtp.layers.0.mlp.down_proj.weight"
    loud = 20 * torch.randn(len(head), own[down].shape[1], generator=generator)
    own[down] = ((head / head.norm(dim=1, keepdim=True)).T @ loud).contiguous()
    save_file(found | own, path, metadata={"format": "pt"})
    copied = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.init}
    return type(checkpoint)(**copied | {"where": where})
