"""No text of the package writes a plural behind a number that may be one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOUNS = (
    "answer|batche|checkpoint|choice|classe|cliff|copie|core|digit|engine|entrie|error|event|field|file|group|image|"
    "item|kind|layer|load|model|node|option|picture|policie|question|request|round|row|run|sample|scene|seed|stage|"
    "step|target|task|test|thread|time|token|value|video|worker"
)
PLURAL = re.compile(rf"^ (?:[a-z-]+ )?((?:{NOUNS})s)\b")
NEVER_ONE = {
    ("eval/cliff/questions.py", "needed"): "a test needs dozens",
    ("eval/scoring/plain_answers.py", "len(items)"): "one is no clash",
    ("eval/sweep/bench_driver.py", "len(two)"): "two",
    ("eval/sweep/downsample.py", "embeddings.shape[1]"): "of a vision tower",
    ("eval/sweep/records.py", "path"): "a file's name",
    ("eval/sweep/run.py", "pool.engines"): "fewer of them start, so there are two or more",
    ("vllm_flow/analysis/figure_attention.py", "summary.requests"): "said of two or more",
    ("vllm_flow/analysis/pointing.py", "args.split"): "a name",
    ("vllm_flow/analysis/pointing_hooks.py", "args.split"): "a name",
    (
        "vllm_flow/cliff_file.py",
        "shown(layers)",
    ): "whatever stands in the file, as it stands there",
    ("vllm_flow/demo_model/datasets/readme.py", "len(CLASSES)"): "the demo model's world",
    ("vllm_flow/engine/diagnosis.py", "len(TARGETS)"): "the ledger's",
    ("vllm_flow/engine/front_end/fitting.py", "longest"): "more than a step has room for",
    ("vllm_flow/grouping.py", "self.num_layers"): "one layer makes one group",
    ("vllm_flow/engine/settings.py", "stages"): "a list of them",
    ("vllm_flow/grouping.py", "drafter"): "a clause",
    ("vllm_flow/grouping.py", "stages"): "a list of them",
    ("vllm_flow/models_command.py", "kinds"): "one is told apart",
    ("vllm_flow/policy_values.py", "shown(part.strip())"): "what was written",
    ("vllm_flow/profile/peers.py", "sorted(lengths)"): "a list of them",
    ("vllm_flow/profile/speed_tables.py", "rounds"): "enough for an interval",
}
"""Where a number cannot be one, and why."""
SIZES = re.compile(
    r"(^|[._])(size|sizes\[0\]|image_tokens|seq_length|context|layers|tokens)$|block_size'\]$"
)
"""Tokens of a block or of a picture, and the layers of a model under measurement."""


def written(source: str) -> Iterator[tuple[str, str]]:
    """Of each f-string: a placeholder, as it is written, and the plural behind it."""
    for text in ast.walk(ast.parse(source)):
        if not isinstance(text, ast.JoinedStr):
            continue
        for value, behind in zip(text.values, text.values[1:], strict=False):
            if isinstance(value, ast.FormattedValue) and isinstance(behind, ast.Constant):
                plural = PLURAL.match(str(behind.value))
                if plural and not re.match(r"_?[A-Z_]+$|counted\(", ast.unparse(value.value)):
                    yield ast.unparse(value.value), plural[1]


def ours() -> list[Path]:
    folders = ("vllm_flow", "eval", "patches")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_package_counts_in_words() -> None:
    bare, met = [], set()
    for path in ours():
        name = path.relative_to(ROOT).as_posix()
        for value, plural in written(path.read_text()):
            if (name, value) in NEVER_ONE:
                met.add((name, value))
            elif not SIZES.search(value):
                bare.append(f"{name}: {{{value}}} {plural}")
    hint = "write it with vllm_flow.counts.counted, or say in NEVER_ONE why it is never one"
    assert not bare, "\n".join([hint, *bare])
    assert met == set(NEVER_ONE), "no longer there"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('f"{n} requests"', [("n", "requests")]),
        ('f"Asked {len(x)} of {n} timed steps."', [("n", "steps")]),
        ("f\"{counted(n, 'row')} of the steps\"", []),
        ('f"{MOST} seeds"', []),
        ('f"{n} steps" f"{m:,} rows"', [("n", "steps"), ("m", "rows")]),
    ],
)
def test_the_check_sees_what_it_should(text: str, found: list[tuple[str, str]]) -> None:
    assert list(written(text)) == found
