"""What is run as `python -m MODULE` refuses what cannot be done before any work, in one sentence, as commands do."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

import pytest

from vllm_flow.exits import guarded

ROOT = Path(__file__).parents[2]
BESIDES = ("vllm_flow/cli.py", "vllm_flow/setup_env.py")
"""The command itself, and what runs before anything is installed. What trains the demo model is for its makers."""
ANALYSIS = (
    "vllm_flow.analysis.demo",
    "vllm_flow.analysis.pointing",
    "vllm_flow.analysis.pointing_hooks",
)
DATASETS, ASSEMBLE = "vllm_flow.demo_model.datasets.__main__", "vllm_flow.demo_model.assemble"
COST, TRACE = "vllm_flow.profile.attention_cost", "vllm_flow.profile.prefix_trace"
BENCH, CONVERT = "vllm_flow.eval.sweep.bench_driver", "vllm_flow.models.shikra_convert"
SCALE = "vllm_flow.profile.scale"

WRONG = [
    *((module, "--rounds 0", "--rounds") for module in (*ANALYSIS, COST, BENCH)),
    *((module, "--rounds -3", "--rounds") for module in ANALYSIS),
    *((module, "--samples -1", "--samples") for module in ANALYSIS),
    *((module, "--sigma nan", "--sigma") for module in ANALYSIS[1:]),
    *((module, "--seed -1", "--seed") for module in ANALYSIS[1:]),
    (ANALYSIS[0], "--out FILE", "--out FILE cannot be written (a file stands"),
    (ANALYSIS[0], "--out OUT --small FILE", "--small FILE cannot be written"),
    (ANALYSIS[1], "--rounds 1", "at least 2, since the layer is chosen on one half"),
    (ANALYSIS[1], "--csv FILE/x.csv", "--csv FILE/x.csv cannot be written"),
    (ANALYSIS[1], "--csv FOLDER", "it is a folder, and must be a file"),
    (ANALYSIS[2], "--layers 8:2", "--layers"),
    (ANALYSIS[2], "--layers 30 --rounds 1", "has the layers 0 to 29"),
    (DATASETS, "--out FILE", "--out FILE cannot be written"),
    (DATASETS, "--out OUT --limit 0", "--limit"),
    (DATASETS, "--out OUT --seed -1", "--seed"),
    (DATASETS, "--out OUT --pictures FOLDER", "FOLDER"),
    (ASSEMBLE, "--out FILE", "--out FILE cannot be written"),
    (COST, "--model FOLDER/nothing", "FOLDER/nothing"),
    (COST, "--tokens 2", "at least 3"),
    (COST, "--batch 0", "--batch"),
    (COST, "--dtype int7", "--dtype"),
    (TRACE, "--turns 0", "--turns"),
    (TRACE, "--pools 24 -1", "--pools"),
    (TRACE, "--json FILE/x.json", "--json FILE/x.json cannot be written"),
    (BENCH, "--items 32", "--items: more than one --batch"),
    (BENCH, "--model FOLDER", "FOLDER"),
    (BENCH, "--policies cliff=99", "--policies"),
    (BENCH, "--sweep-items 0", "--sweep-items"),
    (CONVERT, "--delta FOLDER --base FOLDER --tower FOLDER --out FILE", "--out FILE cannot be written"),
    (CONVERT, "--delta FOLDER --base FOLDER --tower FOLDER --out OUT", "FOLDER"),
    (SCALE, "--cliffs 99", "--cliffs"),
    (SCALE, "--images 0", "--images"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "options", "said"), WRONG)
def test_it_is_refused_in_one_sentence_before_the_work(
    module: str, options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FILE": tmp_path / "file", "FOLDER": tmp_path / "folder", "OUT": tmp_path / "out"}
    places["FILE"].touch()
    places["FOLDER"].mkdir()

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    main = importlib.import_module(module).main
    try:
        status = guarded(module, lambda: main(placed(options).split()), "python -m")
    except SystemExit as error:  # argparse
        status = error.code
    *_, last = capsys.readouterr().err.splitlines()
    assert status in (1, 2)
    program = f"python -m {module.removesuffix('.__main__')}"
    assert last.removeprefix(program)[:1] in (":", ".") and placed(said) in last, last
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_every_module_that_is_run_ends_as_commands_do() -> None:
    ran = set()
    for folder in ("vllm_flow", "eval", "patches"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name in BESIDES or "/training/" in name:
                continue
            for branch in ast.parse(path.read_text()).body:
                if isinstance(branch, ast.If) and "__main__" in ast.unparse(branch.test):
                    (call,) = branch.body
                    module = name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
                    module = module if folder == "vllm_flow" else f"vllm_flow.{module}"
                    assert ast.unparse(call) == f"run_module('{module}', main)", name
                    ran.add(module)
    assert ran == {module.removesuffix(".__main__") for module, *_ in WRONG}


def test_an_interrupt_is_told(tmp_path: Path) -> None:
    """In a process of its own, for its status."""
    import subprocess
    import sys

    code = (
        "from vllm_flow.demo_model.datasets import __main__ as it\n"
        "from vllm_flow.exits import run_module\n"
        "def stop(*_):\n    raise KeyboardInterrupt\n"
        "it.write_datasets = stop\n"
        f"run_module('vllm_flow.demo_model.datasets', lambda: it.main(['--out', {str(tmp_path)!r}]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert ended.returncode == 130
    assert ended.stderr == "python -m vllm_flow.demo_model.datasets: interrupted.\n"
