"""Trains the demo model from nothing but package registries: ``python -m vllm_flow.demo.training.run --work DIR``.

Each stage leaves its file in DIR and is skipped when the file is there. The log is DIR/log.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vllm_flow.demo.small import SMALL_CONFIG
from vllm_flow.demo.smollm2 import read_decoder, read_tokenizer
from vllm_flow.demo.training import (
    assets,
    decoder_stage,
    polish_stage,
    projector_stage,
    vision_stage,
)
from vllm_flow.demo.training.common import Budget, Log, SceneSource
from vllm_flow.demo.training.small_vocabulary import small_tokenizer


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="downloads, stage files and the log"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    assets.fetch(args.work)
    budget, log = Budget(), Log(args.work / "log.jsonl")
    log("start", **budget.as_dict())
    source = SceneSource(args.work)
    tower = vision_stage.load_tower(vision_stage.train(args.work, source, budget, log))
    decoder, tokenizer = read_decoder(), read_tokenizer()
    table = decoder.weights["embed_tokens.weight"]
    projector_stage.train(
        args.work / "projector.safetensors", source, tower, table, tokenizer, budget, log
    )
    decoder_stage.train_lora(args.work, source, tower, decoder, tokenizer, budget, 0, log)
    tower = vision_stage.load_tower(polish_stage.polish(args.work, source, budget, log))
    decoder_stage.train_lora(args.work, source, tower, decoder, tokenizer, budget, 1, log)
    del decoder, table
    tokenizer = small_tokenizer()
    decoder_stage.train_small(args.work, source, tower, SMALL_CONFIG, tokenizer, budget, log)
    log("done")


if __name__ == "__main__":
    main()
