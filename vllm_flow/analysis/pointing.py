"""The pointing game on the demo model: is the hottest patch of a CAM on the object it is about?

Held-out scenes with known boxes, one object drawn per scene, so that rounds are independent. Only
objects that come once in the picture are asked about: of two dogs, no one box is the right one.

- `naming`: the answer is the scene's caption; z is the logit of the object's own word.
- `presence`: "Is there a ... in the image?" - "Yes"; z is that token's logit.

Beside the CAM stand chance (the box's share of the patches), a control with the same features whose
channel weights alpha are shuffled, and another object of the same picture: a map that shows objects
in general, rather than the one in question, finds both equally often. The layer is chosen on the
first half of the scenes and judged on the second.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_flow.analysis.exact import mcnemar_greater
from vllm_flow.analysis.maps import Hits, count_hits, normalised, pointing_chance, points_inside
from vllm_flow.analysis.pointing_table import MEAN, report, write_csv
from vllm_flow.counts import counted
from vllm_flow.demo_model.heldout import HeldoutScene, build_prompt, load_scenes
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, presence
from vllm_flow.exits import run_module
from vllm_flow.options import count, not_negative, seed
from vllm_flow.outputs import check_file
from vllm_flow.unread_options import parse, refuse_unread

if TYPE_CHECKING:
    from vllm_flow.analysis.cam import Settings
    from vllm_flow.analysis.vlm import Vlm

TASKS = ("naming", "presence")


@dataclass(frozen=True)
class Round:
    """A scene, the object a CAM is taken for, and another object of the scene; each comes once in it."""

    scene: HeldoutScene
    target: str
    other: str


@dataclass(frozen=True)
class Outcome:
    """What one round showed; `layers` counts `MEAN` as the last."""

    on_target: tuple[bool, ...]
    on_other: tuple[bool, ...]
    control: tuple[bool, ...]
    chance_target: float
    chance_other: float


@dataclass(frozen=True)
class Row:
    """One layer over all rounds."""

    layer: int
    target: Hits
    control: Hits
    other: Hits
    p_control: float
    """McNemar's exact p that the CAM does no better than its control on the same rounds."""
    p_other: float
    """The same against the other object."""


def draw_rounds(count: int | None, split: str, seed: int = 0) -> list[Round]:
    """One round for each of the first `count` scenes with two objects or more that come once."""
    rng = random.Random(seed)
    rounds = []
    for scene in load_scenes(split):
        if len(scene.boxes) > 1:
            target, other = rng.sample(list(scene.boxes), 2)
            rounds.append(Round(scene, target, other))
    return rounds[:count]


def rounds(text: str) -> int:
    """How many rounds are played, for argparse: two halves, neither of them empty."""
    number = count(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"{number}: at least 2, since the layer is chosen on one half and judged on the other"
        )
    return number


def asked(round_: Round, task: str) -> tuple[str, str, str]:
    """Prompt, answer and the word of the answer that is explained."""
    if task == "naming":
        return round_.scene.prompt, round_.scene.caption, round_.target
    return build_prompt(presence(round_.target) + ANSWER_SUFFIX), "Yes", "Yes"


def play(vlm: Vlm, rounds: Sequence[Round], task: str, settings: Settings) -> Iterator[Outcome]:
    """One outcome per round, at `settings.hook`."""
    for outcomes in play_hooks(vlm, rounds, task, settings, (settings.hook,)):
        yield outcomes[settings.hook]


def play_hooks(
    vlm: Vlm, rounds: Sequence[Round], task: str, settings: Settings, hooks: Sequence[str]
) -> Iterator[dict[str, Outcome]]:
    """One outcome per round and hook point, from the same forward and backward."""
    from vllm_flow.analysis.cam import copies_in_batches, features_by_hook
    from vllm_flow.analysis.vlm import tokens_of
    from vllm_flow.pictures import read_picture

    for number, round_ in enumerate(rounds):
        prompt, answer, word = asked(round_, task)
        image = read_picture(round_.scene.image_path)
        encoded = vlm.encode(prompt, image)
        ids = vlm.answer_ids(prompt, answer)
        chosen = tokens_of(vlm.words(ids), word)
        part, *_ = encoded.parts
        rngs = {hook: np.random.default_rng([settings.seed, number]) for hook in hooks}
        heat: dict[str, dict[int, NDArray]] = {hook: {} for hook in hooks}
        control: dict[str, dict[int, NDArray]] = {hook: {} for hook in hooks}
        for pixels in copies_in_batches(encoded, settings):
            found = features_by_hook(vlm, encoded, ids, pixels, settings, hooks, chosen)
            for hook, layer in itertools.product(hooks, settings.layers):
                features = found[hook][layer]
                alpha = features.alpha()
                shuffled = alpha[:, rngs[hook].permutation(alpha.shape[1])]
                for maps, weights in ((heat[hook], alpha), (control[hook], shuffled)):
                    summed = features.heat(weights).double().sum(0).cpu().numpy()
                    maps[layer] = maps.get(layer, 0) + part.map(summed)
        box = round_.scene.boxes
        target, other = (
            part.shares(vlm.box_in_views(box[name], image)[0])
            for name in (round_.target, round_.other)
        )
        yield {
            hook: Outcome(
                tuple(
                    points_inside(each, target) for each in with_mean(heat[hook], settings.layers)
                ),
                tuple(
                    points_inside(each, other) for each in with_mean(heat[hook], settings.layers)
                ),
                tuple(
                    points_inside(each, target)
                    for each in with_mean(control[hook], settings.layers)
                ),
                pointing_chance(target),
                pointing_chance(other),
            )
            for hook in hooks
        }


