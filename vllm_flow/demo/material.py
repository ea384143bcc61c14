"""What the demo asks and how it reads the answers: held-out questions, prompts, scoring.

Questions, prompts and rules are those of the evaluation's tasks on the files that
`vllm_flow.demo_model.datasets` writes. Knows these and Hugging Face's processors; nothing of engines.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo.kinds import BY_KEY, KINDS, Kind, how_many
from vllm_flow.demo.measurements import Question, Reading
from vllm_flow.eval.tasks import Item, get_task

SEED = 0
"""Decides all draws: every run asks the same."""


def held_out(headline: int, folder: Path) -> list[Question]:
    """Questions of every kind: so many of the headline's, the others in their share of it.

    One per picture and kind, so that the answers of a kind are nearly independent; fewer where there
    are fewer pictures. Their files are written below `folder`, as the evaluation reads them.
    """
    return [
        question(kind, item)
        for kind in KINDS
        for item in draw(kind, how_many(kind, headline), folder)
    ]


def draw(kind: Kind, count: int, folder: Path) -> list[Item]:
    """At most `count` items of a kind, one per picture."""
    if kind.task == "chair":
        return captioned(kind, count)
    from vllm_flow.demo_model.datasets import pope, textvqa, write_datasets

    per_picture = {"pope": 2 * pope.PER_PICTURE, "textvqa": textvqa.PER_SIGN}.get(kind.data, 1)
    home = folder / kind.split
    write_datasets(home, count * per_picture, SEED, kind.split, [kind.data])
    return one_per_picture(get_task(kind.task).read(home / kind.data), count)


def one_per_picture(items: Sequence[Item], count: int) -> list[Item]:
    """Items on `count` pictures, drawn; where they have labels, these take turns.

    POPE asks each picture several times with either answer, so that all but the balance is chance.
    """
    rng = random.Random(SEED)
    by_picture: dict[str, list[Item]] = {}
    for item in items:
        if item.image is not None:
            by_picture.setdefault(item.image, []).append(item)
    pictures = sorted(by_picture)
    rng.shuffle(pictures)
    chosen = []
    for number, picture in enumerate(pictures[:count]):
        wanted = ("yes", "no")[number % 2]
        fitting = [i for i in by_picture[picture] if i.truth.get("label", wanted) == wanted]
        chosen.append(rng.choice(fitting or by_picture[picture]))
    return chosen


def captioned(kind: Kind, count: int) -> list[Item]:
    """CHAIR's request on scenes with things in them; the truth is what `score_caption` takes.

    Not CHAIR's own truth and rule: these know COCO's categories only, and a page that marks some of
    the invented things and not others would mislead.
    """
    from vllm_flow.demo_model.heldout import load_scenes
    from vllm_flow.eval.tasks.chair import PROMPT

    scenes = [scene for scene in load_scenes(kind.split) if scene.objects]
    return [
        Item(
            id=scene.image_path.stem,
            text=PROMPT,
            image=str(scene.image_path),
            truth={"objects": list(scene.objects)},
        )
        for scene in random.Random(SEED).sample(scenes, min(count, len(scenes)))
    ]


def question(kind: Kind, item: Item) -> Question:
    """An item with its right answer in words, and what guessing is worth."""
    truth = item.truth
    if kind.data == "pope":
        return Question(kind.key, item, truth["label"], 1 / 2)
    if kind.data == "scienceqa":
        given = options(item.text)
        right = f"{truth['answer']}. {given[truth['answer']]}"
        return Question(kind.key, item, right, 1 / len(given))
    if kind.data == "textvqa":
        from vllm_flow.demo_model.vocabulary import WORDS

        # Who knew which words there are, and nothing else, could name one of them.
        word, _ = Counter(truth["answers"]).most_common(1)[0]
        return Question(kind.key, item, word, 1 / len(WORDS))
    return Question(kind.key, item, ", ".join(truth["objects"]), 0)


def options(text: str) -> dict[str, str]:
    """Letter -> choice, of a multiple-choice question as it is asked."""
    return dict(re.findall(r"^([A-E])\. (.*)$", text, flags=re.MULTILINE))


def read_answer(asked: Question, said: str) -> Reading:
    """What an answer is worth by its task's rule."""
    kind = BY_KEY[asked.kind]
    if kind.task == "chair":
        return read_caption(said, asked.item.truth)
    scored = get_task(kind.task).score(asked.item, said)
    return Reading(scored.score, {"points": scored.score, "answers": 1.0})


def read_caption(said: str, truth: Mapping[str, Any]) -> Reading:
    """The things that a caption names, against those in the picture."""
    from vllm_flow.demo_model.heldout import score_caption

    score = score_caption(said, truth["objects"])
    named, invented = len(score.mentioned), len(score.hallucinated)
    shown = len(truth["objects"])
    counts = {
        "named": float(named),
        "invented": float(invented),
        "shown": float(shown),
        "found": float(shown - len(score.missed)),
    }
    share = (named - invented) / named if named else 0.0
    return Reading(share, counts, score.mentioned, score.hallucinated)


def picture_of(asked: Question) -> Any:
    """The picture (PIL, RGB), before the model's own processor; a square, so there is nothing to pad."""
    from vllm_flow.eval.tasks import load_image

    return load_image(str(asked.picture))


def demo_prompt() -> Callable[[str], str]:
    """The demo model's prompt format."""
    from vllm_flow.demo_model.heldout import build_prompt

    return build_prompt


def template_prompt(model: str, trust_remote_code: bool) -> Callable[[str], str]:
    """Another model's prompt format: its chat template.

    Raises:
        ValueError: the model cannot be read, or has none.
    """
    from vllm_flow.eval.sweep.model_facts import read_facts

    conversation = read_facts(model, "chat-template", trust_remote_code).conversation
    return lambda text: conversation.prompt(text, image=True)
