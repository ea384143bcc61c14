"""The small model's tower is the demo model's with fewer places; its stage is told the truth about them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.demo_model.sprites import drawn_palette  # noqa: E402
from tests.demo_model.test_assemble import needs_decoder  # noqa: E402
from vllm_flow.demo_model.assemble import WEIGHTS  # noqa: E402
from vllm_flow.demo_model.facts import Facts, Sign, Thing  # noqa: E402
from vllm_flow.demo_model.prompt import prompt_tail  # noqa: E402
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, presence  # noqa: E402
from vllm_flow.demo_model.scenes import GRID, PATCH, SIZE, Style, compose  # noqa: E402
from vllm_flow.demo_model.small import (  # noqa: E402
    POSITIONS,
    SMALL_CONFIG,
    SMALL_GRID,
    SMALL_IMAGE_TOKENS,
    small_tower,
)
from vllm_flow.demo_model.training import batches, small_stage  # noqa: E402
from vllm_flow.demo_model.training.towers import new_tower  # noqa: E402
from vllm_flow.demo_model.training.vision_stage import features  # noqa: E402
from vllm_flow.demo_model.vision import TOWER_CONFIG  # noqa: E402
from vllm_flow.demo_model.vocabulary import CLASSES, WORDS  # noqa: E402

POSITION_TABLE = "embeddings.position_embedding.weight"


def test_the_small_grids_places_are_those_of_the_large_one_under_their_middles() -> None:
    step = SIZE / SMALL_GRID
    assert [int((place + 0.5) * step // PATCH) for place in range(SMALL_GRID)] == list(POSITIONS)
    assert [GRID - 1 - place for place in reversed(POSITIONS)] == list(POSITIONS)
    assert len(set(POSITIONS)) == SMALL_GRID


def test_the_small_tower_takes_the_places_rows_and_all_other_weights() -> None:
    weights = dict(new_tower().state_dict())
    (name,) = (key for key in weights if key.endswith(POSITION_TABLE))
    # A row says where it is: -1 for the class token, else 100 times its row plus its column.
    numbers = [-1, *(100 * row + column for row in range(GRID) for column in range(GRID))]
    width = TOWER_CONFIG["hidden_size"]
    weights[name] = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, width)
    config, small = small_tower(weights)
    assert config == {**TOWER_CONFIG, "image_size": SMALL_GRID * PATCH}
    wanted = [-1, *(100 * row + column for row in POSITIONS for column in POSITIONS)]
    assert small[name][:, 0].tolist() == wanted and small[name].shape == (65, width)
    assert small.keys() == weights.keys()
    assert all(small[key] is weights[key] for key in weights if key != name)


def test_the_small_tower_runs_on_small_pictures() -> None:
    config, weights = small_tower(new_tower().state_dict())
    tower = new_tower(config)
    fits = {k: v for k, v in weights.items() if "position_ids" not in k}
    missing, unexpected = tower.load_state_dict(fits, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    with torch.no_grad():
        seen = features(tower.eval(), torch.zeros(1, 3, 112, 112))[1]
    assert seen.shape == (1, SMALL_IMAGE_TOKENS, TOWER_CONFIG["hidden_size"])


def scenes_and_pages(seeds: list[int]) -> list:
    styles = (Style(), Style(page_share=1.0), Style(rough=True))
    return [compose(seed, drawn_palette(), styles[seed % 3]) for seed in seeds]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_a_reduced_batch_says_what_is_at_the_chosen_places(seeds: list[int]) -> None:
    scenes = scenes_and_pages(seeds)
    batch = batches.collate(scenes)
    out = small_stage.reduced(batch)
    kept = [scene for scene in scenes if scene.facts.objects]
    assert out["facts"] == [scene.facts for scene in kept]
    assert out["pixels"].shape == (len(kept), 3, 112, 112)
    for name in ("patches", "centres"):
        assert out[name].shape == (len(kept), SMALL_IMAGE_TOKENS)
    for number, scene in enumerate(kept):
        for place in range(SMALL_IMAGE_TOKENS):
            row, column = POSITIONS[place // SMALL_GRID], POSITIONS[place % SMALL_GRID]
            assert out["patches"][number, place] == scene.patches[row, column]
            assert out["centres"][number, place] == scene.centres[row, column]


def test_reduced_pixels_are_the_picture_at_two_thirds() -> None:
    image = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    image[:, 0, :, SIZE // 2 :] = 255  # red on the right
    image[:, 1, : SIZE // 2] = 100  # green above
    empty = torch.zeros(1, GRID * GRID)
    facts = [Facts((Thing("dog", (0, 0, 9, 9)),))]
    batch = {"pixels": image, "facts": facts, "patches": empty, "centres": empty}
    pixels = small_stage.reduced(batch)["pixels"][0]
    assert pixels[0, :, :50].eq(0).all() and pixels[0, :, 62:].eq(255).all()
    assert pixels[1, :50].eq(100).all() and pixels[1, 62:].eq(0).all()
    assert pixels.min() >= 0 and pixels.max() <= 255 and pixels.eq(pixels.round()).all()


def test_pages_without_things_are_left_out() -> None:
    scenes = [compose(seed, drawn_palette(), Style(page_share=1.0)) for seed in range(12)]
    kept = [scene.facts for scene in scenes if scene.facts.objects]
    assert 0 < len(kept) < 12
    assert small_stage.reduced(batches.collate(scenes))["facts"] == kept


things = st.builds(Thing, st.sampled_from(CLASSES), st.just((0, 0, 9, 9)))
some_facts = st.builds(
    lambda t, s: Facts(tuple(t), tuple(s)),
    st.lists(things, min_size=1, max_size=5),
    st.lists(st.builds(Sign, st.sampled_from(WORDS), st.just((0, 0, 9, 9))), max_size=1),
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))


@settings(deadline=None)
@given(facts=some_facts, seed=st.integers(0, 10**6))
def test_presence_is_asked_evenly_and_truly(facts: Facts, seed: int, tokenizer) -> None:
    asks = small_stage.presence_asks(facts, random.Random(seed))
    name_of = {presence(name): name for name in CLASSES}
    said: Counter[str] = Counter()
    for ask in asks:
        name = name_of[ask.text.removesuffix(ANSWER_SUFFIX)]
        assert ask.answer == ("Yes" if name in facts.objects else "No")
        assert ask.task == "presence"
        said[ask.answer] += 1
        # The beginning ends with the name's last token, and is a beginning in tokens as well.
        assert ask.text.startswith(ask.early) and ask.early.endswith(name)
        early, whole = (tokenizer.encode(t).ids for t in (ask.early, prompt_tail(ask.text)))
        assert whole[: len(early)] == early
    assert said["Yes"] == said["No"] == 2 * len(facts.objects)
    assert len({ask.text for ask in asks}) == len(asks)
    with_yes = [ask.text for ask in asks if ask.answer == "Yes"]
    assert sum(text.endswith(ANSWER_SUFFIX) for text in with_yes) == len(facts.objects)


def test_the_small_tokenizer_has_most_words_whole(tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SMALL_CONFIG["vocab_size"] == 992
    assert [len(tokenizer.encode(word).ids) for word in ("Yes", "No")] == [1, 1]
    words = {word for name in CLASSES for word in name.split()}
    cut = {word for word in words if len(tokenizer.encode(f" {word}").ids) > 1}
    assert cut == {"donut", "skateboard", "potted", "handbag"}  # no tokens of SmolLM2's either


@pytest.mark.slow
def test_the_small_tokenizer_cuts_what_is_asked_as_smollm2s_does(tokenizer) -> None:
    needs_decoder()
    from vllm_flow.demo_model.smollm2 import read_tokenizer

    whole = read_tokenizer()
    for name in CLASSES:
        text = presence(name).split(" ", 1)[1] + ANSWER_SUFFIX
        assert tokenizer.encode(f" {text}").tokens == whole.encode(f" {text}").tokens
