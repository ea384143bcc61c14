"""Measures the assembled models with transformers: ``python -m vllm_flow.demo.training.measure``.

Presence accuracy per split, without the image, and with the image rows removed from layer L on;
captions at the baseline. Writes ``weights/measured.json``; ``card`` makes the model card from it.

An answer is the most likely next token, decoded and read by POPE's rule: the models answer with one
word. Letters: T rows of a pack, N rows of it that are not image rows, D hidden width.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vllm_flow.demo.assemble import WEIGHTS, assemble, assemble_small
from vllm_flow.demo.heldout import (
    ANSWER_SUFFIX,
    SPLITS,
    Question,
    load_questions,
    load_scenes,
    parse_yes_no,
    score_caption,
)
from vllm_flow.demo.training.packs import Ask, Packer, additive_mask

MEASURED = WEIGHTS / "measured.json"


class Probe:
    """A LLaVA checkpoint in float32 that can drop its image rows before any layer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.packer = Packer(self.processor.tokenizer.backend_tokenizer)
        self.llama = self.model.model.language_model

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.llama.layers)

    def answers(self, image: Path, texts: list[str], cliffs: Iterable[int]) -> dict[int, list[str]]:
        """Cliff -> first answer token of each text; the cliff ``layers`` is the full model.

        With cliff L the image rows pass layers 0 .. L-1 and are gone from layer L on; positions of
        the other rows stay as they are.
        """
        batch = self.packer.batch([[Ask(text, "Yes") for text in texts]])
        pixel_values = self.processor.image_processor(
            Image.open(image).convert("RGB"), return_tensors="pt"
        )["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixel_values).pooler_output[0]
        rows_TD = self.llama.embed_tokens(batch.tokens_BT)[0]
        rows_TD[batch.image] = features.reshape(-1, rows_TD.shape[-1])
        keep = torch.ones(len(rows_TD), dtype=torch.bool)
        keep[batch.image] = False
        # Row of each segment's answer, counted without the image rows, which all lie before it.
        asked = torch.tensor(batch.first_B[0]) - (batch.image.stop - batch.image.start)
        positions, allowed = batch.positions_BT, batch.allowed_BTT

        states = [rows_TD]
        for number in range(self.layers):
            states.append(self._layer(number, states[-1], positions, allowed))
        answers = {}
        for cliff in cliffs:
            state_ND = states[cliff][keep]
            for number in range(cliff, self.layers):
                state_ND = self._layer(
                    number, state_ND, positions[:, keep], allowed[:, keep][:, :, keep]
                )
            best = self.model.lm_head(self.llama.norm(state_ND[asked])).argmax(-1)
            answers[cliff] = [self.processor.tokenizer.decode([i]) for i in best.tolist()]
        return answers

    def _layer(
        self, number: int, rows: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """One decoder layer on [rows, D]."""
        out = self.llama.layers[number](
            rows[None],
            attention_mask=additive_mask(allowed, torch.float32),
            position_ids=positions,
            position_embeddings=self.llama.rotary_emb(rows[None], positions),
        )
        return (out[0] if isinstance(out, tuple) else out)[0]

    def caption(self, image: Path, prompt: str) -> str:
        """Greedy caption."""
        inputs = self.processor(
            images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt"
        )
        out = self.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return self.processor.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def presence(
    probe: Probe, questions: list[Question], cliffs: list[int], suffix: str
) -> dict[str, dict[str, float]]:
    """Cliff -> accuracy and share of answers that are yes; plus the number of questions."""
    by_image: dict[Path, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[question.image_path].append(question)
    right: dict[int, int] = defaultdict(int)
    yes: dict[int, int] = defaultdict(int)
    for image, asked in by_image.items():
        answers = probe.answers(image, [q.text + suffix for q in asked], cliffs)
        for cliff, words in answers.items():
            said = [parse_yes_no(word) for word in words]
            right[cliff] += sum(s == q.label for s, q in zip(said, asked, strict=True))
            yes[cliff] += said.count("yes")
    total = len(questions)
    return {
        str(cliff): {
            "accuracy": round(right[cliff] / total, 4),
            "yes": round(yes[cliff] / total, 4),
            "questions": total,
        }
        for cliff in cliffs
    }


def captions(probe: Probe, split: str, limit: int) -> dict[str, Any]:
    """CHAIR-like figures of the greedy captions of a split's first ``limit`` scenes."""
    mentioned = hallucinated = missed = objects = with_one = exact = 0
    scenes = load_scenes(split)[:limit]
    for scene in scenes:
        text = probe.caption(scene.image_path, scene.prompt)
        score = score_caption(text, scene.objects)
        mentioned += len(score.mentioned)
        hallucinated += len(score.hallucinated)
        missed += len(score.missed)
        objects += len(scene.objects)
        with_one += bool(score.hallucinated)
        exact += text.strip() == scene.caption
    return {
        "scenes": len(scenes),
        "hallucinated_of_mentioned": round(hallucinated / max(1, mentioned), 4),
        "captions_with_a_hallucination": round(with_one / len(scenes), 4),
        "recall": round(1 - missed / objects, 4),
        "exact": round(exact / len(scenes), 4),
    }


def main() -> None:
    """Measure what ``--only`` names and update the file after every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the small model instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", type=int, default=2, help="of the layer sweep")
    parser.add_argument("--captions", type=int, default=60, help="scenes to caption per split")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kind = "small-model" if args.small else "demo-model"
    probe = Probe(assemble_small() if args.small else assemble())
    results: dict[str, Any] = {"presence": {}, "captions": {}}

    def store() -> None:
        known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
        MEASURED.write_text(json.dumps({**known, kind: results}, indent=1) + "\n")
        print(json.dumps(results), flush=True)

    for split in SPLITS:
        results["presence"][split] = presence(
            probe, load_questions(split), [0, probe.layers], ANSWER_SUFFIX
        )
        store()
    results["presence_without_suffix"] = {
        "seen": presence(probe, load_questions("seen"), [probe.layers], "")
    }
    store()
    for split in () if args.small else ("seen", "unseen_style"):
        results["captions"][split] = captions(probe, split, args.captions)
        store()
    cliffs = list(range(0, probe.layers + 1, 1 if args.small else args.step))
    results["sweep"] = presence(probe, load_questions("seen"), cliffs, ANSWER_SUFFIX)
    store()


if __name__ == "__main__":
    main()
