"""What the training stages share: the log, and tensors in files. Knows no model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Log:
    """One JSON object per line, to the file and to standard output."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def __call__(self, stage: str, **values: Any) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"stage": stage, "s": round(time.monotonic() - self.start, 1), **rounded})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def log_rows(work: Path) -> list[dict[str, Any]]:
    """The log of a work folder, row by row."""
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def save(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors (contiguous, optionally cast), complete or not at all."""
    out = {k: v.detach().to(dtype or v.dtype).contiguous() for k, v in tensors.items()}
    save_file(out, path.with_suffix(".part"))
    path.with_suffix(".part").chmod(0o644)
    path.with_suffix(".part").rename(path)


def load(path: Path) -> dict[str, torch.Tensor]:
    """Tensors as float32."""
    return {k: v.float() for k, v in load_file(path).items()}
