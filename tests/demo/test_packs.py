"""A question in a pack is computed as if it were alone with its picture."""

from __future__ import annotations

import random

import pytest

from vllm_flow.demo.assemble import WEIGHTS
from vllm_flow.demo.classes import presence_question

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from vllm_flow.demo.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo.training.decoder_stage import new_llama  # noqa: E402
from vllm_flow.demo.training.packs import (  # noqa: E402
    IGNORED,
    Ask,
    Packer,
    additive_mask,
    presence_only,
    questions_of,
)


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json")))


def test_a_segment_does_not_see_the_others(packer: Packer) -> None:
    torch.manual_seed(0)
    llama = new_llama({**SMALL_CONFIG, "num_hidden_layers": 2}).eval()
    asks = [Ask(presence_question("dog"), "Yes"), Ask("Please list the objects.", "A cat.")]

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
    batch = packer.batch(
        [[Ask(presence_question("cow"), "No")], [Ask("What?", "A cow and a cup.")]]
    )
    for row, answer in ((0, "No<|im_end|>"), (1, "A cow and a cup.<|im_end|>")):
        targets = batch.targets_BT[row]
        assert targets[targets != IGNORED].tolist() == packer.encode(answer)


@pytest.mark.parametrize("questions", [questions_of, presence_only])
def test_as_many_yes_as_no(questions) -> None:
    for seed in range(10):
        asks = questions(["dog", "tree", "cup"], random.Random(seed))
        answers = [ask.answer for ask in asks]
        assert answers.count("Yes") == answers.count("No") > 0


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
