"""Every figure of the analysis for the demo model, and the numbers behind it: minutes on one core.

No engine is started: transformers runs the model. What is shown is not picked by eye: the first
held-out scenes with objects that come once and that the model lists exactly, and for counts all scenes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_flow.analysis import pointing, pointing_table
from vllm_flow.counts import counted
from vllm_flow.demo_model.heldout import HeldoutScene, load_questions, load_scenes
from vllm_flow.exits import run_module
from vllm_flow.options import count
from vllm_flow.outputs import check_folder

if TYPE_CHECKING:
    from vllm_flow.analysis.attention_reference import Masses
    from vllm_flow.analysis.cam_file import CamRecord
    from vllm_flow.analysis.vlm import Vlm

SHOWN_SCENES = 2
SHOWN_LAYERS = (0, 4, 6, 8, 12, 16, 20, 24, 28)
CAPTIONS = 24
"""Scenes whose captions' attention is measured."""
ON_THE_PAGE = ("attention", "flow", "cam_grid", "pointing")
"""Figures of docs/figures.md."""
SMALL_WIDTH = 1400
QUESTIONS = 48
"""Presence questions whose answers' attention is measured."""


Each = TypeVar("Each")


def followed(steps: Iterable[Each], what: str, total: int) -> Iterator[Each]:
    """The same under a bar, where somebody looks."""
    from rich.progress import track

    yield from track(steps, what, total=total, disable=not sys.stderr.isatty())


def listed_exactly(vlm: Vlm, scenes: Sequence[HeldoutScene]) -> Iterator[HeldoutScene]:
    """The scenes with two objects or more whose caption by the model is the one it was taught.

    Every object comes once, so that each word of the caption has one box.
    """
    from vllm_flow.pictures import read_picture

    for scene in scenes:
        if not 2 <= len(scene.objects) == len(scene.boxes):
            continue
        encoded = vlm.encode(scene.prompt, read_picture(scene.image_path))
        said = "".join(vlm.words(vlm.generate(encoded))).strip()
        if said == scene.caption:
            yield scene


def cam_of(vlm: Vlm, scene: HeldoutScene, word: str, samples: int) -> CamRecord:
    """The CAM of one object's name in a scene's caption at every layer, with the object's box."""
    from vllm_flow.analysis import cam_command
    from vllm_flow.pictures import read_picture

    parser = argparse.ArgumentParser()
    cam_command.add_arguments(parser)
    box = ",".join(map(str, scene.boxes[word]))
    (record,) = cam_command.explain(
        vlm,
        parser.parse_args(
            ["--image", str(scene.image_path), "--prompt", scene.prompt, "--answer", scene.caption,
             "--word", word, "--box", box, "--samples", str(samples)]
        ),
        read_picture(scene.image_path),
    )  # fmt: skip
    return record


def only(record: CamRecord, layers: Sequence[int]) -> CamRecord:
    """The record with some of its layers."""
    at = [record.layers.index(layer) for layer in layers]
    return dataclasses.replace(record, layers=tuple(layers), heat=record.heat[at])


def measure_masses(
    vlm: Vlm, asked: Mapping[str, tuple[Path, str]], what: str
) -> tuple[dict[str, Masses], dict[str, list[str]]]:
    """Attention masses of the model's own answers, and their tokens as text.

    `asked`: name of a request -> picture and prompt; `what` they are.
    """
    from vllm_flow.analysis.attention_reference import attention_masses
    from vllm_flow.pictures import read_picture

    masses, words = {}, {}
    for name, (image, prompt) in followed(asked.items(), what, len(asked)):
        encoded = vlm.encode(prompt, read_picture(image))
        answer = vlm.generate(encoded)
        masses[name] = attention_masses(vlm, encoded, answer)
        words[name] = vlm.words(answer)
    return masses, words


