"""The torchvision shim: lazy, failure-proof, and there only where torchvision needs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_flow import setup_env

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


def python(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter outside the checkout; return what it printed."""
    prologue = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=sys.prefix,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_torchvision
def test_torchvision_imports_in_a_fresh_process() -> None:
    """What the shim is for: the transforms that vLLM's LLaVA needs."""
    assert setup_env.imports("torchvision.transforms.v2")


@needs_torchvision
def test_shim_is_installed_exactly_where_torchvision_fails() -> None:
    installed = (setup_env.site_packages() / setup_env.SHIM_PTH).exists()
    assert installed == (not setup_env.imports("torchvision", without_shim=True))


def test_interpreter_start_imports_no_torch() -> None:
    assert python("print('torch' in sys.modules)") == "False"


def test_looking_for_torchvision_imports_no_torch() -> None:
    code = """
        import torchvision_ops, importlib.util
        torchvision_ops.install()
        importlib.util.find_spec("torchvision")
        print("torch" in sys.modules)
    """
    assert python(code, setup_env.shim_source().parent) == "False"


def test_operators_are_defined_only_without_a_compiled_part(tmp_path: Path) -> None:
    """One that loads is left alone: it defines its own. A library that does not load is the case the shim is for;
    defining twice is harmless. All in one interpreter, since torch takes seconds to import."""
    loads, fails = tmp_path / "loads", tmp_path / "fails"
    for folder in (loads, fails):
        folder.mkdir()
        (folder / "_C.so").write_bytes(b"not a library")
    code = f"""
        import torch, torchvision_ops
        load = torch.ops.load_library
        torch.ops.load_library = lambda path: None
        print(torchvision_ops.define_operators({str(loads)!r}), hasattr(torch.ops.torchvision, "nms"))
        torch.ops.load_library = load
        first = torchvision_ops.define_operators({str(fails)!r})
        torchvision_ops.define_operators({str(fails)!r})
        print(first, torch.ops.torchvision.nms.default._schema)
    """
    schema = "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    said = python(code, setup_env.shim_source().parent).splitlines()
    assert said == ["False False", f"True {schema}"]


def test_install_and_removal_leave_nothing_behind(tmp_path: Path) -> None:
    setup_env.install_shim(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        setup_env.SHIM_PTH,
        f"{setup_env.SHIM_MODULE}.py",
    }
    assert setup_env.remove_shim(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not setup_env.remove_shim(tmp_path)


def test_pth_survives_a_broken_shim(tmp_path: Path) -> None:
    """A line in a `.pth` runs at every start; a damaged module beside it must not be noticed."""
    setup_env.install_shim(tmp_path)
    (tmp_path / f"{setup_env.SHIM_MODULE}.py").write_text("this is not Python")
    assert python(f"import site; site.addsitedir({str(tmp_path)!r}); print('up')") == "up"


def test_no_shim_where_torchvision_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier shim is taken away once a matching torchvision is installed."""
    setup_env.install_shim(tmp_path)
    monkeypatch.setattr(setup_env, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(setup_env, "imports", lambda module, without_shim=False: True)
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: object())
    assert "shim removed" in setup_env.fix_torchvision()
    assert not list(tmp_path.iterdir())
    assert setup_env.fix_torchvision() == "torchvision loads by itself"


def test_useless_shim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision fails for another reason, set-up says so and leaves no shim."""
    monkeypatch.setattr(setup_env, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(setup_env, "imports", lambda module, without_shim=False: False)
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match="matches torch"):
        setup_env.fix_torchvision()
    assert not list(tmp_path.iterdir())
