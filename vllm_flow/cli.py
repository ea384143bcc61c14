"""The `vllm-flow` command: parses arguments and calls. Nothing heavy is imported before that."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_flow import __version__


def whole_numbers(text: str) -> tuple[int, ...]:
    """`0,4,30` or `0:30:2` (both ends included) as a tuple, for --cliffs."""
    try:
        if ":" in text:
            first, last, *step = (int(part) for part in text.split(":"))
            return tuple(range(first, last + 1, *step))
        return tuple(int(part) for part in text.split(","))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a list like 0,4,30 nor a range like 0:30:2"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-flow",
        description="Evict image tokens from vLLM's KV cache after a per-request cliff layer.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-flow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="ask held-out questions at a range of cliffs; table, figure and page in out/demo/",
        description="Serves a vision-language model with vLLM and asks it about pictures while "
        "its image tokens are evicted after a range of layers, per request, in one engine.",
    )
    demo.add_argument("--model", help="directory or hub name (default: the demo model)")
    demo.add_argument(
        "--cliffs",
        type=whole_numbers,
        help="layers that see the whole image, as 0,4,30 or 0:30:2 (default: every second layer)",
    )
    demo.add_argument(
        "--questions",
        type=int,
        help="questions about scenes in seen styles; half as many of the other splits",
    )
    demo.add_argument("--rounds", type=int, default=4, help="rounds of prefill timing")
    demo.add_argument("--group-layers", type=int, help="layers per storage group")
    demo.add_argument("--dtype", help="float32 (default for the demo model), bfloat16 or float16")
    demo.add_argument("--kv-cache-gib", type=float, help="size of the KV-cache pool")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="where results go")
    demo.add_argument("--quick", action="store_true", help="few questions, cliffs and rounds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "demo":
        from vllm_flow.showcase.command import run_demo

        return run_demo(args)
    return 2


if __name__ == "__main__":
    sys.exit(main())
