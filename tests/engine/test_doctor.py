"""``vllm-flow doctor``: what it says of this environment, and of one that is broken in some way."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.tiny_llava import Shape, build
from vllm_flow import cli, doctor, setup_env
from vllm_flow.engine import diagnosis, families
from vllm_flow.patches import ledger, source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the questions that start an interpreter of their own; they have tests of theirs."""
    monkeypatch.setattr(diagnosis, "check_torchvision", tuple)


def doctor_says(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Exit status, problems by topic, and the whole answer."""
    status = cli.main(["doctor", "--json", *arguments])
    answer = json.loads(capsys.readouterr().out)
    problems = {
        finding["topic"]: finding["text"] for finding in answer["findings"] if finding["problem"]
    }
    assert answer["serves"] == (not problems) == (status == 0)
    return status, problems, answer


def test_this_environment_serves(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The real thing, torchvision's own interpreters included."""
    model = build(Shape(layers=6), tmp_path_factory.mktemp("models"))
    status, problems, answer = doctor_says(capsys, "--model", str(model))
    assert (status, problems) == (0, {})
    said = {finding["topic"]: finding["text"] for finding in answer["findings"]}
    assert "6 decoder layers (llama)" in said["model"] and "6 storage groups" in said["model"]
    assert said["platform"] == "cpu (cpu)."
    assert said["model runner"] == "V1."
    assert said["attention"].startswith("CPU_ATTN (head size 32")
    assert answer["versions"]["torch"] == metadata.version("torch")


def test_lines_say_the_same(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python ")
    assert any(line.startswith("ok       patches") for line in lines)
    assert lines[-1].startswith("Nothing is in the way of serving with vLLM-Flow")
    assert cli.main(["doctor", "--probe"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Serving with vLLM-Flow works here")


def test_without_a_probe_vllm_and_torch_are_only_read() -> None:
    """What takes ten seconds and more is not imported: two processor seconds are plenty."""
    code = (
        "import sys; from vllm_flow.cli import main; status = main(['doctor']); "
        "heavy = {'vllm', 'torch', 'torchvision', 'transformers', 'numpy'} & set(sys.modules); "
        "print(*sorted(heavy)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(
        line.startswith(f"ok       patches       all {len(ledger.TARGETS)} ") for line in lines
    )
    assert lines[-1] == "", f"imported: {lines[-1]}"


def test_without_vllm_it_says_so_and_imports_nothing() -> None:
    """A bare interpreter: no vLLM, no torch, no packaging."""
    code = "import sys; sys.path[:0] = [%r]; from vllm_flow.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys._base_executable, "-I", "-S", "-c", code % str(ROOT)],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "Serving would not work: vLLM: it is not installed: pip install 'vllm-flow[cpu]', or "
        "'vllm-flow[cuda]'."
    )


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0"])
def test_an_untested_vllm(
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
) -> None:
    monkeypatch.setattr(diagnosis, "vllm_distribution", lambda: ("vllm", version))
    status, problems, _ = doctor_says(capsys)
    assert status == 1
    assert problems.keys() == {"vLLM"} and f"does not support {version}" in problems["vLLM"]


def test_a_missing_entry_point(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = metadata.entry_points
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda **wanted: () if wanted.get("group") == diagnosis.PLUGIN_GROUP else points(**wanted),
    )
    _, problems, _ = doctor_says(capsys)
    assert problems.keys() == {"plugin"} and "is missing" in problems["plugin"]


def test_a_plugin_that_may_not_load(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    _, problems, _ = doctor_says(capsys)
    assert problems.keys() == {"plugin"} and "VLLM_PLUGINS='others'" in problems["plugin"]


@pytest.mark.parametrize("options", [(), ("--probe",)])
@pytest.mark.parametrize(
    ("module", "name", "parameters", "said"),
    [
        ("vllm.gone", "VllmConfig.__post_init__", (), "vllm.gone.VllmConfig.__post_init__ is not"),
        ("vllm.config", "VllmConfig.gone", (), "vllm.config.VllmConfig.gone is not there"),
        ("vllm.plugins", "load_endpoint_plugins", ("app",), "has no parameter app"),
    ],
)
def test_a_target_that_changed(
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    name: str,
    parameters: tuple[str, ...],
    said: str,
    options: tuple[str, ...],
) -> None:
    changed = ledger.Target("some_patch", module, name, parameters)
    monkeypatch.setattr(ledger, "TARGETS", (*ledger.TARGETS, changed))
    _, problems, _ = doctor_says(capsys, *options)
    assert problems.keys() == {"patches"} and said in problems["patches"]


@pytest.mark.parametrize(
    ("alone", "with_shim", "installed", "problem", "said"),
    [
        (True, True, False, False, "no shim is needed"),
        (True, True, True, False, "does nothing"),
        (False, True, True, False, "the shim helps"),
        (False, False, False, True, "python -m vllm_flow.setup_env"),
        (False, False, True, True, "a torchvision that matches torch"),
    ],
)
def test_torchvision(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    alone: bool,
    with_shim: bool,
    installed: bool,
    problem: bool,
    said: str,
) -> None:
    """Asked of this process: what imports, and whether the shim in it had to act."""

    def torchvision(name: str) -> None:
        assert name == "torchvision"
        if not (alone or with_shim):
            raise RuntimeError("operator torchvision::nms does not exist")

    def probed(*_: Any, **__: Any) -> bool:
        raise AssertionError("no fresh interpreter is needed")

    monkeypatch.setattr(setup_env, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(setup_env, "imports", probed)
    monkeypatch.setattr(diagnosis.importlib, "import_module", torchvision)
    monkeypatch.delitem(sys.modules, setup_env.SHIM_MODULE, raising=False)
    if installed:
        setup_env.install_shim(tmp_path)
        acted = SimpleNamespace(_libraries=[] if alone else ["a library"])
        monkeypatch.setitem(sys.modules, setup_env.SHIM_MODULE, acted)
    (finding,) = diagnosis.check_torchvision()
    assert finding.problem == problem and said in finding.text


@pytest.mark.parametrize(
    ("alone", "with_shim", "said"),
    [(True, True, "does nothing"), (False, True, "helps"), (False, False, "does not import")],
)
def test_a_shim_that_is_not_at_work_here_is_tried_in_fresh_interpreters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alone: bool, with_shim: bool, said: str
) -> None:
    monkeypatch.setattr(setup_env, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(
        setup_env, "imports", lambda name, without_shim=False: alone if without_shim else with_shim
    )
    monkeypatch.delitem(sys.modules, setup_env.SHIM_MODULE, raising=False)
    setup_env.install_shim(tmp_path)
    (finding,) = diagnosis.check_torchvision()
    assert said in finding.text


def test_no_device(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(device_type=""))
    _, problems, _ = doctor_says(capsys, "--probe")
    assert "vLLM finds no device" in problems["platform"]


def test_a_model_that_is_not_supported(
    quick: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(Shape(), tmp_path)
    monkeypatch.setattr(families, "family_of", lambda architecture: None)
    _, problems, _ = doctor_says(capsys, "--model", str(model))
    assert (
        "was not tested with LlavaForConditionalGeneration (`vllm-flow models` lists"
        in problems["model"]
    )


def test_a_decoder_that_is_not_supported(
    quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = build(Shape(), tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    _, problems, _ = doctor_says(capsys, "--model", str(model))
    assert "the language model of this one is of the type 'gemma'" in problems["model"]


def test_a_model_that_is_not_there(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, problems, _ = doctor_says(capsys, "--model", "/nowhere/at/all")
    assert "/nowhere/at/all" in problems["model"]


def test_the_ledger_names_every_patch() -> None:
    """The page for people, the targets as data and the modules are about the same patches."""
    page = (ROOT / "patches" / "README.md").read_text()
    headings = {line[4:-4].strip() for line in page.splitlines() if line.startswith("## `")}
    helpers = {"__init__", "wrapping", "ledger", "source"}
    assert headings == {path.stem for path in (ROOT / "patches").glob("*.py")} - helpers
    assert {target.patch for target in ledger.TARGETS} == headings - {"torchvision_ops"}
    for target in ledger.TARGETS:
        assert f"`{target.path}`" in page
        assert target.problem() is None
        assert target.problem(imported=False) is None
        read = source.parameters(target.module, target.name)
        assert set(inspect.signature(target.find()).parameters) <= set(read), target.path


def test_lines_of_a_broken_environment() -> None:
    broken = diagnosis.Finding("vLLM", "it is gone.", problem=True)
    found = diagnosis.Diagnosis({"python": "3.11"}, (broken,))
    assert list(doctor.lines(found))[-1] == "Serving would not work: vLLM: it is gone."
