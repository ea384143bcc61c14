"""The pointing game at every hook point, with and without noisy copies, as one table.

A LLaVA-CAM may be taken at several places of a decoder layer (`vllm-flow cam --hook`), and averaged over
noisy copies of the picture. All hook points of a scene come from the same forward and backward, so that
they are compared on the same scenes; see `pointing.py` for the rounds, chance and the controls.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

from vllm_flow.analysis import pointing
from vllm_flow.analysis.cam_names import HOOKS
from vllm_flow.analysis.pointing import Outcome, Row
from vllm_flow.analysis.pointing_table import percent
from vllm_flow.counts import counted
from vllm_flow.exits import Refused, run_module
from vllm_flow.options import not_negative, positive, seed
from vllm_flow.user_text import whole_numbers

Table = Mapping[tuple[int, str], Sequence[Row]]
"""(noisy copies, hook point) -> a row per layer."""


def rows_of(
    outcomes: Sequence[Mapping[str, Outcome]], layers: Sequence[int]
) -> dict[str, list[Row]]:
    """Hook point -> a row per layer; the mean over layers is left out."""
    return {
        hook: pointing.summarise([each[hook] for each in outcomes], layers)[:-1]
        for hook in outcomes[0]
    }


def markdown(table: Table) -> str:
    """The table, and above it what all of it shares."""
    first = next(iter(table.values()))[0]
    tests = sum(map(len, table.values()))
    lines = [
        f"{counted(first.target.total, 'scene')}; by chance {100 * first.target.chance:.1f} % on the object, "
        f"{100 * first.other.chance:.1f} % on the other one. Shares in % with exact 95 % intervals; p "
        f"one-sided; {counted(tests, 'row')}: look for p below {0.05 / tests:.4f} (Bonferroni).",
        "",
        "| hook point | layer | copies | on the object | shuffled weights | another object "
        "| p chance | p shuffled | p another |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (copies, hook), rows in table.items():
        for row in rows:
            shares = " | ".join(percent(h).strip() for h in (row.target, row.control, row.other))
            ps = " | ".join(f"{p:.1g}" for p in (row.target.p_value, row.p_control, row.p_other))
            lines.append(f"| `{hook}` | {row.layer} | {copies} | {shares} | {ps} |")
    return "\n".join(lines)


def numbers(text: str) -> tuple[int, ...]:
    """`0,6` or `0:30:2`, for argparse."""
    found = whole_numbers(text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a list like 0,6 nor a range like 0:30:2"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Play and print; the exit status."""
    from rich.progress import track

    from vllm_flow.analysis.cam import Settings
    from vllm_flow.analysis.loading import load

    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.analysis.pointing_hooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=pointing.TASKS, default="naming")
    parser.add_argument("--split", choices=("seen", "unseen_style"), default="seen")
    parser.add_argument(
        "--layers", type=numbers, default=(0, 6), help="decoder layers (default: 0,6)"
    )
    parser.add_argument(
        "--rounds", type=positive, help="scenes (default: all with two objects that come once)"
    )
    parser.add_argument(
        "--samples",
        type=numbers,
        default=(0, 8),
        help="noisy copies; 0: the picture itself (default: 0,8)",
    )
    parser.add_argument("--sigma", type=not_negative, default=0.1)
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args(argv)
    vlm = load("demo")
    started = time.monotonic()
    layers = args.layers
    if max(layers) >= len(vlm.layers):
        raise Refused(f"--layers: the demo model has the layers 0 to {len(vlm.layers) - 1}")
    rounds = pointing.draw_rounds(args.rounds, args.split, args.seed)
    table: dict[tuple[int, str], Sequence[Row]] = {}
    for samples in args.samples:
        settings = Settings(layers, samples, args.sigma, args.seed)
        playing = pointing.play_hooks(vlm, rounds, args.task, settings, tuple(HOOKS))
        shown = track(
            playing,
            counted(samples, "copy", "copies"),
            total=len(rounds),
            disable=not sys.stderr.isatty(),
        )
        for hook, rows in rows_of(list(shown), layers).items():
            table[samples, hook] = rows
    print(f"{args.task}, {args.split} scenes, sigma {args.sigma}, seed {args.seed}; ", end="")
    print(f"{time.monotonic() - started:.0f} s.\n\n{markdown(table)}")
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.analysis.pointing_hooks", main)
