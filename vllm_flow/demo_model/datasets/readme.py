"""The README and `about.json` that are written beside the files: what they are, and what they are not.

Reports of an evaluation quote the note in `about.json`, so that no score passes for a benchmark's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_flow.demo_model.coco_ids import category
from vllm_flow.demo_model.datasets.common import write_json
from vllm_flow.demo_model.vocabulary import CLASSES

COCO = [name for name in CLASSES if category(name) is not None]

NOTE = (
    "The questions are vLLM-Flow's own, on its demo pictures, in the file formats of these benchmarks "
    "and scored by their rules: read POPE-style for POPE, and so on. Scores are not benchmark scores."
)

ABOUT = {
    "pope": "POPE-style: is there a certain thing in the picture? Three files, as in POPE.",
    "scienceqa": (
        "ScienceQA-style: multiple choice over what a picture shows; one problem in six has no "
        "picture, and these the demo model was never taught."
    ),
    "textvqa": "TextVQA-style: words on signs, with the tokens of a word reader that makes mistakes.",
    "chair": (
        f"CHAIR-style: COCO annotations of the scenes. {len(COCO)} of the demo's {len(CLASSES)} classes "
        "are COCO categories; the scorer neither finds the others in a caption nor misses them."
    ),
    "places": "Left and right, in POPE's format: the question and its reverse.",
    "counting": "How many there are of a thing, in TextVQA's format.",
}

TEXT = """# The demo's pictures in four benchmarks' file formats

Written by `python -m vllm_flow.demo_model.datasets` with seed {seed} from the held-out split `{split}` of
vLLM-Flow's demo: small composed pictures, made for its small demo model.

**These are not the benchmarks.** Only file formats and scoring rules are theirs; pictures and
questions are not. Call a result on them "POPE-style" and so on, and never set it beside a published
score. They exist so that the whole evaluation can be run and checked without a download. For the real
thing, give the evaluation a folder with the official files of the same names.

| folder | items | what it holds |
|---|---|---|
{rows}

Pictures: {licence} Authors, sources and licences: `vllm_flow/demo_model/data/ATTRIBUTION.md`.
"""

LICENCES = {
    "seen": (
        "composed of drawings from Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, "
        "CC-BY-4.0) and Fluent Emoji (Microsoft, MIT)."
    ),
    "unseen_style": (
        "adapted from OpenMoji (HfG Schwäbisch Gmünd and contributors) and, like it, under "
        "CC-BY-SA-4.0; who passes them on keeps that licence."
    ),
    "unseen_photos": "cut-outs from Tux Paint stamps (GPL-2): not to be passed on with this licence.",
    "unseen_backgrounds": (
        "drawings as in `seen`, half of them on desktop pictures of mate-backgrounds (GPL-2)."
    ),
}


def write_readme(out: Path, counts: Mapping[str, int], seed: int, split: str) -> None:
    """Write `README.md` and `about.json` into `out`."""
    write_json(
        {"note": NOTE, "seed": seed, "split": split, "items": dict(counts)}, out / "about.json"
    )
    rows = "\n".join(f"| `{name}/` | {count} | {ABOUT[name]} |" for name, count in counts.items())
    text = TEXT.format(seed=seed, split=split, rows=rows, licence=LICENCES[split])
    (out / "README.md").write_text(text, encoding="utf-8")
