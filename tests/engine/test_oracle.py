"""The oracle against Hugging Face, against its second formulation, and against proving nothing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from tests.engine import attention_oracle, oracle
from tests.engine.cases import (
    SHAPES,
    Ask,
    adjacent_images,
    image_token_as_text,
    one_image,
    text_only,
    two_images,
)
from tests.engine.tiny_llava import IMAGE_TOKEN_ID, Shape, build, picture

PROMPTS = {
    "one image": one_image(1),
    "two images": two_images(2),
    "adjacent": adjacent_images(3),
    "text": text_only(4),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(
    params=SHAPES, ids=lambda shape: f"{shape.family}-{shape.head_dim}-{shape.image_tokens}"
)
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


def greedy(shape: Shape, root: Path, ask: Ask, tokens: int) -> oracle.OracleOutput:
    pictures = [picture(shape, seed) for seed in ask.images]
    return oracle.generate(build(shape, root), ask.prompt, pictures, ask.cliff, tokens, ask.allowed)


def encoded(shape: Shape, root: Path, ask: Ask) -> oracle.Prompt:
    return oracle.encode(
        build(shape, root), ask.prompt, [picture(shape, seed) for seed in ask.images]
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_baseline_is_hugging_face_generate(shape: Shape, root: Path, name: str) -> None:
    ask = PROMPTS[name]
    model, processor = oracle.load(build(shape, root))
    pictures = [picture(shape, seed) for seed in ask.images]
    batch = processor(text=ask.prompt, images=pictures or None, return_tensors="pt")
    out = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    found = greedy(shape, root, ask, 16)
    assert found.prompt_token_ids + found.token_ids == tuple(out.sequences[0].tolist())
    rows = torch.cat(out.logits).log_softmax(-1)
    expected = rows[range(16), list(found.token_ids)].tolist()
    assert found.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", PROMPTS)
def test_removing_rows_is_masking_keys(shape: Shape, root: Path, name: str) -> None:
    prompt = encoded(shape, root, PROMPTS[name])
    answer = [7, 30, 21, IMAGE_TOKEN_ID, 90]
    stays = torch.tensor([*(not image for image in prompt.is_image_T), *[True] * len(answer)])
    for cliff in range(shape.layers + 1):
        removed = oracle.forward_removed(build(shape, root), prompt, answer, cliff).log_softmax(-1)
        masked = oracle.forward_masked(build(shape, root), prompt, answer, cliff).log_softmax(-1)
        masked = masked if cliff == shape.layers else masked[stays]
        torch.testing.assert_close(removed, masked, rtol=0, atol=5e-5)


def test_every_cliff_matters(shape: Shape, root: Path) -> None:
    """Else an engine that ignored the policy, or was off by one layer, would pass."""
    by_cliff = [greedy(shape, root, one_image(1, cliff), 16) for cliff in range(shape.layers + 1)]
    for (a, one), (b, other) in combinations(enumerate(by_cliff), 2):
        assert one.token_ids != other.token_ids, f"cliffs {a} and {b} give the same tokens"
    assert len({out.prompt_token_ids for out in by_cliff}) == 1


def test_the_picture_matters_below_the_cliff_only(shape: Shape, root: Path) -> None:
    ask = one_image(1)
    for cliff in (0, 1, shape.layers):
        rows = [
            oracle.forward_removed(
                build(shape, root), encoded(shape, root, Ask(ask.prompt, (seed,))), [], cliff
            )[-1]
            for seed in (1, 3)  # with tiles: pictures of one size
        ]
        assert torch.equal(rows[0], rows[1]) == (cliff == 0)


def test_text_only_has_no_cliff(root: Path) -> None:
    shape = SHAPES[0]
    answers = {greedy(shape, root, text_only(4, cliff), 8).token_ids for cliff in (None, 0, 2)}
    assert len(answers) == 1


def test_positions_are_not_repacked(root: Path) -> None:
    """At cliff 0 the image is never seen, yet it is not the same as a prompt without it: text keeps its distance."""
    shape = SHAPES[0]
    prompt = encoded(shape, root, one_image(1))
    text = tuple(i for i, image in zip(prompt.ids, prompt.is_image_T, strict=True) if not image)
    packed = oracle.Prompt(text, (False,) * len(text), None)
    kept = oracle.forward_removed(build(shape, root), prompt, [], 0)[-1]
    repacked = oracle.forward_removed(build(shape, root), packed, [], 0)[-1]
    assert (kept - repacked).abs().max() > 0.1


def test_generated_image_token_is_text(root: Path) -> None:
    ask = image_token_as_text(25, 2)
    found = greedy(SHAPES[0], root, ask, 24)
    assert IMAGE_TOKEN_ID in found.token_ids[:-1]
    assert set(found.token_ids) <= set(ask.allowed or ())


@pytest.mark.parametrize(
    "ask", [one_image(1, 2), two_images(2), image_token_as_text(25, 1)], ids=str
)
def test_check_greedy_is_generate(root: Path, ask: Ask) -> None:
    shape = SHAPES[0]
    where, pictures = build(shape, root), [picture(shape, seed) for seed in ask.images]
    expected = greedy(shape, root, ask, 12)
    found = oracle.check_greedy(
        where, ask.prompt, pictures, ask.cliff, expected.token_ids, ask.allowed
    )
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert found.gaps == pytest.approx(expected.gaps, abs=1e-4)
    wrong = list(expected.token_ids)
    wrong[5] = next(i for i in ask.allowed or (20, 60) if i != wrong[5])
    found = oracle.check_greedy(where, ask.prompt, pictures, ask.cliff, wrong, ask.allowed)
    assert found.token_ids == expected.token_ids[:6]


@pytest.mark.parametrize("name", PROMPTS)
def test_attention_is_hugging_faces(shape: Shape, root: Path, name: str) -> None:
    """What the attention log is compared with is `output_attentions=True`, as far as that goes: without a cliff."""
    prompt, output = encoded(shape, root, PROMPTS[name]), [20, 60, 30]
    expected = attention_oracle.attention_full(build(shape, root), prompt, output)
    found = attention_oracle.attention_removed(build(shape, root), prompt, output, shape.layers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.sum(-1).allclose(torch.ones(()))


def test_attention_past_the_cliff_is_among_the_rows_left(shape: Shape, root: Path) -> None:
    prompt, output, cliff = encoded(shape, root, PROMPTS["two images"]), [20, 60], 1
    found = attention_oracle.attention_removed(build(shape, root), prompt, output, cliff)
    is_image = torch.tensor([*prompt.is_image_T, False, False])
    assert found[:cliff, ~is_image][..., is_image].gt(0).any()
    assert not found[cliff:, :, is_image].any() and not found[cliff:, is_image].any()
    assert found[:, ~is_image].sum(-1).allclose(torch.ones(()))
