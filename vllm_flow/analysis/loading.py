"""Loads a model for a command, or says in one sentence why not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_flow.analysis.llava import Llava


def load_or_explain(
    model: str, dtype: str = "float32", device: str | None = None, attention: str | None = None
) -> Llava | None:
    """The loaded model; None after an explanation on stderr."""
    import os

    if model == "demo":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from vllm_flow.analysis.llava import Llava
    from vllm_flow.demo_model.assemble import AssemblyError
    from vllm_flow.demo_model.smollm2 import MissingDecoder

    logging.disable_progress_bar()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return Llava.load(model, dtype, chosen, attention)
    except (AssemblyError, MissingDecoder, ValueError, OSError, RuntimeError) as error:
        print(f"{model} cannot be loaded: {error}", file=sys.stderr)
        return None
