"""docs/profiling.md has the command's parts, presets and defaults; every command's options are on some page."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_flow.cli import COMMANDS, build_parser
from vllm_flow.profile.presets import PARTS, POLICIES, PRESETS
from vllm_flow.profile.shape import LlavaShape

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/profiling.md").read_text(encoding="utf-8")
OPTION = re.compile(r"--[a-z][\w-]*")


def rows(head: str) -> list[str]:
    """The names in the first column of a table."""
    table = PAGE.split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`([^`]+)`", row.split("|")[1])[0] for row in table]


def parser_of(command: str) -> argparse.ArgumentParser:
    (choices,) = (
        action.choices
        for action in build_parser([command])._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    found: argparse.ArgumentParser = choices[command]
    return found


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Also those of sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        elif action.option_strings:
            yield action


def test_parts_and_presets() -> None:
    assert rows("part") == list(PARTS)
    assert sorted(rows("preset")) == sorted(PRESETS)


def test_defaults() -> None:
    assert f"`{POLICIES}`" in PAGE and f"`{LlavaShape()}`" in PAGE
    defaults = {
        name: action.default
        for action in options(parser_of("profile"))
        for name in action.option_strings
    }
    said = re.findall(r"`(--[\w-]+)` \(`?([\w./=-]+)`?\)", PAGE)
    said = [(name, value) for name, value in said if value not in PARTS and value != "one"]
    assert len(said) >= 7
    for name, value in said:
        default = defaults[name]
        assert value == (f"{default:g}" if isinstance(default, float) else str(default)), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_a_page(command: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
    named = {name for page in pages for name in OPTION.findall(page.read_text(encoding="utf-8"))}
    missing = [
        name
        for action in options(parser_of(command))
        for name in action.option_strings
        if name.startswith("--") and name not in named | {"--help"}
    ]
    assert not missing
