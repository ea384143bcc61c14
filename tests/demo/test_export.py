"""A finished work folder becomes adapters within their budget and a checkpoint that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from PIL import Image  # noqa: E402

from tests.demo.sprites import drawn_palette  # noqa: E402
from vllm_flow.demo.assemble import WEIGHTS  # noqa: E402
from vllm_flow.demo.prompt import build_prompt  # noqa: E402
from vllm_flow.demo.scenes import Style, compose  # noqa: E402
from vllm_flow.demo.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo.smollm2 import Decoder  # noqa: E402
from vllm_flow.demo.training import decoder_stage, export, reader  # noqa: E402
from vllm_flow.demo.training.batches import collate  # noqa: E402
from vllm_flow.demo.training.common import load, save  # noqa: E402
from vllm_flow.demo.training.decoder_stage import add_lora, new_llama  # noqa: E402
from vllm_flow.demo.training.projector_stage import Projector  # noqa: E402
from vllm_flow.demo.training.vision_stage import new_tower  # noqa: E402
from vllm_flow.demo.vision import TOWER_CONFIG  # noqa: E402

QUESTIONS = ["Is there a dog in the image?", "How many cups are there in the image?"]


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
    decoder = new_llama(SMALL_CONFIG)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    store("decoder", decoder.state_dict())
    adapters = add_lora(decoder, 4, 32)
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    store("lora", adapters)
    store("vision", new_tower(TOWER_CONFIG).state_dict())
    projector = Projector(SMALL_CONFIG["hidden_size"], TOWER_CONFIG["hidden_size"])
    store("projector_tuned", projector.state_dict())
    return folder


@pytest.fixture()
def small_decoder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's place is taken by the small decoder: nothing else differs, and it is quick."""
    for module in (export, reader):
        monkeypatch.setattr(
            module,
            "read_decoder",
            lambda: Decoder(SMALL_CONFIG, load(work / "decoder.safetensors")),
        )
        monkeypatch.setattr(
            module,
            "read_tokenizer",
            lambda: tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json")),
        )


def test_adapters_keep_within_their_budget(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = export.write_adapters(work, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(export.ADAPTERS)
    stored = load(tmp_path / "lora.safetensors")
    exact = load(work / "lora.safetensors")
    assert all(torch.equal(stored[k], exact[k].to(torch.bfloat16).float()) for k in exact)
    monkeypatch.setattr(export, "LIMIT", size - 1)
    with pytest.raises(ValueError, match="make them smaller"):
        export.write_adapters(work, tmp_path)


def test_transformers_answers_as_the_reader_does(
    work: Path, tmp_path: Path, small_decoder: None
) -> None:
    export.write_model(work, tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    scenes = [compose(seed, drawn_palette(), Style()) for seed in (1, 2)]
    mine = reader.Reader.of(work, torch.float32)
    # Merged weights are rounded once more in the checkpoint.
    decoder_stage.cast_weights(
        decoder_stage.cast_weights(mine.llama, torch.bfloat16), torch.float32
    )
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


def test_casting_the_weights_leaves_the_rotary_frequencies_alone() -> None:
    llama = new_llama(SMALL_CONFIG)
    before = llama.rotary_emb.inv_freq.clone()
    decoder_stage.cast_weights(llama, torch.bfloat16)
    assert torch.equal(llama.rotary_emb.inv_freq, before)
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}
