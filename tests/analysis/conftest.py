"""A tiny random LLaVA in float64, in which finite differences are sharp."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.analysis.families import Given
from tests.engine import tiny_llava
from tests.families.making import Checkpoint
from vllm_flow.analysis.vlm import Encoded, Vlm

SHAPE = tiny_llava.Shape(heads=2, kv_heads=1, head_dim=8)
PROMPT = "w1 w2 <image> w3 w4 w5"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the tiny checkpoints' size."""
    path = tmp_path_factory.mktemp("image") / "picture.png"
    tiny_llava.picture(SHAPE, 3).save(path)
    return path


def load(shape: tiny_llava.Shape, root: Path, attention: str = "sdpa") -> Vlm:
    """The checkpoint in float64 throughout.

    Transformers computes RMS norms in float32 whatever the model's dtype (and eager attention's
    softmax, so the default is another): the decoder's norms are replaced by the same formula.
    """
    vlm = Vlm.load(str(tiny_llava.build(shape, root)), attention=attention)
    vlm.model.double()
    for module in vlm.model.model.language_model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)
    return vlm


def rms_norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    mean = hidden.pow(2).mean(-1, keepdim=True)
    return module.weight * hidden * torch.rsqrt(mean + module.variance_epsilon)


@pytest.fixture(scope="session")
def tiny(checkpoints: Path) -> Vlm:
    return load(SHAPE, checkpoints)


@pytest.fixture(scope="session")
def eager(checkpoints: Path) -> Vlm:
    """The same model with attention that returns its maps."""
    return load(SHAPE, checkpoints, attention="eager")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return tiny_llava.picture(SHAPE, seed=3)


@pytest.fixture(scope="session")
def encoded(tiny: Vlm, picture: Image.Image) -> Encoded:
    return tiny.encode(PROMPT, picture)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """``given(name)``: a checkpoint, and the same as the analysis has it, with attention that keeps its maps."""
    from tests.families.checkpoints import build

    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def get(name: str) -> tuple[Checkpoint, Vlm]:
        checkpoint = build(name, root)
        return checkpoint, Vlm(checkpoint.model, checkpoint.processor, name)

    return get
