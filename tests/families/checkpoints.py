"""Every tiny checkpoint by name; ``vllm_flow/engine/families/known.py`` names them in its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.families import glm, idefics, internvl, llava, qwen
from tests.families.making import Checkpoint, save

BUILDERS: dict[str, Callable[[], Checkpoint]] = {
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "qwen3_vl_moe": qwen.qwen3_vl_moe,
    "internvl": internvl.internvl,
    "llava_onevision": llava.llava_onevision,
    "mistral3": llava.mistral3,
    "pixtral": llava.pixtral,
    "idefics3": idefics.idefics3,
    "smolvlm": idefics.smolvlm,
    "glm4_1v": glm.glm4_1v,
}


def build(name: str, root: Path) -> Checkpoint:
    """Build a checkpoint under ``root``; equal names have equal weights."""
    with _quiet():
        return save(BUILDERS[name](), root / name)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws progress bars for weights of a few hundred kilobytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    yield
