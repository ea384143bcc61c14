"""Write the demo's held-out pictures in the file formats of POPE, ScienceQA, TextVQA and COCO (CHAIR)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_flow.demo.datasets import TASKS, write_datasets


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_flow.demo.datasets", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--items",
        type=int,
        help="at most so many items per task (POPE: per label file; default: all there are)",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn (default: 0)")
    parser.add_argument(
        "--split",
        choices=("seen", "unseen_style"),
        default="seen",
        help="drawing styles the demo model was trained on (default), or one it was not",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all four"
    )
    args = parser.parse_args(argv)
    try:
        counts = write_datasets(args.out, args.items, args.seed, args.split, args.tasks)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name, count in counts.items():
        print(f"{args.out / name}: {count} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
