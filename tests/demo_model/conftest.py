"""Pictures of every split, and the data sets made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo_model.sprites import drawn_assets
from vllm_flow.demo_model.datasets import TASKS, write_datasets
from vllm_flow.demo_model.heldout import SPLITS
from vllm_flow.demo_model.training.heldout_data import write_scenes
from vllm_flow.demo_model.training.sprites import Assets

COUNT = 30
"""Scenes of a split."""


@pytest.fixture(scope="session")
def assets() -> Assets:
    return drawn_assets()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    write_scenes(drawn_assets(), out, dict.fromkeys(SPLITS, COUNT))
    return out


@pytest.fixture(scope="session")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task of every split, with all the items there are."""
    out = tmp_path_factory.mktemp("datasets")
    for split in SPLITS:
        write_datasets(out / split, None, 3, split, list(TASKS), pictures)
    return out
