"""The held-out material is consistent, balanced and kept apart from training; answers are read right."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from vllm_flow.demo import heldout
from vllm_flow.demo.classes import (
    ANSWER_SUFFIX,
    CLASSES,
    caption_of,
    presence_question,
    with_article,
)


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
    assert {q.split for q in questions} == set(heldout.SPLITS)


@pytest.mark.parametrize("split", heldout.SPLITS)
def test_labels_are_balanced(split: str) -> None:
    labels = Counter(q.label for q in heldout.load_questions(split))
    assert labels["yes"] == labels["no"] > 0


def test_a_question_alone_tells_nothing_about_its_label() -> None:
    # A reader of the text alone, who knows every label, must stay near one half.
    counts = Counter((q.text, q.label) for q in heldout.load_questions("seen"))
    texts = {text for text, _ in counts}
    best = sum(max(counts[text, "yes"], counts[text, "no"]) for text in texts)
    assert best / counts.total() < 0.55


def test_enough_questions_and_scenes() -> None:
    assert len(heldout.load_questions("seen")) >= 240
    assert 80 <= len(heldout.load_scenes("seen")) <= 120
    assert len(heldout.load_scenes("unseen_style")) >= 20
    assert len({q.image_path for q in heldout.load_questions("photo")}) >= 6


def test_labels_agree_with_the_scenes() -> None:
    scenes = {scene.image_path: scene for scene in heldout.load_scenes()}
    name_of = {presence_question(name): name for name in CLASSES}
    for question in heldout.load_questions():
        name = name_of[question.text]
        if question.split != "photo":
            present = name in scenes[question.image_path].objects
            assert question.label == ("yes" if present else "no"), question


def test_captions_name_exactly_the_objects() -> None:
    for scene in heldout.load_scenes():
        score = heldout.score_caption(scene.caption, scene.objects)
        assert score.mentioned == scene.objects
        assert not score.hallucinated and not score.missed
        assert scene.caption == caption_of(scene.objects).capitalize()


def test_pictures_are_there_and_small() -> None:
    pictures = {q.image_path for q in heldout.load_questions()}
    assert pictures == {p for p in heldout.DATA.rglob("*") if p.suffix in (".png", ".jpg")}
    assert sum(path.stat().st_size for path in pictures) < 5_000_000
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size in ((112, 112), (224, 224))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="seen, unseen_style, photo"):
        heldout.load_questions("test")


def test_score_caption_counts_sets() -> None:
    score = heldout.score_caption("Two dogs, a bus and a scarf; a dog.", ["dog", "cat"])
    assert score.mentioned == ("dog", "bus")  # "scarf" is not "car", and a repetition counts once
    assert score.hallucinated == ("bus",)
    assert score.missed == ("cat",)


def test_captions_read_as_sentences() -> None:
    assert caption_of(["tree", "dog", "apple"]) == "a dog, a tree and an apple."
    assert caption_of(["elephant"]) == "an elephant."
    assert with_article("umbrella") == "an umbrella"


def test_prompt_holds_one_image_token_before_the_text() -> None:
    question = heldout.load_questions("seen")[0]
    head, tail = question.prompt.split("<empty_output>")
    assert head.endswith("<|im_start|>user\n")
    assert tail == question.text + ANSWER_SUFFIX + "<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_renders_the_same_prompt() -> None:
    jinja2 = pytest.importorskip("jinja2")
    from vllm_flow.demo.prompt import CHAT_TEMPLATE, build_prompt

    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    for kind in ("image", "image_url"):
        content = [{"type": "text", "text": "Is there a dog?"}, {"type": kind}]
        rendered = template.render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert rendered == build_prompt("Is there a dog?")


def test_every_composed_picture_has_its_objects_boxes() -> None:
    boxes = heldout.load_boxes()
    scenes = heldout.load_scenes()
    assert set(boxes) == {scene.image_path for scene in scenes}
    for scene in scenes:
        assert set(boxes[scene.image_path]) == set(scene.objects)
        with Image.open(scene.image_path) as image:
            for left, top, right, bottom in boxes[scene.image_path].values():
                assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
