"""Layers of multi-token prediction, put behind tiny checkpoints: what they propose is right now and then."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file

from tests.families.making import Checkpoint

OF_MODEL = "model.language_model.layers."


def qwen3_5(checkpoint: Checkpoint, where: Path) -> Checkpoint:
    """A copy with Qwen3.5's layer for drafts: one that attends, like the model's last one, behind a projection."""
    found, own = _begin(checkpoint, where, "mtp_num_hidden_layers", "mtp.layers.0.")
    generator = torch.Generator().manual_seed(85)
    width = found["lm_head.weight"].shape[1]
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        own[f"mtp.{name}.weight"] = torch.zeros(width)
    own["mtp.fc.weight"] = torch.randn(width, 2 * width, generator=generator) / (2 * width) ** 0.5
    _speak(checkpoint, found, own, "mtp.layers.0.", generator, loud=20)
    return _end(checkpoint, where, found | own)


def glm_ocr(checkpoint: Checkpoint, where: Path) -> Checkpoint:
    """A copy with GLM-OCR's: numbered behind the decoder's layers, like those but for what is said of it."""
    layer = f"{OF_MODEL}{checkpoint.num_layers}."
    found, own = _begin(checkpoint, where, "num_nextn_predict_layers", layer)
    generator = torch.Generator().manual_seed(84)
    width = found["lm_head.weight"].shape[1]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        own[f"{layer}{name}.weight"] = torch.ones(width)
    noise = torch.randn(width, 2 * width, generator=generator)
    own[f"{layer}eh_proj.weight"] = noise / (2 * width) ** 0.5
    _speak(checkpoint, found, own, layer, generator)
    own[f"{layer}post_mlp_layernorm.weight"] *= 20  # as loudly: it lets through what the MLP adds
    return _end(checkpoint, where, found | own)


Tensors = dict[str, torch.Tensor]


def _begin(
    checkpoint: Checkpoint, where: Path, setting: str, layer: str
) -> tuple[Tensors, Tensors]:
    """Copies a checkpoint and says in it that it has such a layer.

    Returns:
        What it holds, and the same as its last layer under the new one's name.
    """
    copytree(checkpoint.where, where)
    path = where / "config.json"
    config = json.loads(path.read_text())
    config["text_config"][setting] = 1
    path.write_text(json.dumps(config))
    found = load_file(where / "model.safetensors")
    last = f"{OF_MODEL}{checkpoint.num_layers - 1}."
    own = {
        f"{layer}{name.removeprefix(last)}": value.clone()
        for name, value in found.items()
        if name.startswith(last)
    }
    return found, own


def _speak(
    checkpoint: Checkpoint,
    found: Tensors,
    own: Tensors,
    layer: str,
    generator: torch.Generator,
    loud: float = 1,
) -> None:
    """Through the model's head the layer says one of the words, by what its MLP adds."""
    head = found["lm_head.weight"][checkpoint.word_ids]
    down = f"{layer}mlp.down_proj.weight"
    said = loud * torch.randn(len(head), own[down].shape[1], generator=generator)
    own[down] = ((head / head.norm(dim=1, keepdim=True)).T @ said).contiguous()


def _end(checkpoint: Checkpoint, where: Path, weights: Tensors) -> Checkpoint:
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    copied = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.init}
    return type(checkpoint)(**copied | {"where": where})
