"""Write held-out scenes in the file formats of POPE, ScienceQA, TextVQA and COCO (CHAIR)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_flow.counts import counted
from vllm_flow.demo_model.datasets import BENCHMARKS, TASKS, write_datasets
from vllm_flow.demo_model.datasets.hub import write_hub
from vllm_flow.demo_model.heldout import DATA, SPLITS
from vllm_flow.exits import Refused, run_module
from vllm_flow.options import positive, seed
from vllm_flow.outputs import check_folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.demo_model.datasets", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--limit",
        type=positive,
        help="at most so many items per task (POPE: per label file; default: all there are)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="decides what is drawn (default: 0)")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="seen",
        help="drawings the demo model was trained on (default), or a split that it was not trained on",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=list(BENCHMARKS),
        help=f"default: {' '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        default=DATA,
        help="folder of scenes that vllm_flow.demo_model.training.heldout_data wrote (default: those shipped)",
    )
    parser.add_argument(
        "--hub",
        action="store_true",
        help="also OUT/hub/lmms-lab-encoder: POPE, ScienceQA and TextVQA as the hub's parquet, for other "
        "harnesses started in OUT/hub",
    )
    args = parser.parse_args(argv)
    check_folder(args.out)
    try:
        counts = write_datasets(
            args.out, args.limit, args.seed, args.split, args.tasks, args.pictures
        )
    except (ValueError, FileNotFoundError) as error:
        raise Refused(str(error)) from error
    for name, count in counts.items():
        print(f"{args.out / name}: {counted(count, 'item')}")
    if args.hub:
        for name, count in write_hub(args.out, args.out / "hub").items():
            print(f"{args.out / 'hub' / name}: {counted(count, 'row')}")
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.demo_model.datasets", main)
