"""The held-out material is consistent, balanced and kept apart from training; answers are read right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vllm_flow.demo_model import heldout
from vllm_flow.demo_model.facts import Facts, Sign, Thing
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, listing, presence
from vllm_flow.demo_model.vocabulary import CLASSES, counted, plural


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("no", "no"),
        ("No.", "no"),
        ("No, there is not.", "no"),
        ("There is not a dog", "no"),
        ("Yes", "yes"),
        ("", "yes"),
        ("NO", "yes"),
        ("Not at all", "yes"),
        ("No!", "yes"),
        ("No\n", "yes"),
        ("There isn't", "yes"),
        ("nothing", "yes"),
        ("Yes. No", "yes"),
        (" no", "no"),
        (".no", "yes"),
        ("n,o", "no"),
    ],
)
def test_parse_rule_is_popes(text: str, expected: str) -> None:
    assert heldout.parse_yes_no(text) == expected


def test_questions_have_popes_fields_and_unique_ids() -> None:
    questions = heldout.load_questions()
    assert len({q.question_id for q in questions}) == len(questions)
    assert {q.label for q in questions} == {"yes", "no"}
    assert {q.split for q in questions} == set(heldout.SHIPPED)
    assert questions == heldout.load_questions()
    parts = [heldout.load_questions(split) for split in heldout.SHIPPED]
    assert questions == [question for part in parts for question in part]


@pytest.mark.parametrize("split", heldout.SHIPPED)
def test_labels_are_balanced(split: str) -> None:
    labels = Counter(q.label for q in heldout.load_questions(split))
    assert labels["yes"] == labels["no"] > 0


def test_labels_are_balanced_picture_by_picture() -> None:
    """Nor does it help to know which picture a question is about."""
    said: dict[object, Counter[str]] = {}
    for question in heldout.load_questions():
        said.setdefault(question.image_path, Counter())[question.label] += 1
    assert all(labels["yes"] == labels["no"] in (1, 2) for labels in said.values())


@pytest.mark.parametrize("split", heldout.SHIPPED)
def test_a_question_alone_tells_nothing_about_its_label(split: str) -> None:
    # A reader of the text alone, who knows every label, must stay near one half.
    counts = Counter((q.text, q.label) for q in heldout.load_questions(split))
    texts = {text for text, _ in counts}
    best = sum(max(counts[text, "yes"], counts[text, "no"]) for text in texts)
    assert best / counts.total() < 0.55


def test_enough_questions_and_scenes() -> None:
    assert len(heldout.load_questions("seen")) >= 2000
    assert len(heldout.load_scenes("seen")) >= 500
    assert len(heldout.load_scenes("unseen_style")) >= 20
    assert len({q.text for q in heldout.load_questions("seen")}) == len(CLASSES)
    assert heldout.load_scenes("unseen_photos") == []  # known, but not shipped


def test_labels_agree_with_the_scenes() -> None:
    scenes = {scene.image_path: scene for scene in heldout.load_scenes()}
    name_of = {presence(name): name for name in CLASSES}
    for question in heldout.load_questions():
        present = name_of[question.text] in scenes[question.image_path].objects
        assert question.label == ("yes" if present else "no"), question


def test_captions_name_exactly_the_objects() -> None:
    for scene in heldout.load_scenes():
        score = heldout.score_caption(scene.caption, scene.objects)
        assert score.mentioned == scene.objects
        assert not score.hallucinated and not score.missed
        assert scene.caption == listing(scene.objects)


def test_pictures_are_there_and_small() -> None:
    pictures = {scene.image_path for scene in heldout.load_scenes()}
    assert pictures == {p for p in heldout.DATA.rglob("*") if p.suffix not in (".md", ".jsonl", "")}
    assert sum(path.stat().st_size for path in pictures) < 5_000_000
    for path in pictures:
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("WEBP", (168, 168))


@pytest.mark.parametrize("load", [heldout.load_questions, heldout.load_scenes])
def test_unknown_split_is_refused(load: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="use one of seen, unseen_style, unseen_photos"):
        load("test")


def test_a_folder_without_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make scenes with .*heldout_data"):
        heldout.load_scenes(folder=tmp_path)


def test_score_caption_counts_sets() -> None:
    score = heldout.score_caption("Two dogs, a bus and a scarf; a dog.", ["dog", "cat"])
    assert score.mentioned == ("dog", "bus")  # "scarf" is not "car", and a repetition counts once
    assert score.hallucinated == ("bus",)
    assert score.missed == ("cat",)


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("A hot dog.", ["hot dog"]),
        ("A dog and a hot dog.", ["dog", "hot dog"]),
        ("A teddy bear beside two bears.", ["bear", "teddy bear"]),
        ("Two wine glasses and a glass.", ["wine glass"]),
        ("Three mice on a potted plant.", ["mouse", "potted plant"]),
        ("A keyboard, a birdhouse and scissors.", ["keyboard", "scissors"]),
    ],
)
def test_of_names_within_names_the_longest_counts(text: str, mentioned: list[str]) -> None:
    assert heldout.score_caption(text, ["dog"]).mentioned == tuple(mentioned)


def test_the_longest_counts_of_names_that_begin_alike() -> None:
    names = ["tea", "tea cup", "cup"]
    assert heldout.score_caption("A tea cup.", [], names).mentioned == ("tea cup",)
    assert heldout.score_caption("Tea in a cup.", [], names).mentioned == ("tea", "cup")


@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(1, 5)), max_size=6), st.randoms())
def test_every_name_and_plural_is_found_in_any_order(
    named: list[tuple[str, int]], rng: random.Random
) -> None:
    parts = [counted(name, count) for name, count in named]
    rng.shuffle(parts)
    score = heldout.score_caption(", ".join(parts), CLASSES[:10])
    names = {name for name, _ in named}
    assert set(score.mentioned) == names
    assert set(score.hallucinated) == names - set(CLASSES[:10])
    assert set(score.missed) == set(CLASSES[:10]) - names


def test_no_name_or_plural_stands_for_two_classes() -> None:
    forms = [form for name in CLASSES for form in {name, plural(name)}]
    assert len(forms) == len(set(forms))


def test_prompt_holds_one_image_token_before_the_text() -> None:
    question = heldout.load_questions("seen")[0]
    head, tail = question.prompt.split("<empty_output>")
    assert head.endswith("<|im_start|>user\n")
    assert tail == question.text + ANSWER_SUFFIX + "<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_renders_the_same_prompt() -> None:
    jinja2 = pytest.importorskip("jinja2")
    from vllm_flow.demo_model.prompt import CHAT_TEMPLATE, build_prompt

    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    for kind in ("image", "image_url"):
        content = [{"type": "text", "text": "Is there a dog?"}, {"type": kind}]
        rendered = template.render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert rendered == build_prompt("Is there a dog?")


def test_boxes_lie_in_the_pictures() -> None:
    for scene in heldout.load_scenes():
        for thing in [*scene.facts.things, *scene.facts.signs]:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 168 and 0 <= top < bottom <= 168


def test_only_things_that_come_once_have_a_box() -> None:
    things = (
        Thing("cat", (0, 0, 9, 9)),
        Thing("dog", (1, 2, 30, 40)),
        Thing("cat", (50, 50, 60, 60)),
    )
    facts = Facts(things, (Sign("open", (100, 0, 140, 20)),))
    scene = heldout.HeldoutScene(Path("0000.webp"), facts, "seen")
    assert scene.boxes == {"dog": (1, 2, 30, 40)}
    assert scene.objects == ("dog", "cat")
    assert scene.caption == "A dog and a cat."


def test_most_scenes_have_two_boxes_or_more() -> None:
    scenes = heldout.load_scenes("seen")
    assert sum(len(scene.boxes) > 1 for scene in scenes) > len(scenes) / 2
    for scene in scenes:
        assert set(scene.boxes) == {n for n, count in scene.facts.counts.items() if count == 1}
