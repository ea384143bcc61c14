"""Trains the demo model from package registries: ``python -m vllm_flow.demo_model.training.run --work DIR``.

Each stage leaves its file in DIR and is skipped when the file is there; a stage that was stopped goes
on from its last state, at most five minutes back: stop it when you like and give the same command
again. The log is DIR/log.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from vllm_flow.demo_model.smollm2 import read_decoder, read_tokenizer
from vllm_flow.demo_model.training import decoder_stage, projector_stage, small_stage, vision_stage
from vllm_flow.demo_model.training.batches import Machine
from vllm_flow.demo_model.training.budget import Budget
from vllm_flow.demo_model.training.files import Log
from vllm_flow.demo_model.training.small_vocabulary import small_tokenizer
from vllm_flow.demo_model.training.sprites import load_assets


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="downloads, stage files and the log"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that compose scenes")
    parser.add_argument("--vision-steps", type=int, default=Budget.vision_steps)
    parser.add_argument("--lora-steps", type=int, default=Budget.lora_steps)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    budget = replace(Budget(), vision_steps=args.vision_steps, lora_steps=args.lora_steps)
    log = Log(args.work / "log.jsonl")
    log("start", **budget.as_dict())
    assets = load_assets(args.work)
    machine = Machine(args.device, args.workers)
    tower = vision_stage.load_tower(vision_stage.train(args.work, assets, budget, log, machine))
    tower.to(args.device)
    decoder, tokenizer = read_decoder(), read_tokenizer()
    projector_stage.train(
        args.work / "projector.safetensors",
        assets,
        tower,
        decoder.weights["embed_tokens.weight"],
        tokenizer,
        budget,
        log,
        machine,
    )
    decoder_stage.train(args.work, assets, tower, decoder, tokenizer, budget, log, machine)
    del decoder
    small_stage.train(args.work, assets, small_tokenizer(), budget, log, machine)
    log("done")


if __name__ == "__main__":
    main()
