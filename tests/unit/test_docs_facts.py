"""What the documentation says of commands, settings, keys, reports and counters is what the code has."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.plugins.installing import RANK_PACKAGE, lay_out, visible
from vllm_flow.cli import build_parser
from vllm_flow.engine import report
from vllm_flow.engine.front_end import metrics
from vllm_flow.engine.obstacles import Misfit
from vllm_flow.engine.settings import NO_OPTIONS, FlowSettings
from vllm_flow.eval.cliff.command import check_read as check_cliff
from vllm_flow.eval.sweep.unread import check_read as check_eval
from vllm_flow.eval.sweep.unread import check_said_once
from vllm_flow.policy_keys import REQUEST_KEYS
from vllm_flow.profile.unread import check_read as check_profile
from vllm_flow.unread_options import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in ("", "docs", "docs/results", "vllm_flow/demo_model")
    for page in (ROOT / folder).glob("*.md")
)
FENCE = re.compile(r"^( *)```sh\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of every `vllm-flow` command in a page's shell blocks; variables stand for a word."""
    found = []
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            call = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?vllm-flow (.*)", line)
            words = shlex.split(call[1], comments=True) if call else []
            if words and "..." not in words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_parser_takes_every_command_that_a_page_shows(page: str, tmp_path: Path) -> None:
    """One page's are those of who has installed its package."""
    own = [lay_out(RANK_PACKAGE, tmp_path)] if page == "docs/extending.md" else []
    with visible(*own):
        for words in commands(read(page)):
            check_command(words)


def check_command(words: list[str]) -> None:
    args = parse(build_parser(words), words)
    assert args.command == words[0], words
    if args.command == "eval":
        check_said_once(args)
        check_eval(args, args.policies.split(","))
    elif args.command == "cliff":
        check_cliff(args)
    elif args.command == "profile" and not args.preset:
        check_profile(args)


def test_pages_show_commands() -> None:
    """Else the test above looks at nothing."""
    assert {words[0] for page in PAGES for words in commands(read(page))} >= {
        *("cam", "cliff", "demo", "eval", "profile", "report", "score"),
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_runs_is_there(page: str) -> None:
    for name in re.findall(r"python -m (vllm_flow[\w.]*|tests[\w.]*)", read(page)):
        assert importlib.util.find_spec(name.rstrip(".")) is not None, name


def table(page: str, head: str) -> dict[str, list[str]]:
    """A table by the names in backticks of its first column: the other cells of their rows."""
    rows = read(page).split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]
    return {name: rest for first, *rest in cells for name in re.findall(r"`([^`]+)`", first)}


def test_serving_has_every_setting_with_its_default() -> None:
    shown = table("docs/serving.md", "setting")
    settings = {
        field.name: field.default for field in fields(FlowSettings) if field.name not in NO_OPTIONS
    }
    assert shown.keys() == settings.keys()
    for name, default in settings.items():
        said = shown[name][-1]
        if isinstance(default, bool):
            assert said == f"`{str(default).lower()}`", name
        elif isinstance(default, int):
            assert f"{default >> 30} GiB" in said and default % (1 << 30) == 0, name
        elif isinstance(default, str):
            assert said == f"`{default}`", name
        elif default is None:
            assert said.startswith("no"), name


def test_serving_has_every_key_of_a_request() -> None:
    assert table("docs/serving.md", "key of a request").keys() == set(REQUEST_KEYS)


def test_serving_has_every_field_of_a_report() -> None:
    shown = table("docs/serving.md", "field")
    assert list(shown) == list(report.Report.__annotations__)
    for name in report.StageReport.__annotations__:
        assert f"`{name}`" in shown["stages"][0]


def test_operating_has_every_counter() -> None:
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    counters = re.findall(r'"(vllm_flow:\w+)"', source)
    assert len(counters) == 9
    assert table("docs/operating.md", "counter").keys() == {f"{name}_total" for name in counters}


def test_serving_has_every_reason_for_which_a_default_policy_is_skipped() -> None:
    assert list(table("docs/serving.md", "`reason`")) == [kind.value for kind in Misfit]


def test_the_notebook_shows_the_report_of_today() -> None:
    """If this fails: `make docs-check`, and commit what it wrote."""
    cells = json.loads(read("docs/first_steps.ipynb"))["cells"]
    lines = "".join(
        "".join(output.get("text", ())) for cell in cells for output in cell.get("outputs", ())
    ).splitlines()
    reports = [line for line in lines if line.startswith("{'when'")]
    assert reports
    for line in reports:
        assert list(ast.literal_eval(line)) == list(report.Report.__annotations__)


def test_contributing_has_every_suite() -> None:
    makefile, text = read("Makefile"), read("CONTRIBUTING.md")
    (suites,) = re.findall(r"^SUITES := (.+)$", makefile, re.MULTILINE)
    first, second = (part.split("\n\n")[0] for part in text.split("\n| suite |")[1:])
    assert set(re.findall(r"^\| `make ([\w-]+)`", first, re.MULTILINE)) == set(suites.split())
    others = set(re.findall(r"^(test-[\w-]+):", makefile, re.MULTILINE)) - set(suites.split())
    assert others <= set(re.findall(r"`make ([\w-]+)", second))


def test_long_tests_are_run() -> None:
    """In every folder that has some; where none has, pytest fails. A process of its own is a line of its own."""
    makefile, files = read("Makefile"), sorted((ROOT / "tests").rglob("test_*.py"))
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    (folders,) = re.findall(r"^LONG := (.+)$", makefile, re.MULTILINE)
    marked = {
        "/".join(name.split("/")[:2])
        for name, text in texts.items()
        if re.search(r"mark\.long\b|from tests\.longer import", text)
    }
    assert marked == {*folders.split(), "tests/engine_v2"}
    alone = [
        line
        for text in texts.values()
        for line in re.findall(r"needs a process of its own: pytest (tests/[^\"]+)", text)
    ]
    assert len(alone) == 2
    assert all(f"$(PYTEST_LONG) {line} ||" in makefile for line in alone), alone


def test_the_readmes_prefill_is_that_of_the_profile() -> None:
    """Rounded; the blocks are those of the page's table of capacity, one request at a time."""
    printed: dict[str, list[str]] = {}
    for row in re.findall(
        r"^\| (?:cliff=)?(\w+) \| (.*) \|$", read("docs/results/cpu_profile.md"), re.M
    ):
        printed.setdefault(row[0], []).append(row[1])
    shown = read("README.md").split("| cliff | prefill × |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(shown) == 5
    for row in shown:
        cliff, times, ideal, whole, blocks = (cell.strip() for cell in row.strip("|").split("|"))
        name = "baseline" if cliff == "none" else cliff
        first = [cell.strip() for cell in printed[name][0].split("|")]
        for said, full in ((times, first[1]), (ideal, first[2]), (whole, first[-1])):
            for short, long in zip(
                *(re.findall(r"[\d.]+", text) for text in (said, full)), strict=True
            ):
                digits = len(short.partition(".")[2])
                assert abs(float(short) - float(long)) <= 0.51 * 10**-digits, (cliff, short, long)
        if blocks.endswith("as predicted"):
            held = blocks.split()[0]
            assert any(row.startswith(f"1 | {held} | {held} | yes |") for row in printed[name])
