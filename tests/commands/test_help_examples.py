"""`--help` of each command shows examples: the parser takes each, and those that take seconds are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flow.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("vllm-flow", "python", "ray", "vllm", "echo")


def examples(text: str) -> list[str]:
    """The shell commands of a help text: indented lines that call a program, with what continues them."""
    joined = text.replace("\\\n", " ")
    return [
        line.strip()
        for line in joined.splitlines()
        if line.startswith("    ") and line.strip().partition(" ")[0] in PROGRAMS
    ]


def help_of(name: str) -> str:
    return COMMANDS[name].load().__doc__ or ""


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_taken_by_the_parser(name: str) -> None:
    calls = [line for line in examples(help_of(name)) if line.startswith("vllm-flow ")]
    assert any(
        line.startswith(f"vllm-flow {name} ") or line == f"vllm-flow {name}" for line in calls
    )
    for line in calls:
        argv = shlex.split(re.sub(r"\$\([^)]*\)", "FILE", line))[1:]
        assert build_parser(argv).parse_args(argv).command == argv[0], line


def paste(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run lines in a shell, in an empty folder, with the command and the interpreter of this checkout."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, call in (("vllm-flow", "-m vllm_flow.cli"), ("python", "")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {call} "$@"\n')
        (bin_folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    (folder / "here").mkdir()
    return subprocess.run(
        ["sh", "-e", "-c", "\n".join(lines)],
        cwd=folder / "here", env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_example_of_score_works_when_pasted(tmp_path: Path) -> None:
    done = paste(examples(help_of("score")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CHAIR_s" in done.stdout and (tmp_path / "here/out/chair.json").exists()


@pytest.mark.long
@pytest.mark.slow
def test_the_example_of_figures_works_when_pasted(tmp_path: Path) -> None:
    """With it those of the questions and of `cam`."""
    done = paste(examples(help_of("figures")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/runs/cam/figures/cam_overlays.png").exists()
