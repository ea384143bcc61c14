"""A tiny random LLaVA in float64, in which finite differences are sharp."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.engine import tiny_llava
from vllm_flow.analysis.llava import Encoded, Llava

SHAPE = tiny_llava.Shape(heads=2, kv_heads=1, head_dim=8)
PROMPT = "w1 w2 <image> w3 w4 w5"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def load(shape: tiny_llava.Shape, root: Path, attention: str | None = None) -> Llava:
    llava = Llava.load(str(tiny_llava.build(shape, root)), attention=attention)
    llava.model.double()
    return llava


@pytest.fixture(scope="session")
def tiny(checkpoints: Path) -> Llava:
    return load(SHAPE, checkpoints, attention="eager")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return tiny_llava.picture(SHAPE, seed=3)


@pytest.fixture(scope="session")
def encoded(tiny: Llava, picture: Image.Image) -> Encoded:
    return tiny.encode(PROMPT, picture)
