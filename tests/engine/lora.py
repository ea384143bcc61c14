"""Tiny random LoRA adapters as PEFT writes them, and the checkpoints that they merge into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GAIN = 0.5
"""Of an adapter's addition, relative to a weight's own output."""


def write_adapter(
    model_dir: Path,
    where: Path,
    seed: int,
    decoder: str = "language_model.",
    targets: Sequence[str] = TARGETS,
) -> tuple[Path, Path]:
    """An adapter of every projection of the decoder, and the checkpoint with it merged in: two folders.

    Args:
        decoder: what names of its weights begin with.
        targets: the last parts of its projections' names.
    """
    adapter, merged = where / f"adapter-{seed}", where / f"merged-{seed}"
    if adapter.exists():
        return adapter, merged
    adapter.mkdir(parents=True)
    shutil.copytree(model_dir, merged)
    weights = load_file(model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in sorted(weights.items()):
        module = name.removesuffix(".weight")
        if not (name.startswith(decoder) and module.endswith(tuple(targets))):
            continue
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) * GAIN / ALPHA * RANK**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        weights[name] = weight + up @ down * (ALPHA / RANK)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets)}
    config |= {"bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, merged
