"""Loads a model for a command, or says in one sentence why not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_flow.demo_model.naming import DEMO_MODELS
from vllm_flow.exits import CommandError
from vllm_flow.model_names import absence

if TYPE_CHECKING:
    from vllm_flow.analysis.vlm import Vlm


def load(
    model: str, dtype: str = "float32", device: str | None = None, attention: str | None = None
) -> Vlm:
    """The loaded model; CommandError where it cannot be had."""
    if model in DEMO_MODELS:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from vllm_flow.analysis.vlm import Vlm

    logging.disable_progress_bar()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return Vlm.load(model, dtype, chosen, attention)
    # Transformers reads foreign files and raises what it likes for damaged ones (KeyError, TypeError, ...).
    except Exception as error:
        raise CommandError(
            f"{model} cannot be loaded: {absence(model, error) or error or repr(error)}"
        ) from error
