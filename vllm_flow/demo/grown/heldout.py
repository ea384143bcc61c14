"""Held-out scenes of the grown model: made with ``python -m vllm_flow.demo.grown.heldout``, and read back.

Four splits, each of scenes whose seeds training never draws from: `seen` drawings; `unseen_style`, the
same classes as drawn by OpenMoji; `unseen_photos`, photo cut-outs that training never saw; and
`unseen_backgrounds`, seen drawings on patterns and photographs that training never shows.

Layout: ``{split}/{number:04d}.webp`` and ``scenes.jsonl``, a line per picture with its facts. Pictures of
`unseen_photos` hold Tux Paint stamps (GPL-2), half of those of `unseen_backgrounds` desktop pictures of
mate-backgrounds: neither is shipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_flow.demo.grown.facts import Facts
from vllm_flow.demo.grown.scenes import HELDOUT_SEEDS, Palette, Style, compose
from vllm_flow.demo.grown.sprites import Assets, load_assets

SPLITS = ("seen", "unseen_style", "unseen_photos", "unseen_backgrounds")
STYLE = Style(sign_share=0.8)
"""Most pictures have a sign, so that few pictures make many questions."""
QUALITY = 90
"""Of the WebP pictures."""


@dataclass(frozen=True)
class HeldoutPicture:
    """A picture and what is known about it."""

    image_path: Path
    facts: Facts
    split: str

    @property
    def objects(self) -> tuple[str, ...]:
        """Distinct class names in class order."""
        return self.facts.objects


def palette_of(split: str, assets: Assets) -> Palette:
    """What the scenes of a split are made of."""
    if split == "unseen_style":
        return Palette(assets.unseen_drawings)
    if split == "unseen_photos":
        return Palette(assets.unseen_photos)
    if split == "unseen_backgrounds":
        return Palette(assets.drawings, assets.unseen_backgrounds, 0.5, unseen_backgrounds=True)
    return Palette(assets.drawings)


def write_pictures(
    assets: Assets, out: Path, count: int, splits: Sequence[str] = SPLITS
) -> list[HeldoutPicture]:
    """Write ``count`` pictures per split and ``scenes.jsonl`` below ``out``."""
    made = []
    for split in splits:
        # A range of its own for each split, whichever splits are asked for.
        first = HELDOUT_SEEDS.start + SPLITS.index(split) * 100_000_000
        (out / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            scene = compose(first + number, palette_of(split, assets), STYLE)
            path = out / split / f"{number:04d}.webp"
            scene.image.save(path, "WEBP", quality=QUALITY, method=6)
            made.append(HeldoutPicture(path, scene.facts, split))
    rows = [
        {
            "image": picture.image_path.relative_to(out).as_posix(),
            "split": picture.split,
            **picture.facts.as_json(),
        }
        for picture in made
    ]
    (out / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def read_pictures(folder: Path, split: str | None = None) -> list[HeldoutPicture]:
    """The pictures below ``folder``, all or those of a split.

    Raises ValueError for an unknown split, FileNotFoundError where there is no ``scenes.jsonl``.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    path = folder / "scenes.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; make the pictures with python -m vllm_flow.demo.grown.heldout"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        HeldoutPicture(folder / row["image"], Facts.from_json(row), row["split"])
        for row in rows
        if split in (None, row["split"])
    ]


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with the downloads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=640, help="per split")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    args = parser.parse_args()
    made = write_pictures(load_assets(args.work), args.out, args.pictures, args.splits)
    size = sum(picture.image_path.stat().st_size for picture in made)
    print(f"{len(made)} pictures, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
