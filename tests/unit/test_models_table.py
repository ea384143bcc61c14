"""`vllm-flow models`: its table is the README's."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_flow.cli import main
from vllm_flow.engine.families.known import FAMILIES
from vllm_flow.models_command import table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out.strip()
    shown = README.read_text(encoding="utf-8")
    between = shown.split("<!-- vllm-flow models -->")[1].split("<!-- /vllm-flow models -->")[0]
    assert between.strip() == printed


def test_every_family_has_its_row_and_every_row_its_cells() -> None:
    head, _, *rows = table()
    assert len(rows) == len(FAMILIES)
    assert {row.count(" | ") for row in rows} == {head.count(" | ")}
    for family, row in zip(FAMILIES, rows, strict=True):
        assert all(f"`{name}`" in row for name in family.architectures)
        assert all(decoder in row for decoder in family.decoders)
