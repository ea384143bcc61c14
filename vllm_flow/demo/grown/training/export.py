"""Turns a finished work folder into adapters in bfloat16, and into a checkpoint that vLLM loads.

``python -m vllm_flow.demo.grown.training.export --work DIR --weights DIR --checkpoint DIR``; either may be
left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vllm_flow.demo.checkpoint import llava_weights, merge_lora, write_checkpoint
from vllm_flow.demo.grown.tower import TOWER_CONFIG
from vllm_flow.demo.grown.training.budget import Budget
from vllm_flow.demo.smollm2 import read_decoder, read_tokenizer
from vllm_flow.demo.training.common import load, save

ADAPTERS = {
    "vision.safetensors": "vision.safetensors",
    "projector.safetensors": "projector_tuned.safetensors",
    "lora.safetensors": "lora.safetensors",
}
"""Exported name -> stage file."""
LIMIT = 14_000_000
"""Bytes that the adapters may take in all: they are to be committed."""


def write_adapters(work: Path, out: Path) -> int:
    """Write the adapters in bfloat16; returns their bytes. ValueError where they are over ``LIMIT``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, stage_file in ADAPTERS.items():
        save(out / name, load(work / stage_file), torch.bfloat16)
    size = sum((out / name).stat().st_size for name in ADAPTERS)
    if size > LIMIT:
        raise ValueError(f"the adapters take {size} bytes, more than {LIMIT}: make them smaller")
    return size


def write_model(work: Path, out: Path) -> None:
    """Write the whole LLaVA checkpoint, LoRA merged, as it will be assembled from the adapters."""
    decoder = read_decoder()
    parts = {
        name: {k: v.to(torch.bfloat16).float() for k, v in load(work / stage_file).items()}
        for name, stage_file in ADAPTERS.items()
    }
    merged = merge_lora(decoder.weights, parts["lora.safetensors"], Budget().lora_alpha)
    weights = llava_weights(parts["vision.safetensors"], parts["projector.safetensors"], merged)
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, weights, decoder.config, read_tokenizer(), TOWER_CONFIG)


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="folder for the adapters")
    parser.add_argument("--checkpoint", type=Path, help="folder for the whole model (272 MB)")
    args = parser.parse_args()
    if args.weights is not None:
        print(f"{args.weights}: {write_adapters(args.work, args.weights) / 1e6:.2f} MB")
    if args.checkpoint is not None:
        write_model(args.work, args.checkpoint)
        print(args.checkpoint)


if __name__ == "__main__":
    main()
