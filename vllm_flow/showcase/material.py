"""What the demo asks and how it reads the answers: held-out questions, prompts, scoring.

Knows `vllm_flow.demo` and Hugging Face's processors; nothing of engines.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from vllm_flow.showcase.records import HEADLINE, SPLIT_TITLES, Caption, Question, Scene


def held_out(count: int) -> list[Question]:
    """`count` held-out questions of the headline split, at most a quarter of it of each other one.

    Chosen at random with a fixed seed, so that every run asks the same.
    """
    from vllm_flow.demo.heldout import load_questions

    chosen = []
    for split in SPLIT_TITLES:
        questions = [
            Question(
                question_id=str(item.question_id),
                image_path=item.image_path,
                text=item.text,
                label=item.label,
                split=split,
            )
            for item in load_questions(split)
        ]
        limit = count if split == HEADLINE else -(-count // 4)
        if len(questions) > limit:
            kept = sorted(random.Random(0).sample(range(len(questions)), limit))
            questions = [questions[index] for index in kept]
        chosen += questions
    return chosen


def scenes(count: int) -> list[Scene]:
    """Pictures with known objects to be listed, chosen at random with a fixed seed."""
    from vllm_flow.demo.heldout import load_scenes

    found = [
        Scene(image_path=item.image_path, objects=tuple(item.objects), split=item.split)
        for item in load_scenes()
    ]
    return random.Random(0).sample(found, min(count, len(found)))


def demo_prompt() -> Callable[[str], str]:
    """The demo model's prompt format."""
    from vllm_flow.demo.heldout import build_prompt

    return build_prompt


def template_prompt(model: str) -> Callable[[str], str]:
    """Another model's prompt format: the chat template of its processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)

    def build(text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    return build


def question_text(question: Question) -> str:
    """The question with what tells the model to answer in one word (POPE's protocol)."""
    from vllm_flow.demo.heldout import ANSWER_SUFFIX

    return question.text + ANSWER_SUFFIX


def caption_text() -> str:
    """What asks for a list of the objects in a picture."""
    from vllm_flow.demo.heldout import CAPTION_REQUEST

    return CAPTION_REQUEST


def is_right(question: Question, said: str) -> bool:
    """Whether an answer counts as right, by POPE's rule for reading yes and no."""
    from vllm_flow.demo.heldout import parse_yes_no

    return parse_yes_no(said) == question.label


def caption_of(scene: Scene, cliff: int, said: str) -> Caption:
    """A caption with the objects it names, rightly and wrongly."""
    from vllm_flow.demo.heldout import score_caption

    score = score_caption(said, scene.objects)
    return Caption(scene, cliff, said, score.mentioned, score.hallucinated, score.missed)
