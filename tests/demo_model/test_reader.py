"""The reader answers as transformers does, question by question, with and without image rows."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from vllm_flow.demo_model.assemble import WEIGHTS  # noqa: E402
from vllm_flow.demo_model.prompt import prompt_head, prompt_tail  # noqa: E402
from vllm_flow.demo_model.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo_model.training.lora import new_llama  # noqa: E402
from vllm_flow.demo_model.training.projector_stage import Projector  # noqa: E402
from vllm_flow.demo_model.training.reader import Reader  # noqa: E402
from vllm_flow.demo_model.training.towers import new_tower  # noqa: E402
from vllm_flow.demo_model.training.vision_stage import features  # noqa: E402
from vllm_flow.demo_model.vision import IMAGE_TOKENS, TOWER_CONFIG  # noqa: E402

TEXTS = ["Is there a dog in the image?", "What does the sign say?", "How many cars are there?"]
TOKENS = 5


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(3)
    llama = new_llama({**SMALL_CONFIG, "num_hidden_layers": 4})
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))
    projector = Projector(SMALL_CONFIG["hidden_size"], TOWER_CONFIG["hidden_size"])
    return Reader(new_tower(TOWER_CONFIG).eval(), projector, llama, tokenizer)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(
        0, 256, (1, 3, 168, 168), generator=torch.Generator().manual_seed(0)
    ).byte()


def alone(reader: Reader, pixels: torch.Tensor, text: str, cliff: int) -> str:
    """One question, no cache, all rows through transformers' own layers; image rows leave at ``cliff``."""
    head, tail = (reader.encode(part) for part in (prompt_head(), prompt_tail(text)))
    with torch.no_grad():
        image = reader.projector(features(reader.tower, pixels, torch.float32)[1])[0]
    said: list[int] = []
    while len(said) < TOKENS:
        ids = torch.tensor([*head, *([0] * IMAGE_TOKENS), *tail, *said])
        with torch.no_grad():
            rows = reader.llama.embed_tokens(ids)
            rows[len(head) : len(head) + IMAGE_TOKENS] = image
            places = torch.arange(len(ids))
            kept = torch.ones(len(ids), dtype=torch.bool)
            kept[len(head) : len(head) + IMAGE_TOKENS] = False
            for number, layer in enumerate(reader.llama.layers):
                if number == cliff:
                    rows, places = rows[kept], places[kept]
                mask = torch.full((len(rows), len(rows)), -1e9).triu(1)[None, None]
                out = layer(
                    rows[None],
                    attention_mask=mask,
                    position_ids=places[None],
                    position_embeddings=reader.llama.rotary_emb(rows[None], places[None]),
                )
                rows = (out[0] if isinstance(out, tuple) else out).reshape(rows.shape)
            best = reader.llama.norm(rows[-1]) @ reader.llama.embed_tokens.weight.T
        token = int(best.argmax())
        if token == reader.end:
            break
        said.append(token)
    return reader.tokenizer.decode(said).strip()


def test_answers_are_those_of_each_question_alone(reader: Reader, pixels: torch.Tensor) -> None:
    cliffs = [0, 1, 3, 4]
    found = reader.answers(pixels, TEXTS, cliffs, TOKENS)
    wanted = {c: [alone(reader, pixels, text, c) for text in TEXTS] for c in cliffs}
    assert found == wanted
    assert len({answer for answers in wanted.values() for answer in answers}) > 3


def test_without_image_rows_the_picture_does_not_matter(
    reader: Reader, pixels: torch.Tensor
) -> None:
    other = 255 - pixels
    last = reader.layers
    one = reader.answers(pixels, TEXTS, [0, last], TOKENS)
    two = reader.answers(other, TEXTS, [0, last], TOKENS)
    assert one[0] == two[0]
    assert one[last] != two[last]