def with_mean(maps: dict[int, NDArray], layers: Sequence[int]) -> list[NDArray]:
    """The layers' maps in order, and last the mean of them normalised."""
    ordered = [maps[layer] for layer in layers]
    return [*ordered, np.mean([normalised(each) for each in ordered], axis=0)]


def summarise(outcomes: Sequence[Outcome], layers: Sequence[int]) -> list[Row]:
    """A row per layer, and one for the mean of all layers."""
    rows = []
    chances = [each.chance_target for each in outcomes]
    for column, layer in enumerate((*layers, MEAN)):
        target = [each.on_target[column] for each in outcomes]
        other = [each.on_other[column] for each in outcomes]
        control = [each.control[column] for each in outcomes]
        rows.append(
            Row(
                layer,
                count_hits(target, chances),
                count_hits(control, chances),
                count_hits(other, [each.chance_other for each in outcomes]),
                better(target, control),
                better(target, other),
            )
        )
    return rows


def better(treatment: Sequence[bool], baseline: Sequence[bool]) -> float:
    """One-sided exact McNemar p that `treatment` hits more often than `baseline`."""
    pairs = list(zip(treatment, baseline, strict=True))
    return mcnemar_greater(sum(t and not b for t, b in pairs), sum(b and not t for t, b in pairs))


def judge(outcomes: Sequence[Outcome], layers: Sequence[int]) -> Row:
    """The layer that does best on the first half of the rounds, as it does on the second half."""
    half = len(outcomes) // 2
    chosen = max(summarise(outcomes[:half], layers)[:-1], key=lambda row: row.target.hits)
    return next(r for r in summarise(outcomes[half:], layers) if r.layer == chosen.layer)


def main(argv: Sequence[str] | None = None) -> int:
    """Play and print; the exit status."""
    from rich.progress import track

    from vllm_flow.analysis.cam import Settings
    from vllm_flow.analysis.cam_names import DEFAULT_HOOK, HOOKS
    from vllm_flow.analysis.loading import load

    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.analysis.pointing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, default="naming")
    parser.add_argument("--split", choices=("seen", "unseen_style"), default="seen")
    parser.add_argument(
        "--rounds", type=rounds, help="scenes (default: all with two objects that come once)"
    )
    parser.add_argument(
        "--samples", type=count, default=0, help="noisy copies; 0: the picture itself"
    )
    parser.add_argument("--sigma", type=not_negative, default=0.1)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--hook", choices=tuple(HOOKS), default=DEFAULT_HOOK)
    parser.add_argument("--csv", type=Path, help="where the table goes as CSV")
    args = parse(parser, sys.argv[1:] if argv is None else argv)
    if not args.samples:
        refuse_unread(args, ("sigma",), "without noisy copies (--samples)")
    if args.csv:
        check_file(args.csv, "--csv")
    vlm = load("demo")
    settings = Settings(
        tuple(range(len(vlm.layers))), args.samples, args.sigma, args.seed, args.hook
    )
    drawn = draw_rounds(args.rounds, args.split, args.seed)
    playing = play(vlm, drawn, args.task, settings)
    outcomes = list(track(playing, "pointing", total=len(drawn), disable=not sys.stderr.isatty()))
    rows = summarise(outcomes, settings.layers)
    print(
        f"{args.task}, {args.split} scenes, hook {args.hook}, {counted(args.samples, 'noisy copy', 'noisy copies')}"
    )
    print(report(rows, judge(outcomes, settings.layers)))
    if args.csv:
        write_csv(rows, args.csv)
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.analysis.pointing", main)
