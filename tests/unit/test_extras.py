"""A module of an extra that is not installed ends a command in a sentence; any other error does not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flow import exits, extras

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WITH_VLLM = {
    *extras.WITH_VLLM,
    *(
        "cachetools",
        "cbor2",
        "cpuinfo",
        "fastapi",
        "huggingface_hub",
        "msgspec",
        "numpy",
        "packaging",
        "prometheus_client",
    ),
    *(
        "pydantic",
        "safetensors",
        "starlette",
        "tokenizers",
        "triton",
        "typing_extensions",
        "vllm_flow",
        "zmq",
    ),
}
"""What an environment with the package, vLLM and what vLLM requires has."""
OPTIONAL = {"spacy", "markupsafe"}
"""One is used where it is there; the other comes with jinja2."""
MISSING = ("matplotlib", "nltk", "pyarrow", "ray", "rich", "scipy", "statsmodels", "textblob", "gguf")  # fmt: skip
"""What `pip install vllm-flow[cpu]` need not bring."""


def requirements() -> list[str]:
    """As the metadata of a package built from pyproject.toml have them."""
    block = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    found = []
    for name, listed in re.findall(r"^(\w+) = \[(.*?)\]$", block, re.MULTILINE | re.DOTALL):
        found += [f'{item}; extra == "{name}"' for item in re.findall(r'"([^"]+)"', listed)]
    assert 'ray[data]>=2.50,<2.64; extra == "eval"' in found
    return found


def imported() -> set[str]:
    """Top-level names of everything that the package's files import."""
    found: set[str] = set()
    for folder in ("vllm_flow", "eval", "patches"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_every_module_that_the_package_imports_has_an_extra() -> None:
    listed = requirements()
    others = imported() - WITH_VLLM - OPTIONAL
    assert others >= {"matplotlib", "PIL", "ray", "gguf", "xformers"}
    assert {name for name in others if extras.extra_of(name, listed) is None} == set()


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("matplotlib", "report", "eval"),
        ("PIL", "", "eval"),
        ("ray", "eval", "eval"),
        ("rich", "demo", "demo"),
        ("gguf", "eval", "demo"),
        ("pyarrow", "", "eval"),
        ("skimage", "", "train"),
        ("xformers", "", "xformers"),
        ("vllm", "", None),
        ("somebody_elses", "demo", None),
    ],
)
def test_which_extra(module: str, command: str, extra: str | None) -> None:
    assert extras.extra_of(module, requirements(), command) == extra


def test_names_that_differ_are_in_pyproject() -> None:
    for name in extras.NAMED_OTHERWISE.values():
        assert f'"{name}' in PYPROJECT


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    said = extras.remedy(missing("matplotlib.pyplot"), "report")
    assert said is not None and said.endswith("run pip install 'vllm-flow[eval]'")
    assert "'matplotlib', which is not installed" in said
    assert "'vllm-flow[cuda]', or on a CPU 'vllm-flow[cpu]'" in str(extras.remedy(missing("torch")))


@pytest.mark.parametrize(
    "error",
    [
        missing("somebody_elses"),
        missing("matplotlib.nowhere"),  # it is installed, and another version or broken
        ImportError("cannot import name 'x' from 'matplotlib'", name="matplotlib"),
        ModuleNotFoundError("said by hand"),
        ValueError("x"),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    def call() -> int:
        raise error

    with pytest.raises(type(error)):
        exits.guarded("report", call)


def without(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in an environment that has none of the optional packages."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING!r}))\n"
        f"sys.argv = ['vllm-flow', *{words!r}]\n"
        "from vllm_flow.cli import entry; entry()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("demo", "demo"),
        ("eval --model demo --data {0} --tasks pope --policies baseline --out {0}/run", "eval"),
        ("cliff --model demo --data {0} --out {0}/cliff.json", "eval"),
        ("report {0}", "eval"),
        ("figures {0}", "eval"),
        ("cam --model demo --image {0}/a.png --prompt x --out {0}/cam", "eval"),
    ],
)
def test_a_command_without_its_extra(tmp_path: Path, words: str, extra: str) -> None:
    done = without(*words.format(tmp_path).split())
    assert done.returncode == exits.REFUSED
    command = words.partition(" ")[0]
    assert done.stderr.startswith(f"vllm-flow {command}: this needs the Python package '")
    assert done.stderr.endswith(f"run pip install 'vllm-flow[{extra}]'.\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["policies", "--help", "score --help"])
def test_a_command_that_needs_none(words: str) -> None:
    assert without(*words.split()).returncode == 0


def test_the_page_says_which_command_needs_which_extra() -> None:
    from vllm_flow.cli import COMMANDS

    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", page, re.MULTILINE)
    needed = {extra: cell for names, cell in rows for extra in re.findall(r"`(\w+)`", names)}
    assert needed.keys() == {"cpu", "cuda", "eval", "demo", "log", "xformers"}
    said = dict.fromkeys(COMMANDS, "cpu")
    for extra in ("eval", "demo", "log"):
        said |= dict.fromkeys(re.findall(r"`([\w-]+)`", needed[extra]), extra)
    needing = ("eval", "cliff", "report", "score", "profile", "cam", "figures")
    assert said == dict.fromkeys(COMMANDS, "cpu") | dict.fromkeys(needing, "eval") | {
        "demo": "demo"
    } | {"attention_log": "log"}
