"""The `vllm-flow` command: finds the sub-command's module and calls it; no logic.

A sub-command is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``. Only the
one that is called is imported, and it imports what is heavy (torch, vLLM, ray) inside ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from vllm_flow import __version__
from vllm_flow.exits import guarded, leave
from vllm_flow.parsers import Parser
from vllm_flow.unread_options import parse


class SubCommand(Protocol):
    """What a sub-command's module offers; its docstring is the help text."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit status. ``args.argv`` is what followed the command's name."""


@dataclass(frozen=True)
class Entry:
    """Where a sub-command lives, and its line in ``vllm-flow --help``."""

    module: str
    help: str

    def load(self) -> SubCommand:
        return cast(SubCommand, importlib.import_module(self.module))


COMMANDS = {
    "demo": Entry(
        "vllm_flow.demo.command",
        "ask held-out questions at a range of cliffs; table, figure and page in out/demo/",
    ),
    "eval": Entry(
        "vllm_flow.eval.sweep.command",
        "ask benchmark questions under several policies, on all GPUs; keeps every answer",
    ),
    "cliff": Entry(
        "vllm_flow.eval.cliff.command",
        "find how many layers must see the image so that a task loses no more than tolerated",
    ),
    "report": Entry(
        "vllm_flow.eval.report.command",
        "score a run of eval: page, figures and tables in RUN/report/",
    ),
    "score": Entry(
        "vllm_flow.eval.scoring.command",
        "score answer files of POPE, ScienceQA, TextVQA and the other tasks by the official rules",
    ),
    "doctor": Entry(
        "vllm_flow.doctor",
        "what is installed, and whether vLLM would serve with the extension (or a model)",
    ),
    "models": Entry(
        "vllm_flow.models_command",
        "which model families can evict, and what of a picture stays; or whether a model can",
    ),
    "policies": Entry(
        "vllm_flow.policies_command",
        "which ranks and presets there are, their sources, and what a preset becomes for a model",
    ),
    "profile": Entry(
        "vllm_flow.profile.command",
        "time, throughput and memory beside stock vLLM's, each with its ideal; out/profile/",
    ),
    "cam": Entry(
        "vllm_flow.analysis.cam_command",
        "LLaVA-CAM: which patches of a picture raise an answer's logits, by layer",
    ),
    "figures": Entry(
        "vllm_flow.analysis.figures_command",
        "draw a run's figures: attention by layer, information flow, CAMs, scores",
    ),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``: arguments are declared for the sub-command it names, if any."""
    parser = Parser(
        prog="vllm-flow",
        description="Evict image tokens from vLLM's KV cache after a per-request cliff layer.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-flow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in COMMANDS.items():
        command = commands.add_parser(name, help=entry.help)
        if name in argv[:1]:
            module = entry.load()
            command.description = module.__doc__
            module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status (see ``exits``)."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def call() -> int:
        args = parse(build_parser(argv), argv)
        return COMMANDS[args.command].load().run(args)

    return guarded(argv[0] if argv else "", call)


def entry() -> None:
    """What the installed command calls: `main`, and the end of the process."""
    leave(main())


if __name__ == "__main__":
    entry()
