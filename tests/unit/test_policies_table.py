"""`vllm-flow policies`: its tables are those of docs/policies.md, and say what is true of the registries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vllm_flow.cli import main
from vllm_flow.policies_command import average, of_depth, shared, tables
from vllm_flow.presets import PRESETS
from vllm_flow.ranks import RANKS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "policies.md"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    printed = capsys.readouterr().out.strip().split("\n\n")
    text = PAGE.read_text(encoding="utf-8")
    for name, table in zip(("ranks", "presets"), printed, strict=True):
        begin, end = f"<!-- vllm-flow policies: {name} -->", f"<!-- /vllm-flow policies: {name} -->"
        assert text.split(begin)[1].split(end)[0].strip() == table


def test_every_rank_and_preset_has_its_row_and_every_row_its_cells() -> None:
    ranks, presets = "\n".join(tables()).split("\n\n")
    for table, names in ((ranks, RANKS), (presets, PRESETS)):
        head, _, *rows = table.splitlines()
        assert [row.split("`")[1] for row in rows] == list(names)
        assert {row.count(" | ") for row in rows} == {head.count(" | ")}


def test_what_is_shared_follows_from_what_a_rank_needs() -> None:
    assert shared(RANKS["uniform"]) == "any prefix"
    assert shared(RANKS["diversity"]) == shared(RANKS["last_image"])
    assert shared(RANKS["last_image"]) == "any prefix that does not end inside an image"
    assert shared(RANKS["last_prompt"]).startswith("what is before the first image")


def test_presets_in_a_decoder_of_another_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "--layers", "28"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(of_depth(28)) and len(lines) == len(PRESETS)
    assert (
        " ".join(lines[1].split()) == "fastv 53.6% of the image tokens per layer 2:50% last_prompt"
    )
    assert average(PRESETS["fastv"], 28) == 576 * (2 + 13) / 28
    with pytest.raises(SystemExit):
        main(["policies", "--layers", "0"])


def test_what_evicts_nothing_is_said() -> None:
    assert next(line for line in of_depth(1) if line.startswith("paper")).endswith(
        "nothing is evicted"
    )


def test_the_drawing_is_what_the_code_computes() -> None:
    """If this fails after a change of layouts: run docs/site/policies.py, and look at the picture."""
    spec = importlib.util.spec_from_file_location("policies_drawing", DOCS / "site/policies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "policies.svg").read_text(encoding="utf-8") == module.draw()
    # They stand side by side since they cost the same.
    rows = {
        sum(policy.kept(layer, 0, module.TOKENS) for layer in range(module.LAYERS))
        for policy in map(module.policy_of, module.KEYS)
    }
    assert rows == {24}
