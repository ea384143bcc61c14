"""A finished work folder becomes weights within their budget and checkpoints that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from PIL import Image  # noqa: E402

from tests.demo_model.sprites import drawn_palette  # noqa: E402
from vllm_flow.demo_model import assemble  # noqa: E402
from vllm_flow.demo_model.prompt import build_prompt  # noqa: E402
from vllm_flow.demo_model.scenes import Style, compose  # noqa: E402
from vllm_flow.demo_model.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo_model.smollm2 import Decoder  # noqa: E402
from vllm_flow.demo_model.training import export, reader  # noqa: E402
from vllm_flow.demo_model.training.batches import collate  # noqa: E402
from vllm_flow.demo_model.training.budget import Budget  # noqa: E402
from vllm_flow.demo_model.training.files import Log, load, save  # noqa: E402
from vllm_flow.demo_model.training.lora import add_lora, cast_weights, new_llama  # noqa: E402
from vllm_flow.demo_model.training.projector_stage import Projector  # noqa: E402
from vllm_flow.demo_model.training.towers import new_tower  # noqa: E402
from vllm_flow.demo_model.vision import TOWER_CONFIG  # noqa: E402

QUESTIONS = ["Is there a dog in the image?", "How many cups are there in the image?"]
TOKENIZER = str(assemble.WEIGHTS / "small_tokenizer.json")
BUDGET = {**Budget().as_dict(), "lora_rank": 4, "lora_alpha": 32, "lora_steps": 7}


def random_decoder() -> Any:
    """The small decoder with weights that are large enough for it to say different things."""
    decoder = new_llama(SMALL_CONFIG)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage files of an untrained model on a small decoder, as the stages write them.

    Their numbers are bfloat16's, so that the checkpoint holds the very same.
    """

    def store(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        rounded = {k: v.detach().to(torch.bfloat16).float() for k, v in tensors.items()}
        save(folder / f"{name}.safetensors", rounded)

    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(5)
    decoder = random_decoder()
    store("decoder", decoder.state_dict())
    adapters = add_lora(decoder, BUDGET["lora_rank"], BUDGET["lora_alpha"])
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    store("lora", adapters)
    store("vision", new_tower(TOWER_CONFIG).state_dict())
    store("small_decoder", random_decoder().state_dict())
    for name in ("projector_tuned", "small_projector"):
        store(
            name, Projector(SMALL_CONFIG["hidden_size"], TOWER_CONFIG["hidden_size"]).state_dict()
        )
    log = Log(folder / "log.jsonl")
    log("start", **{**BUDGET, "lora_steps": 99})  # stopped, and started again with another budget
    log("vision", step=2, thing_accuracy=0.5)
    log("start", **BUDGET)
    log("lora", step=10, loss=1.5)
    log("lora", step=20, presence=0.75)
    return folder


@pytest.fixture()
def weights(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the export writes to. SmolLM2's place is taken by the small decoder, which is quick."""
    decoder_file = tmp_path / "decoder.gguf"
    decoder_file.write_bytes(b"a decoder")
    replaced: dict[str, Callable[[], Any]] = {
        "read_decoder": lambda: Decoder(SMALL_CONFIG, load(work / "decoder.safetensors")),
        "read_tokenizer": lambda: tokenizers.Tokenizer.from_file(TOKENIZER),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(f"vllm_flow.demo_model.smollm2.{name}", value)
        monkeypatch.setattr(reader, name, value)
    monkeypatch.setattr(export, "small_tokenizer", replaced["read_tokenizer"])
    monkeypatch.setattr(export, "gguf_path", lambda: decoder_file)
    monkeypatch.setattr(export, "LOG", tmp_path / "kept.jsonl")
    monkeypatch.setattr(assemble, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def test_the_manifest_says_what_was_written(work: Path, weights: Path, tmp_path: Path) -> None:
    record = export.export(work)
    assert assemble.manifest() == record
    written = {path.name for path in weights.iterdir()}
    assert written == {*export.COMMITTED, "small_tokenizer.json", "manifest.json"}
    assert set(record["files"]) == written - {"manifest.json"}
    for name, entry in record["files"].items():
        found = {
            "sha256": assemble.sha256(weights / name),
            "bytes": (weights / name).stat().st_size,
        }
        assert entry == found, name
    stored, exact = load(weights / "lora.safetensors"), load(work / "lora.safetensors")
    assert all(torch.equal(stored[name], exact[name]) for name in exact)
    assert record["budget"] == BUDGET and record["lora_alpha"] == 32
    assert [row["stage"] for row in record["checks"]] == ["vision", "lora"]
    assert (tmp_path / "kept.jsonl").read_text() == (work / "log.jsonl").read_text()
    # What was recorded is what is assembled from the files: assembling verifies the checksums.
    for make in (assemble.assemble, assemble.assemble_small):
        assert (make(tmp_path / "cache") / "config.json").is_file()


def test_adapters_keep_within_their_budget(
    work: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = export.export(work)["files"]
    size = sum(files[name]["bytes"] for name in export.ADAPTERS)
    monkeypatch.setattr(export, "LIMIT", size)
    export.export(work)
    before = {path: path.read_bytes() for path in weights.iterdir()}
    monkeypatch.setattr(export, "LIMIT", size - 1)
    with pytest.raises(ValueError, match=f"take {size} bytes, more than {size - 1}.*lora_rank"):
        export.export(work)
    assert {path: path.read_bytes() for path in weights.iterdir()} == before


def test_stages_that_are_missing_are_left_out(work: Path, weights: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for name in ("vision.safetensors", "log.jsonl"):
        (part / name).write_bytes((work / name).read_bytes())
    record = export.export(part)
    assert set(record["files"]) == {"vision.safetensors", "small_tokenizer.json"}
    assert record["checkpoints"] == {}
    with pytest.raises(assemble.AssemblyError, match="no demo-model. Train it"):
        assemble.assemble(tmp_path / "cache")


def test_transformers_answers_as_the_reader_does(work: Path, weights: Path, tmp_path: Path) -> None:
    export.export(work)
    folder = assemble.assemble(tmp_path / "cache")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    scenes = [compose(seed, drawn_palette(), Style()) for seed in (1, 2)]
    mine = reader.Reader.of(work, torch.float32)
    # Merged weights are rounded once more in the checkpoint.
    cast_weights(cast_weights(mine.llama, torch.bfloat16), torch.float32)
    said = []
    for scene in scenes:
        pixels = collate([scene])["pixels"]
        answers = mine.answers(pixels, QUESTIONS, [mine.layers], 6)[mine.layers]
        for question, answer in zip(QUESTIONS, answers, strict=True):
            inputs = processor(
                images=Image.fromarray(pixels[0].permute(1, 2, 0).numpy()),
                text=build_prompt(question),
                return_tensors="pt",
            )
            assert (inputs["input_ids"] == model.config.image_token_index).sum() == 144
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            tail = out[0, inputs["input_ids"].shape[1] :]
            assert processor.tokenizer.decode(tail, skip_special_tokens=True).strip() == answer
            said.append(answer)
    assert len(set(said)) > 1


def test_the_small_checkpoint_takes_small_pictures(
    work: Path, weights: Path, tmp_path: Path
) -> None:
    export.export(work)
    folder = assemble.assemble_small(tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_seq_length"], config["vision_config"]["image_size"]) == (64, 112)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = compose(1, drawn_palette(), Style()).image
    inputs = processor(images=image, text=build_prompt(QUESTIONS[0]), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (112, 112)
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 64
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_casting_the_weights_leaves_the_rotary_frequencies_alone() -> None:
    llama = new_llama(SMALL_CONFIG)
    before = llama.rotary_emb.inv_freq.clone()
    cast_weights(llama, torch.bfloat16)
    assert torch.equal(llama.rotary_emb.inv_freq, before)
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}
