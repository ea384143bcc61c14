"""Makes held-out scenes: ``python -m vllm_flow.demo_model.training.heldout_data --work DIR --out DIR``.

Four splits, each of scenes whose seeds training never draws from: `seen` drawings; `unseen_style`, the
same classes as drawn by OpenMoji; `unseen_photos`, photo cut-outs that training never saw; and
`unseen_backgrounds`, seen drawings on patterns and photographs that training never shows. Pictures of
`unseen_photos` hold Tux Paint stamps (GPL-2), half of those of `unseen_backgrounds` desktop pictures of
mate-backgrounds: neither is shipped. What is shipped: ``--count seen=550 unseen_style=40``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from vllm_flow.counts import counted
from vllm_flow.demo_model.heldout import SPLITS, HeldoutScene
from vllm_flow.demo_model.scenes import HELDOUT_SEEDS, Palette, Style, compose
from vllm_flow.demo_model.training.sprites import Assets, load_assets

STYLE = Style(sign_share=0.8)
"""Most pictures have a sign, so that few pictures make many questions."""
QUALITY = 75
"""Of the WebP pictures: 4 kB each."""
COUNTS = dict.fromkeys(SPLITS, 640)
"""Scenes per split, enough for 500 items of every task."""


def palette_of(split: str, assets: Assets) -> Palette:
    """What the scenes of a split are made of."""
    if split == "unseen_style":
        return Palette(assets.unseen_drawings)
    if split == "unseen_photos":
        return Palette(assets.unseen_photos)
    if split == "unseen_backgrounds":
        return Palette(assets.drawings, assets.unseen_backgrounds, 0.5, unseen_backgrounds=True)
    return Palette(assets.drawings)


def write_scenes(
    assets: Assets, out: Path, counts: Mapping[str, int] = COUNTS
) -> list[HeldoutScene]:
    """Write so many pictures of each split, and ``scenes.jsonl``, below ``out``."""
    made = []
    for split, count in counts.items():
        # A range of its own for each split, whichever splits are asked for.
        first = HELDOUT_SEEDS.start + SPLITS.index(split) * 100_000_000
        (out / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            scene = compose(first + number, palette_of(split, assets), STYLE)
            path = out / split / f"{number:04d}.webp"
            scene.image.save(path, "WEBP", quality=QUALITY, method=6)
            made.append(HeldoutScene(path, scene.facts, split))
    rows = [
        {
            "image": scene.image_path.relative_to(out).as_posix(),
            "split": scene.split,
            **scene.facts.as_json(),
        }
        for scene in made
    ]
    (out / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def split_count(text: str) -> tuple[str, int]:
    """``seen=500`` -> its two parts; argparse's error for another form or an unknown split."""
    split, _, count = text.partition("=")
    if split not in SPLITS or not count.isdecimal() or not int(count):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give SPLIT=NUMBER with one of {', '.join(SPLITS)}"
        )
    return split, int(count)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with the downloads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--count",
        type=split_count,
        nargs="+",
        metavar="SPLIT=N",
        help="scenes per split (default: 640 of each)",
    )
    args = parser.parse_args()
    counts = COUNTS if args.count is None else dict(args.count)
    made = write_scenes(load_assets(args.work), args.out, counts)
    size = sum(scene.image_path.stat().st_size for scene in made)
    print(f"{counted(len(made), 'picture')}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
