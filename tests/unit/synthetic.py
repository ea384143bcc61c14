"""A made-up run of the demo with a known curve per kind, for tests of what shows results."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from vllm_flow.block_counts import predict_blocks
from vllm_flow.demo import material
from vllm_flow.demo.kinds import BY_KEY, KINDS, how_many
from vllm_flow.demo.measurements import Answer, Engine, Question, Reading, Results, Setting
from vllm_flow.demo.rows import flow_of, ideal_speedup, layers_that_see, summarise
from vllm_flow.demo_model.facts import Facts, Sign, Thing
from vllm_flow.demo_model.questions import caption
from vllm_flow.eval.tasks import Item
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.spans import ImageSpans

ENGINE = Engine(
    model="synthetic",
    dtype="float32",
    num_layers=30,
    group_starts=DecoderLayers(30).group_starts(2),
    block_size=32,
    vllm="0",
    torch="0",
    device="none",
)
IMAGE_TOKENS = 144
CLIFFS = (*range(0, 30, 2), 30)
FEW_CLIFFS = (0, 10, 20, 30)
POLICIES = {
    "fastv": FlowPolicy(((Stage(2, Fraction(1, 2), "last_prompt"),),)),
    "0:1/3 uniform": FlowPolicy(((Stage(0, Fraction(1, 3), "uniform"),),)),
    "0:1/3 diversity": FlowPolicy(((Stage(0, Fraction(1, 3), "diversity"),),)),
}
"""Beside the cliffs, where there are any; of 144 tokens a third is whole."""
LEVEL = {"yes_no": 0.97, "choice": 0.9, "words": 0.85, "captions": 0.9, "unseen_style": 0.75}
"""Share of right answers from `SEEN_FROM` on."""
SEEN_FROM = {"yes_no": 12, "choice": 14, "words": 20, "captions": 16, "unseen_style": 12}
"""Below it the share sinks to guessing at cliff 2."""
THINGS = ("dog", "hot dog", "car", "mouse", "bus", "wine glass")


def picture(path: Path, seed: int) -> Path:
    """Three discs."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    image = Image.new("RGB", (112, 112), tuple(rng.randrange(150, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, size = rng.randrange(70), rng.randrange(70), rng.randrange(15, 40)
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.ellipse((x, y, x + size, y + size), fill=colour)
    image.save(path)
    return path


def synthetic_item(key: str, number: int, path: str, rng: random.Random) -> Item:
    """A question of a kind, as its task would read it."""
    name = f"{key}-{number}"
    if key == "choice":
        text = "Which of these?\nA. dog\nB. car\nC. bus\nAnswer with the option's letter."
        return Item(name, text, path, {"answer": rng.choice("ABC"), "has_image": True})
    if key == "words":
        return Item(name, "What is written?\nOne word.", path, {"answers": ["moon"] * 9 + ["sign"]})
    if key == "captions":
        return Item(name, "Describe.", path, {"objects": sorted(rng.sample(THINGS, 2))})
    truth = {"label": ("yes", "no")[number % 2]}
    return Item(name, "Is there a dog?\nOne word.", path, truth, "random")


def said(question: Question, right: bool) -> str:
    """A right answer, or a wrong one."""
    truth = question.item.truth
    if question.kind == "captions":
        names = truth["objects"] if right else [n for n in THINGS if n not in truth["objects"]][:2]
        things = tuple(Thing(name, (0, 0, 9, 9)) for name in names for _ in range(2))
        return caption(Facts(things, (Sign("moon", (0, 0, 9, 9)),)))
    if question.kind == "words":
        return "Moon" if right else "lake"
    if question.kind == "choice":
        return truth["answer"] if right else {"A": "B", "B": "C", "C": "A"}[truth["answer"]]
    other = {"yes": "no", "no": "yes"}[truth["label"]]
    return (truth["label"] if right else other).capitalize()


def synthetic_results(
    directory: Path,
    headline: int = 40,
    cliffs: tuple[int, ...] = CLIFFS,
    policies: Mapping[str, FlowPolicy] | None = None,
) -> Results:
    """Each kind rises from guessing at cliff 2 to its level; blocks as predicted.

    Under a policy a kind is as good as at a cliff of four layers more than those of equal cost.
    """
    policies = policies or {}
    rng = random.Random(1)
    questions = []
    for kind in KINDS:
        for number in range(how_many(kind, headline)):
            path = str(picture(directory / f"{kind.key}-{number}.png", number))
            item = synthetic_item(kind.key, number, path, rng)
            questions.append(material.question(kind, item))
    answers = []
    for question in questions:
        luck = rng.random()
        prompt = IMAGE_TOKENS + rng.randrange(28, 36)
        asked = cliffs if BY_KEY[question.kind].every_cliff else FEW_CLIFFS
        for setting in (*asked, *policies):
            flow = flow_of(setting, ENGINE, policies)
            seen = setting if isinstance(setting, int) else 4 + cost(flow)
            share = min(max((seen - 2) / (SEEN_FROM[question.kind] - 2), 0), 1)
            right = luck < question.chance + share * (LEVEL[question.kind] - question.chance)
            answers.append(synthetic_answer(question, setting, flow, prompt, said(question, right)))
    timed = [a for a in answers if a.question_id.startswith("yes_no")]
    speedups = {}
    for setting in (*cliffs, *policies):
        gained = ideal_speedup(ENGINE, flow_of(setting, ENGINE, policies), timed) - 1
        speedups[setting] = [1 + gained * rng.uniform(0.8, 0.95) for _ in range(5)]
    return summarise(ENGINE, questions, answers, speedups, policies)


def cost(flow: FlowPolicy | None) -> float:
    """Layers through which an image token goes, on average."""
    return layers_that_see(ENGINE, flow, [dataclasses.replace(NOTHING, image_tokens=IMAGE_TOKENS)])


NOTHING = Answer("", 0, "", Reading(0, {}), 0, 0, 0, ())


def synthetic_answer(
    question: Question, setting: Setting, flow: FlowPolicy | None, prompt: int, text: str
) -> Answer:
    """An answer whose blocks are the predicted ones."""
    spans = ImageSpans.from_ranges([(20, 20 + IMAGE_TOKENS)])
    layout = TokenLayout.of(flow, spans, prompt)
    computed = prompt + (20 if BY_KEY[question.kind].key == "captions" else 1)
    return Answer(
        question_id=question.id,
        cliff=setting if isinstance(setting, int) else None,
        policy=setting if isinstance(setting, str) else None,
        said=text,
        reading=material.read_answer(question, text),
        prompt_tokens=prompt,
        image_tokens=IMAGE_TOKENS,
        computed_tokens=computed,
        blocks=predict_blocks(computed, layout, ENGINE.group_starts, ENGINE.block_size),
    )


def answers_of(results: Results, kind: str, cliff: int) -> list[Answer]:
    ids = {question.id for question in results.of_kind(kind)}
    return [a for a in results.answers if a.cliff == cliff and a.question_id in ids]
