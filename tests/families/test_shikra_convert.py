"""Shikra's converter; that what it writes is exact is shown by ``test_exact.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import paper
from tests.families.making import fill, tokenizer
from vllm_flow.exits import Refused
from vllm_flow.models.shikra_convert import added, converted_name, main


def test_rows_that_llama_lacks_are_whole() -> None:
    delta, base = torch.arange(6.0).reshape(3, 2), torch.ones(2, 2)
    assert added(delta, base).tolist() == [[1, 2], [3, 4], [4, 5]]
    assert added(delta, None) is delta


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (3,)])
def test_another_models_weights_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a delta of shape"):
        added(torch.zeros(3, 2), torch.zeros(shape))


def test_names() -> None:
    assert converted_name("model.mm_projector.bias") == "multi_modal_projector.linear.bias"
    assert converted_name("lm_head.weight") == "language_model.lm_head.weight"
    assert converted_name("model.norm.weight") == "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    made = paper.shikra()
    fill(made.model, 1)
    root = tmp_path_factory.mktemp("shikra")
    processor = made.processor
    return paper.publish(processor.tokenizer, processor.image_processor, made.model, root)


def refusal(*folders: Path) -> str:
    names = ("--delta", "--base", "--tower", "--out")
    arguments = [part for pair in zip(names, map(str, folders), strict=True) for part in pair]
    with pytest.raises(Refused) as told:
        main(arguments)
    return str(told.value)


def test_a_base_of_another_width_is_refused_by_name(
    published: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    delta, base, tower = published
    other = tmp_path / "base"
    other.mkdir()
    file = "pytorch_model-00001-of-00001.bin"
    weights = torch.load(base / file, weights_only=True)
    torch.save({**weights, "lm_head.weight": torch.zeros(8, 64)}, other / file)
    said = refusal(delta, other, tower, tmp_path / "out")
    assert "lm_head.weight: a delta of shape" in said and "the LLaMA that Shikra began with" in said


def test_a_tokenizer_that_is_not_shikras_is_refused(
    published: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    delta, base, tower = published
    other = tmp_path / "delta"
    other.mkdir()
    (other / "config.json").write_text((delta / "config.json").read_text())
    tokenizer(())[0].save_pretrained(other)
    assert "lacks <im_patch>" in refusal(other, base, tower, tmp_path / "out")


def test_a_folder_without_weights_is_refused(
    published: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    delta, _, tower = published
    said = refusal(delta, tmp_path, tower, tmp_path / "out")
    assert "holds neither *.safetensors nor" in said