def measure_attention(vlm: Vlm, out: Path) -> None:
    """Masses of captions (drawn, with their flow) and of presence questions (numbers only)."""
    import pyarrow.parquet as pq

    from vllm_flow.analysis.attention_reference import mass_table, write_tables
    from vllm_flow.analysis.cam_file import write_rows
    from vllm_flow.analysis.figure_attention import by_layer, mass_rows, read_masses
    from vllm_flow.analysis.figures_command import WORDS

    captions = {
        f"{scene.split}/{scene.image_path.stem}": (scene.image_path, scene.prompt)
        for scene in load_scenes("seen")[:CAPTIONS]
    }
    masses, words = measure_masses(vlm, captions, "captions")
    write_tables(masses, out)
    (out / WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")

    questions = load_questions("seen")[:QUESTIONS]
    masses, _ = measure_masses(
        vlm,
        {str(each.question_id): (each.image_path, each.prompt) for each in questions},
        "answers",
    )
    path = out / "presence.parquet"
    pq.write_table(mass_table(masses), path)
    write_rows(mass_rows(by_layer(read_masses([path]))), out / "presence_attention.csv")


def shrink(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """Copies for a page: `SMALL_WIDTH` pixels wide, 256 colours."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in pictures:
        with Image.open(path) as image:
            size = (SMALL_WIDTH, round(image.height * SMALL_WIDTH / image.width))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        written.append(folder / path.name)
        # MAXCOVERAGE keeps colours apart that the default cut merges, such as two lines of a figure.
        palette = small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(written[-1], optimize=True)
    return written


def draw_cams(vlm: Vlm, scenes: Sequence[HeldoutScene], samples: int, out: Path) -> list[Path]:
    """A CAM of every word of some captions, as NPZ files and as one grid; returns the grid's paths."""
    from vllm_flow.analysis.figure_cam import draw_overlays

    print(f"CAM: the words of {SHOWN_SCENES} captions")
    found = listed_exactly(vlm, scenes)
    records = []
    for _, scene in zip(range(SHOWN_SCENES), found, strict=False):
        for word in followed(scene.objects, scene.image_path.stem, len(scene.objects)):
            record = cam_of(vlm, scene, word, samples)
            record.save(out / f"cam_{scene.image_path.stem}_{word.replace(' ', '_')}.npz")
            records.append(record)
    shown = [only(record, SHOWN_LAYERS) for record in records]
    return draw_overlays(
        shown, out / "figures" / "cam_grid", "LLaVA-CAM of each object’s word in the caption"
    )


def play_pointing(vlm: Vlm, count: int, out: Path) -> dict[str, Any]:
    """The pointing game's summary by kind of question; reports and numbers are written."""
    from vllm_flow.analysis.cam import Settings

    print(f"pointing game: {counted(count, 'scene')}, two kinds of questions")
    settings = Settings(tuple(range(len(vlm.layers))), samples=0)
    rounds = pointing.draw_rounds(count, "seen")
    by_task = {}
    for task in pointing.TASKS:
        outcomes = list(followed(pointing.play(vlm, rounds, task, settings), task, len(rounds)))
        by_task[task] = pointing.summarise(outcomes, settings.layers)
        report = pointing_table.report(by_task[task], pointing.judge(outcomes, settings.layers))
        (out / f"pointing_{task}.txt").write_text(report + "\n", encoding="utf-8")
        pointing_table.write_csv(by_task[task], out / f"pointing_{task}.csv")
        print(f"  {task}: {report.splitlines()[-1]}")
    return by_task


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw, say where; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.analysis.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/analysis"), help="folder (default: %(default)s)")
    add(
        "--rounds",
        type=pointing.rounds,
        default=100,
        help="scenes of the pointing game (default: 100)",
    )
    add("--samples", type=count, default=8, help="noisy copies of a shown CAM (default: 8)")
    add("--small", type=Path, metavar="FOLDER", help="also copies 1400 pixels wide, for pages")
    args = parser.parse_args(argv)
    check_folder(args.out)
    if args.small:
        check_folder(args.small, f"--small {args.small}")

    from vllm_flow.analysis import figures_command
    from vllm_flow.analysis.figure_pointing import draw_pointing
    from vllm_flow.analysis.loading import load

    started = time.monotonic()
    vlm = load("demo", attention="eager")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    scenes = load_scenes("seen")

    print(f"attention: where {CAPTIONS} captions and {QUESTIONS} answers look")
    measure_attention(vlm, out)

    grid = draw_cams(vlm, scenes, args.samples, out)
    by_task = play_pointing(vlm, args.rounds, out)
    written = [
        *figures_command.draw_all(out, out / "figures"),
        *grid,
        *draw_pointing(by_task, out / "figures" / "pointing"),
    ]
    if args.small:
        written += shrink([out / "figures" / f"{name}.png" for name in ON_THE_PAGE], args.small)
    print(f"Done in {time.monotonic() - started:.0f} s. Written:")
    for path in written:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.analysis.demo", main)
