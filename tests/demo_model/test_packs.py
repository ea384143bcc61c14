"""A question in a pack is computed as if it were alone with its picture."""

from __future__ import annotations

import pytest

from vllm_flow.demo_model.assemble import WEIGHTS
from vllm_flow.demo_model.questions import presence

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from vllm_flow.demo_model.small import SMALL_CONFIG, SMALL_IMAGE_TOKENS  # noqa: E402
from vllm_flow.demo_model.training.lora import new_llama  # noqa: E402
from vllm_flow.demo_model.training.packs import (  # noqa: E402
    IGNORED,
    Ask,
    Packer,
    additive_mask,
)


@pytest.fixture(scope="module")
def packer() -> Packer:
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))
    return Packer(tokenizer, SMALL_IMAGE_TOKENS)


def test_a_segment_does_not_see_the_others(packer: Packer) -> None:
    torch.manual_seed(0)
    llama = new_llama({**SMALL_CONFIG, "num_hidden_layers": 2}).eval()
    asks = [Ask(presence("dog"), "Yes"), Ask("Please list the objects.", "A cat.")]

    def answers(pack: list[Ask]) -> list[torch.Tensor]:
        batch = packer.batch([pack])
        with torch.no_grad():
            hidden = llama(
                input_ids=batch.tokens_BT,
                attention_mask=additive_mask(batch.allowed_BTT, torch.float32),
                position_ids=batch.positions_BT,
                use_cache=False,
            ).last_hidden_state[0]
        return [hidden[row] for row in batch.first_B[0]]

    together = answers(asks)
    for ask, packed in zip(asks, together, strict=True):
        torch.testing.assert_close(packed, answers([ask])[0], rtol=1e-4, atol=1e-5)


def test_only_answers_are_targets(packer: Packer) -> None:
    batch = packer.batch([[Ask(presence("cow"), "No")], [Ask("What?", "A cow and a cup.")]])
    for row, answer in ((0, "No<|im_end|>"), (1, "A cow and a cup.<|im_end|>")):
        targets = batch.targets_BT[row]
        assert targets[targets != IGNORED].tolist() == packer.encode(answer)


def test_the_early_answer_is_asked_of_the_beginnings_last_token(packer: Packer) -> None:
    text = presence("hot dog")
    plain = packer.batch([[Ask(text, "Yes")]])
    asked = packer.batch([[Ask(text, "Yes", early="Is there a hot dog")]])
    (row,) = (asked.targets_BT != plain.targets_BT).nonzero()[:, 1].tolist()
    assert asked.tokens_BT[0, row] == packer.encode(" dog")[0]
    assert asked.targets_BT[0, row] == packer.encode("Yes")[0]
    assert asked.weights_BT[0, row] == 1.0


@pytest.mark.parametrize("image_tokens", [1, 64, 144])
def test_the_picture_has_its_rows_between_head_and_question(image_tokens: int) -> None:
    packer = Packer(
        tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json")), image_tokens
    )
    batch = packer.batch([[Ask("Is it?", "Yes"), Ask("What?", "A cow.")]])
    assert batch.image == slice(len(packer.head), len(packer.head) + image_tokens)
    assert (batch.tokens_BT[0, batch.image] == 0).all()
    assert batch.positions_BT[0, : batch.image.stop].tolist() == list(range(batch.image.stop))
    # Both questions see the whole picture and start at the position after it.
    assert batch.allowed_BTT[0, batch.image.stop :, : batch.image.stop].all()
    starts = (batch.positions_BT[0] == batch.image.stop).nonzero()[:, 0].tolist()
    assert len(starts) == 2


def test_marks_and_weights_reach_their_rows(packer: Packer) -> None:
    text = "Which is it?\nA. dog\nB. cat"
    marks = (("Which is it?\nA. dog", "No"), (text, "Yes"))
    plain = packer.batch([[Ask("Is it?", "Yes"), Ask(text, "B")]])
    marked = packer.batch([[Ask("Is it?", "Yes"), Ask(text, "B", weight=2.0, marks=marks)]])
    assert (plain.tokens_BT == marked.tokens_BT).all()
    first = marked.first_B[0][1]
    assert marked.weights_BT[0, first] == 2 * plain.weights_BT[0, first]
    new = (marked.targets_BT != plain.targets_BT).nonzero()[:, 1].tolist()
    ids = marked.tokens_BT[0].tolist()
    assert [marked.targets_BT[0, row] for row in new] == [
        packer.encode(w)[0] for w in ("No", "Yes")
    ]
    # A mark's row is the last token of its beginning.
    assert [ids[row] for row in new] == [packer.encode(" dog")[-1], packer.encode(" cat")[-1]]
