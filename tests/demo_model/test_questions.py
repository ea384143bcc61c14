"""Questions of the demo model: true to the scene, and in the words the evaluation uses."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.demo_model.sprites import drawn_palette
from tests.demo_model.truth import fitting
from vllm_flow.demo_model import coco_ids, questions
from vllm_flow.demo_model.facts import Facts, Sign, Thing
from vllm_flow.demo_model.heldout import score_caption
from vllm_flow.demo_model.scenes import Style, compose
from vllm_flow.demo_model.training.asks import TASKS, asks_of
from vllm_flow.demo_model.vocabulary import (
    CLASSES,
    KIND_OF,
    KINDS,
    NUMBERS,
    WORDS,
    counted,
    with_article,
)
from vllm_flow.eval.tasks.chair import PROMPT, read_caption, synonyms
from vllm_flow.eval.tasks.pope import SUFFIX, parse_yes_no
from vllm_flow.eval.tasks.scienceqa import parse_letter


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    left, top = draw(st.integers(0, 120)), draw(st.integers(0, 120))
    return left, top, left + draw(st.integers(8, 48)), top + draw(st.integers(8, 48))


def drawn_facts(least: int = 0, signs: int = 1) -> st.SearchStrategy[Facts]:
    things = st.builds(Thing, st.sampled_from(CLASSES), boxes())
    repeated = st.lists(things, min_size=least, max_size=4)
    plates = st.lists(st.builds(Sign, st.sampled_from(WORDS), boxes()), max_size=signs)
    facts = st.builds(lambda t, s: Facts(tuple(t), tuple(s)), repeated, plates)
    return facts.filter(lambda f: f.things or f.signs)


PALETTE = drawn_palette()
randoms = st.integers(0, 10**6).map(random.Random)


@given(drawn_facts(), randoms, st.integers(0, 8))
def test_absent_things_are_absent_and_distinct(facts: Facts, rng: random.Random, n: int) -> None:
    names = questions.absent(facts, rng, n)
    assert len(set(names)) == n and not set(names) & set(facts.objects)


def test_half_of_the_absent_things_are_of_a_kind_that_is_there() -> None:
    facts = Facts((Thing("dog", (0, 0, 9, 9)),))
    rng = random.Random(0)
    near = [KIND_OF[questions.absent(facts, rng, 1)[0]] == "animal" for _ in range(2000)]
    share_by_chance = (len(KINDS["animal"]) - 1) / (len(CLASSES) - 1)
    assert abs(sum(near) / 2000 - (0.5 + 0.5 * share_by_chance)) < 0.05


@given(drawn_facts(), randoms)
def test_the_right_choice_is_right_and_the_only_one(facts: Facts, rng: random.Random) -> None:
    made = questions.choice(facts, rng)
    assert 2 <= len(made.choices) == len(set(made.choices)) <= 4
    fits = fitting(made.question, made.topic, made.choices, facts)
    assert fits == [number == made.answer for number in range(len(made.choices))]
    if made.topic == "numbers":
        assert sorted(made.choices, key=NUMBERS.index) == list(made.choices)


def test_no_letter_and_no_number_of_choices_gives_the_answer_away() -> None:
    cats = [Thing("cat", (80, top, 120, top + 40)) for top in (0, 60)]
    things = (Thing("dog", (0, 0, 40, 40)), Thing("car", (120, 0, 160, 40)), *cats)
    facts = Facts(things, (Sign("open", (0, 100, 60, 140)),))
    rng = random.Random(1)
    made = [questions.choice(facts, rng) for _ in range(4000)]
    shares = Counter((len(m.choices), m.answer) for m in made if m.topic != "numbers")
    for count in (2, 3, 4):
        total = sum(shares[count, answer] for answer in range(count))
        for answer in range(count):
            assert abs(shares[count, answer] / total - 1 / count) < 0.08
    assert {m.topic for m in made} == {"objects", "numbers", "words", "places"}


@given(drawn_facts(least=1), randoms)
def test_training_asks_in_the_words_of_the_evaluation(facts: Facts, rng: random.Random) -> None:
    asks = asks_of(facts, rng)
    assert {ask.task for ask in asks} <= set(TASKS)
    assert all("  " not in ask.text + ask.answer for ask in asks)
    for ask in asks:
        if ask.task in ("presence", "place"):
            assert parse_yes_no(ask.answer) == ask.answer.lower()
            assert ask.text.endswith(("?", SUFFIX))
        if ask.task == "choice":
            letter = parse_letter(ask.answer)
            assert letter is not None and f"\n{letter}. " in ask.text
            marked = {beginning.rsplit("\n", 1)[1][0]: word for beginning, word in ask.marks}
            assert all(ask.text.startswith(beginning + "\n") for beginning, _ in ask.marks)
            assert [option for option, word in marked.items() if word == "Yes"] == [letter]
            assert len(marked) == ask.text.count("\n") - (1 if "Context: " in ask.text else 0) - 1
        if ask.task == "word":
            assert ask.answer == facts.signs[0].word
        if ask.task == "count":
            assert int(ask.answer) in facts.counts.values()
        if ask.task == "caption":
            assert ask.text == PROMPT
    assert (sum(ask.task == "word" for ask in asks) == 1) == (len(facts.signs) == 1)
    said = Counter(ask.answer for ask in asks if ask.task == "presence")
    assert said["Yes"] == said["No"] > 0


def test_numbers_are_not_mostly_one() -> None:
    """So that "one" is no good guess without the picture."""
    rng = random.Random(0)
    asked = Counter()
    for seed in range(600):
        facts = compose(seed, PALETTE, Style()).facts
        name = questions.worth_counting(facts, rng)
        if name is not None:
            asked[facts.counts[name]] += 1
    assert set(asked) == {1, 2, 3, 4}
    assert all(0.07 < count / sum(asked.values()) < 0.5 for count in asked.values()), asked


def test_ocr_tokens_do_not_give_the_word_away() -> None:
    rng = random.Random(0)
    drawn = [questions.ocr_tokens("open", rng) for _ in range(3000)]
    assert 0.8 < sum("open" in tokens for tokens in drawn) / 3000 < 0.9
    alone = [tokens for tokens in drawn if tokens == ["open"]]
    assert len(alone) / 3000 < 0.3
    first = sum(tokens[:1] == ["open"] for tokens in drawn) / 3000
    assert first < 0.6


def test_chair_reads_the_caption_of_every_coco_class() -> None:
    table = synonyms()
    for name in CLASSES:
        wanted = [] if coco_ids.category(name) is None else [coco_ids.category(name)]
        assert (table.get(name) == coco_ids.category(name)) or coco_ids.category(name) is None
        for count in (1, 2, 3, 4):
            facts = Facts(tuple(Thing(name, (0, 0, 9, 9)) for _ in range(count)))
            found = read_caption(questions.caption(facts), "official").objects
            # CHAIR's official rule makes "bu" of "bus" and "ty" of "ties": it never counts them.
            unread = (name, count) == ("bus", 1) or (name == "tie" and count > 1)
            assert found == ([] if unread else wanted), (name, count, found)


def test_words_on_signs_are_no_object_to_chair() -> None:
    facts = Facts((Thing("dog", (0, 0, 9, 9)),), (Sign("bridge", (0, 0, 9, 9)),))
    assert questions.caption(facts) == "The image shows a dog. A sign says bridge."
    for word in WORDS:
        assert read_caption(f"A sign says {word}.", "official").objects == []


@given(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=6), randoms)
def test_a_listing_names_each_class_once_in_class_order(
    names: list[str], rng: random.Random
) -> None:
    text = questions.listing(names)
    assert text[0] == text[0].upper() and text.endswith(".") and " one " not in text
    parts = text[:-1].replace(" and ", ", ").split(", ")
    wanted = [with_article(name) for name in CLASSES if name in names]
    assert [parts[0][0].lower() + parts[0][1:], *parts[1:]] == wanted
    rng.shuffle(names)
    assert questions.listing(names) == text
    assert score_caption(text, names).missed == ()


def test_a_listing_of_nothing_and_of_names_within_names() -> None:
    assert questions.listing([]) == "Nothing."
    assert questions.listing(["hot dog", "dog"]) == "A dog and a hot dog."
    assert questions.listing(["scissors"]) == "Scissors."
    assert questions.listing(["tv", "apple", "broccoli"]) == "An apple, broccoli and a tv."


def test_names_in_sentences() -> None:
    assert counted("dog", 1) == "a dog" and counted("wine glass", 2) == "two wine glasses"
    assert with_article("orange") == "an orange" and with_article("scissors") == "scissors"
    assert questions.presence("elephant") == "Is there an elephant in the image?"
    assert questions.listing(["car", "dog"]) == "A dog and a car."
    assert all(
        coco_ids.category(name) in coco_ids.CATEGORIES
        for name in CLASSES
        if coco_ids.category(name)
    )
